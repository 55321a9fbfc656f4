"""Status tells the truth about a run, its stages and single shards."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, begin, launch, status
from light import PIPELINE, LightConfig

from kdhpc.cluster import runs
from kdhpc.cluster.ledger import Job, Ledger
from kdhpc.cluster.logs import last_part, own_part
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look, status_of
from kdhpc.storage.results import logical_digest

KEYS = [f"make/arm/{index:05d}" for index in range(6)]


@pytest.fixture
def config(tmp_path: Path) -> LightConfig:
    (tmp_path / "trouble").mkdir()
    return LightConfig(
        pipeline="light:PIPELINE",
        name="light",
        runs_dir=str(tmp_path),
        trouble=str(tmp_path / "trouble"),
        executor="local",
    )


@pytest.fixture
def run(config: LightConfig) -> Run:
    run = runs.open_for(config, PIPELINE.plan(config))
    runs.add_request(run, config, kind="sweep", executor="local")
    return run


def finish(run: Run, number: int, keys: list[str]) -> None:
    """Run one task to its end and settle it."""
    begin(run, number, keys).wait()
    Ledger(run.path).settle(number, Job(job_id=None))


def note_progress(run: Run, number: int, key: str) -> None:
    path = run.path / "progress" / f"{number:04d}-0.json"
    path.write_text(json.dumps({"key": key, "fraction": 0.5}))


def listed(run: Run, stage: str, code: int) -> dict[str, str]:
    lines = launch("status", str(run.path), "--list", stage, code=code).stdout.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_a_cause_shows_the_lines_of_its_own_shard_in_a_shared_log(
    run: Run, config: LightConfig
) -> None:
    (Path(config.trouble) / "make-00001").write_text("raise")
    finish(run, 1, KEYS[:4])
    log = Ledger(run.path).log_path(1, 0)
    assert "make/arm/00003: published" in log.read_text()
    [cause] = status_of(run, look(run)).causes
    assert (cause.shards, cause.log) == ((KEYS[1],), str(log))
    assert cause.last_lines[-1] == f"{KEYS[1]}: failed: RuntimeError: trouble was asked for"
    assert not any(key in line for line in cause.last_lines for key in KEYS[2:])


def test_a_cause_shows_the_attempt_that_failed_last(run: Run, config: LightConfig) -> None:
    trouble = Path(config.trouble) / "make-00001"
    trouble.write_text("raise")
    finish(run, 1, KEYS[:2])
    trouble.write_text("oom")
    finish(run, 2, KEYS[1:2])
    [cause] = status_of(run, look(run)).causes
    assert (cause.kind, cause.log) == ("OOM", str(Ledger(run.path).log_path(2, 0)))
    assert "MemoryError" in cause.last_lines[-1]


def test_of_several_ranks_and_attempts_the_last_attempt_is_shown_whole(
    run: Run, config: LightConfig, tmp_path: Path
) -> None:
    first, second = PIPELINE.plan(config).stage("make")[:2]
    shard = dataclasses.replace(first, arm=dataclasses.replace(first.arm, ranks_per_node=2))
    log = tmp_path / "0.log"
    old = ["loading", f"{shard.key}: started", f"{shard.key}: started", "old"]
    new = [f"{shard.key}: started", "rank 0", f"{shard.key}: started", "new", ""]
    log.write_text("\n".join([*old, *new, f"{second.key}: started", "other"]))
    part = own_part(log, shard)
    assert part is not None
    assert part.text.splitlines() == new
    third = PIPELINE.plan(config).stage("make")[2]
    assert own_part(log, third) is None
    log.write_text("environment.sh: no such module\n")
    part = own_part(log, third)
    assert part is not None
    assert part.text == "environment.sh: no such module\n"


def test_a_process_of_a_packed_task_has_a_log_of_its_own(run: Run, config: LightConfig) -> None:
    finish(run, 1, KEYS[:2])
    ledger, shard = Ledger(run.path), PIPELINE.plan(config).shards[KEYS[1]]
    ledger.note_attempt(1, 0, shard.key, "started", process=1)
    ledger.log_path(1, 0, process=1).write_text(f"{shard.key}: started\nmine\n")
    part = last_part(run, look(run), shard)
    assert part is not None
    assert part.text == f"{shard.key}: started\nmine\n"


def test_only_the_shard_that_a_task_works_on_is_live(run: Run, config: LightConfig) -> None:
    trouble = Path(config.trouble)
    (trouble / "make-00001").write_text("raise")
    (trouble / "make-00002").write_text("hang")
    task = begin(run, 1, KEYS[:4])
    while Ledger(run.path).last_events(1, 0).get(KEYS[2]) != "started":
        assert task.poll() is None
        time.sleep(0.05)
    live = []
    for key in KEYS[:4]:
        note_progress(run, 1, key)
        live.append(status_of(run, look(run)).live)
    assert live == [(), (), (f"{KEYS[2]} 50%",), ()]
    words = [word.partition(" submission")[0] for word in listed(run, "make", code=1).values()]
    assert words == ["published", "failed EXCEPTION", "queued", "queued", "waiting", "waiting"]
    (trouble / "make-00002").unlink()
    task.wait()
    note_progress(run, 1, KEYS[2])
    assert status_of(run, look(run)).live == ()


def test_a_stage_is_listed_with_a_state_and_a_place_for_each_shard(
    run: Run, config: LightConfig
) -> None:
    (Path(config.trouble) / "make-00001").write_text("raise")
    finish(run, 1, KEYS[:2])
    host = socket.gethostname()
    assert listed(run, "make", code=1) == {
        KEYS[0]: f"published submission 0001 task 0 on {host}",
        KEYS[1]: "failed EXCEPTION submission 0001 task 0",
        **dict.fromkeys(KEYS[2:], "waiting"),
    }
    refused = launch("status", str(run.path), "--list", "sqare", code=2)
    assert refused.stderr == (
        "error: --list sqare: no such stage; expected square, or one of make, merge\n"
    )


def test_the_whole_log_of_a_shard_is_printed(run: Run, config: LightConfig) -> None:
    words = [str(run.path), "--log"]
    never = launch("status", *words, KEYS[0], code=1)
    assert never.stdout == f"{KEYS[0]}: was never tried; not started\n"
    (Path(config.trouble) / "make-00001").write_text("raise")
    finish(run, 1, KEYS[:3])
    shown = launch("status", *words, KEYS[1], code=1).stdout.splitlines()
    assert (shown[0], shown[-1]) == (
        f"{KEYS[1]}: started",
        f"{KEYS[1]}: failed: RuntimeError: trouble was asked for",
    )
    assert "Traceback (most recent call last):" in shown
    assert launch("status", *words, KEYS[0], code=0).stdout.startswith(f"{KEYS[0]}: started\n")
    refused = launch("status", *words, "mke/arm/00001", code=2)
    assert refused.stderr == (
        f"error: --log mke/arm/00001: no such shard; expected STAGE/ARM/NAME, such as {KEYS[1]}\n"
    )
    refused = launch("status", str(run.path), "--follow", code=2)
    assert refused.stderr == "error: --follow: expected --log SHARD too\n"


@pytest.mark.parametrize("what", ["hang", "hang raise"])
def test_a_followed_log_ends_with_the_attempt(run: Run, config: LightConfig, what: str) -> None:
    hanging = Path(config.trouble) / "make-00001"
    hanging.write_text(what)
    task = begin(run, 1, KEYS[:2])
    command = [sys.executable, f"{ROOT}/launch/status.py", f"{run.path}", "--log", KEYS[1]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    with subprocess.Popen(
        [*command, "--follow"], stdout=subprocess.PIPE, text=True, env=environment
    ) as follower:
        assert follower.stdout is not None
        line = ""
        while line != f"{KEYS[1]}: started\n":  # before it, perhaps that the shard was never tried
            line = follower.stdout.readline()
            assert line
        hanging.unlink()
        task.wait()
        rest = follower.stdout.read()
    fails = what.endswith("raise")
    assert ("failed: RuntimeError" in rest, "published after" in rest) == (fails, not fails)
    assert follower.returncode == fails


def test_a_complete_run_shows_the_digest_of_its_results(tiny_run: Path) -> None:
    report = status(tiny_run, code=0)
    digest = logical_digest(tiny_run / "8-merge" / "results.h5")
    assert report["logical_digest"] == digest
    assert digest in launch("status", str(tiny_run)).stdout


def test_results_of_other_settings_are_taken_back_or_made_again(tmp_path: Path) -> None:
    """As if an older launcher had changed the settings; sweep.py refuses to."""
    words = ["pipeline=light:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=light"]
    launch("sweep", *words)
    run = runs.open_run(tmp_path / "light")
    _, config, _ = runs.current(run)
    changed = dataclasses.replace(config, seed=5)
    runs.add_request(run, changed, kind="sweep", executor="local")
    shown = launch("status", str(run.path), code=1).stdout
    assert shown.count("made with other settings") == 12
    assert "sweep.py takes if they are typed again; rerun.py RUN --put-aside makes it" in shown
    assert status(run.path)["logical_digest"] == ""
    launch("sweep", *words, "seed=5", code=2)
    launch("rerun", str(run.path), code=1)
    assert len(status(run.path, code=1)["damaged"]) == 12
    launch("sweep", *words)
    assert status(run.path, code=0)["damaged"] == {}
    runs.add_request(run, changed, kind="sweep", executor="local")
    launch("rerun", str(run.path), "--put-aside")
    assert status(run.path, code=0)["damaged"] == {}
    assert len(list((run.path / "1-make/arm").glob("*.json.damaged-*"))) == 6
