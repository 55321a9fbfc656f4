"""Faults of disks, of files and of the code itself."""

import os
import shutil
from pathlib import Path

import h5py
import pytest
from commands import LIGHT_RESULTS, launch, status
from real_slurm import queue, wait_for

from faults.scenario import Scenario
from kdhpc.storage.results import read_results


def fill(path: Path, *, leave: int) -> Path:
    """Write a file that leaves about `leave` bytes free on its disk; return its path."""
    filler = path / "filler"
    free = os.statvfs(path)
    with filler.open("wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return filler


@pytest.mark.scenario(10)
def test_a_full_disk_stops_an_attempt_and_is_named(scenario: Scenario, small_disk: Path) -> None:
    """The attempt deletes its own half-written file, so that the failure can be recorded."""
    scenario.use_disk(small_disk)
    stuck = scenario.trouble("make-00002", "hang flood 4000000")
    scenario.sweep("slurm.task_min=0.01")
    others = [scenario.record(f"make/arm/{n:05d}") for n in (0, 1, 3, 4, 5)]
    wait_for(lambda: all(path.exists() for path in others), "the other shards")
    scenario.inject("3 MB tmpfs, filled by an attempt's own file")
    stuck.unlink()
    scenario.wait()
    scenario.assert_named("DISK_FULL", "make/arm/00002")
    assert len(list((scenario.run / "1-make/arm").glob("00002*"))) == 0
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(10)
def test_a_full_disk_stops_a_merge_and_is_named(scenario: Scenario, small_disk: Path) -> None:
    scenario.use_disk(small_disk)
    stuck = scenario.trouble("merge", "hang")
    scenario.sweep("width=20000")
    wait_for(lambda: any(key.startswith("merge/") for key in scenario.starts()), "the merge")
    scenario.inject("3 MB tmpfs, 300 kB left when a merge of 1 MB begins")
    filler = fill(small_disk, leave=300_000)
    stuck.unlink()
    scenario.wait()
    print(scenario.logs())
    [key] = [key for key in scenario.starts() if key.startswith("merge/")]
    scenario.assert_named("DISK_FULL", key)
    assert not list((scenario.run / "3-merge").rglob("*.h5"))
    filler.unlink()
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=1)


def damage(scenario: Scenario) -> dict[str, Path]:
    """Flip a bit in one shard, cut another short, and delete the data of a third."""
    damaged = {}
    for number, what in ((0, "flipped"), (1, "truncated"), (2, "deleted")):
        [data] = (scenario.run / "2-square/arm").glob(f"{number:05d}.*.txt")
        damaged[what] = data
    flipped = bytearray(damaged["flipped"].read_bytes())
    flipped[0] ^= 1
    damaged["flipped"].write_bytes(flipped)
    damaged["truncated"].write_bytes(damaged["truncated"].read_bytes()[:-1])
    damaged["deleted"].unlink()
    return damaged


@pytest.mark.scenario(11)
def test_damage_found_by_the_merge_is_not_merged(scenario: Scenario) -> None:
    stuck = scenario.trouble("merge", "hang")
    scenario.sweep()
    wait_for(lambda: any(key.startswith("merge/") for key in scenario.starts()), "the merge")
    scenario.inject("one shard truncated, one with a flipped bit, one deleted, before the merge")
    damage(scenario)
    stuck.unlink()
    scenario.wait()
    report = status(scenario.run, code=1)
    assert set(report["damaged"]) == {"square/arm/00001", "square/arm/00002"}
    assert not (scenario.run / LIGHT_RESULTS).exists()
    launch("status", str(scenario.run), "--explain", "square/arm/00001", code=1)
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=6, least=4)  # three shards, and the merge once or twice more


@pytest.mark.scenario(11)
def test_damage_found_by_verify_is_made_good(scenario: Scenario) -> None:
    scenario.sweep()
    scenario.wait()
    scenario.inject("the same in a finished run; verify.py --put-aside, then sweep")
    files = damage(scenario)
    before = {path: path.read_bytes() for path in files.values() if path.exists()}
    shown = launch("verify", str(scenario.run), code=1).stdout
    assert all(path.name in shown for path in files.values())
    assert {path: path.read_bytes() for path in before} == before
    launch("verify", str(scenario.run), "--put-aside", code=1)
    assert {path: path.read_bytes() for path in before} == before
    scenario.sweep()
    scenario.wait()
    scenario.assert_whole(reruns=3)


@pytest.mark.scenario(13)
def test_a_failed_stage_whose_job_was_forgotten_lets_nothing_through(scenario: Scenario) -> None:
    poison = scenario.trouble("make-00002", "raise")
    scenario.sweep()
    scenario.wait()
    scenario.inject("a stage failed; its jobs purged from the controller; then rerun")
    old = scenario.job_ids()
    wait_for(lambda: not scenario.known_to_slurm(old), "the controller to forget")
    scenario.assert_named("EXCEPTION", "make/arm/00002")
    assert not (scenario.run / "3-merge").exists()
    poison.unlink()
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=2)


@pytest.mark.scenario(17)
def test_a_reader_that_holds_the_merged_file_keeps_it(scenario: Scenario) -> None:
    scenario.sweep("num_shards=5")
    scenario.wait()
    results = scenario.run / LIGHT_RESULTS
    with h5py.File(results, "r") as held:
        scenario.inject("a reader holds results.h5 open while a grown run is merged again")
        scenario.sweep("num_shards=8")
        scenario.wait()
        assert held["tables/all/value"].shape == (5, 1)
        assert held["tables/all/value"][4, 0] == 16
    assert len(read_results(results).tables["all"]["value"]) == 8
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(18)
def test_a_poison_shard_and_a_hungry_one_are_named_and_stop_nobody_else(
    scenario: Scenario,
) -> None:
    poison = scenario.trouble("make-00001", "raise")
    hungry = scenario.trouble("make-00004", "oom")
    scenario.inject("one shard always raises, one always runs out of memory")
    scenario.sweep("slurm.max_mem_gb=0.4")
    scenario.wait()
    scenario.assert_named("EXCEPTION", "make/arm/00001")
    scenario.assert_named("OOM", "make/arm/00004")
    assert scenario.failure_kinds() == {
        "make/arm/00001": ["EXCEPTION"] * 2,
        "make/arm/00004": ["OOM"] * 3,
    }
    done = {path.stem for path in (scenario.run / "2-square/arm").glob("*[0-9].json")}
    assert done == {"00000", "00002", "00003", "00005"}
    scripts = [path.read_text() for path in (scenario.run / "submissions").glob("*[0-9].sh")]
    assert {m for m in (307, 410, 461) if any(f"--mem={m}M" in t for t in scripts)} == {307, 410}
    poison.unlink()
    hungry.unlink()
    scenario.rerun("slurm.mem_gb=0.4")
    scenario.wait()
    scenario.assert_whole(reruns=5)


@pytest.mark.scenario(19)
def test_a_bug_in_every_shard_stops_after_the_canary(scenario: Scenario) -> None:
    for index in range(25):
        scenario.trouble(f"make-{index:05d}", "raise")
    scenario.inject("a bug that fails every one of 25 shards")
    scenario.sweep("num_shards=25")
    scenario.wait()
    report = status(scenario.run, code=1)
    [cause] = report["causes"]
    assert (cause["kind"], len(cause["shards"])) == ("EXCEPTION", len(scenario.starts()))
    assert len(cause["shards"]) <= 4
    assert f"{25 - len(cause['shards'])} shards are not started" in report["notes"][0]
    assert "fix the cause, then rerun.py" in report["notes"][0]
    shown = launch("status", str(scenario.run), code=1).stdout
    assert shown.count("Traceback") <= 1
    assert queue() == []
    shutil.rmtree(scenario.folder / "trouble")
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=len(cause["shards"]))
