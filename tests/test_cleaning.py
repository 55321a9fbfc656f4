"""Cleaning lists what nobody needs, and never what a record has published or may have published."""

import dataclasses
import time
from collections.abc import Set
from pathlib import Path

import pytest
import torch
from commands import launch, light_result
from light import expected

from kdhpc.cluster import runs
from kdhpc.cluster.housekeeping import unneeded
from kdhpc.cluster.runs import Run
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Arm, Plan, Shard
from kdhpc.storage import files
from kdhpc.storage.run_folder import RESULTS, RunFolder
from kdhpc.storage.work import Work, Written
from kdhpc.training import checkpoints

SHARD = Shard(arm=Arm(stage="only", name="arm", fields={"x": 1}, inputs={}), name="00000")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return the folder of a run that has published one shard."""
    (tmp_path / "progress").mkdir()
    run = RunFolder(tmp_path, {"only": "1-only"})
    publish(run, SHARD)
    return run


def write(run: RunFolder, shard: Shard) -> Path:
    path = Work(run, RunConfig(), Plan()).new_path(shard, ".txt")
    path.write_text("data")
    return path


def publish(run: RunFolder, shard: Shard) -> Path:
    path = write(run, shard)
    Work(run, RunConfig(), Plan()).publish(shard, Written(path=path, num_rows=1), time.time())
    return path


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def listed(run: RunFolder, finished: Set[str] = frozenset()) -> set[Path]:
    return set(unneeded(run, run.scan(), finished=finished, complete=False))


def test_data_of_other_attempts_is_listed_and_published_data_is_not(run: RunFolder) -> None:
    other_attempt = write(run, SHARD)
    no_record = write(run, dataclasses.replace(SHARD, name="00001"))
    assert listed(run) == {other_attempt, no_record}


def test_nothing_of_a_shard_with_a_damaged_record_is_listed(run: RunFolder) -> None:
    """Nobody knows which of the two attempts was published."""
    write(run, SHARD)
    other_shard = write(run, dataclasses.replace(SHARD, name="00001"))
    save(run, 1)
    damage(run.record_path(SHARD.key))
    assert listed(run, {SHARD.key}) == {other_shard}


def test_the_data_of_a_damaged_shard_is_kept_until_its_record_is_put_aside(run: RunFolder) -> None:
    data = run.scan().records[SHARD.key].data
    damage(data)
    assert listed(run) == set()
    run.quarantine(SHARD.key)
    assert data in listed(run)


def test_clean_keeps_the_data_of_records_that_were_made_with_other_settings(
    tmp_path: Path,
) -> None:
    pipeline, config = runs.from_words(
        ["pipeline=light:PIPELINE", "name=light", "cluster=local", f"runs_dir={tmp_path}"]
    )
    plan = pipeline.plan(config)
    run = runs.open_for(config, plan)
    runs.add_request(run, config, kind="sweep", executor="local")
    planned, changed = plan.arm("make", "arm")[:2]
    other = dataclasses.replace(changed.arm, fields={"seed": 7})
    same_recipe = publish(run, planned)
    other_recipe = publish(run, dataclasses.replace(changed, arm=other))
    unpublished = write(run, planned)
    launch("clean", str(run.path), "--yes")
    assert same_recipe.exists()
    assert other_recipe.exists()
    assert not unpublished.exists()


def save(run: RunFolder, step: int, *, for_good: bool = False) -> tuple[Path, Path]:
    """Make a checkpoint of the shard; return the paths of its record and its data."""
    folder = run.scratch_path(SHARD.key) / "0123456789ab"
    run.make_folder(folder.parent)
    checkpoints.save(
        folder,
        step=step,
        tensors={"weight": torch.ones(3)},
        recipe="r",
        num_kept=2,
        for_good=for_good,
    )
    [data] = folder.glob(f"{step:09d}.*.safetensors")
    return folder / f"{step:09d}.json", data


def test_checkpoints_are_listed_once_the_training_is_finished(run: RunFolder) -> None:
    record, _ = save(run, 1)
    (run.scratch_path(SHARD.key) / "train.jsonl").write_text("{}")
    assert listed(run) == set()
    assert listed(run, {SHARD.key}) == {record.parent}


def test_checkpoints_that_are_kept_for_good_are_never_listed(run: RunFolder) -> None:
    save(run, 1, for_good=True)
    passing = save(run, 2)
    (run.scratch_path(SHARD.key) / "train.jsonl").write_text("{}")
    assert listed(run, {SHARD.key}) == set(passing)


def test_a_checkpoint_whose_record_is_damaged_may_be_for_good(run: RunFolder) -> None:
    record, _ = save(run, 1, for_good=True)
    passing = save(run, 2)
    damage(record)
    assert listed(run, {SHARD.key}) == set(passing)


def grown(tmp_path: Path, *more: str) -> Run:
    """Return a light run that was made, then made again with other shards in the same folder."""
    words = ["pipeline=light:PIPELINE", "name=light", "cluster=local", f"runs_dir={tmp_path}"]
    for num_shards in (3, 2):
        launch("sweep", *words, f"num_shards={num_shards}", *more)
    return runs.open_run(tmp_path / "light")


def test_a_merge_of_an_earlier_request_is_listed_and_can_be_made_again(tmp_path: Path) -> None:
    run = grown(tmp_path)
    merges = {key for key in run.scan().records if key.startswith("merge/")}
    assert len(merges) == 2
    listed = launch("clean", str(run.path)).stdout.splitlines()
    old = [line for line in listed if line.endswith("  merge of an earlier request")]
    assert [Path(line.split("  ")[0]).suffix for line in old] == [".json", ".h5"]
    launch("clean", str(run.path), "--yes")
    assert len([key for key in run.scan().records if key.startswith("merge/")]) == 1
    assert light_result(run.path) == expected(2)
    assert launch("verify", str(run.path)).stdout.endswith(" 0 damaged\n")
    words = ["pipeline=light:PIPELINE", "name=light", "cluster=local", f"runs_dir={tmp_path}"]
    launch("sweep", *words, "num_shards=3")
    assert light_result(run.path) == expected(3)


def test_the_merge_with_the_fixed_name_is_kept_until_a_newer_one_is_there(tmp_path: Path) -> None:
    run = grown(tmp_path)
    newest = run.path / "3-merge" / RESULTS
    [data] = [r.data for r in run.scan().records.values() if r.data.samefile(newest)]
    plan = runs.current(run)[2]
    [planned] = plan.stage("merge")
    run.record_path(planned.key).unlink()  # as if it was not made yet
    data.unlink()
    [other] = [r for key, r in run.scan().records.items() if key.startswith("merge/")]
    files.point_alias(newest, other.data)
    reasons = unneeded(
        run, run.scan(), finished=frozenset(), complete=False, planned=plan.shards.keys()
    )
    assert "merge of an earlier request" not in reasons.values()
    assert unneeded(run, run.scan(), finished=frozenset(), complete=False) == reasons


def test_a_copy_of_a_run_without_its_links_keeps_the_merge_that_may_be_the_newest(
    tmp_path: Path,
) -> None:
    """Where the fixed name is a copy, two merges of the same size are not told apart."""
    old, new, alias = (tmp_path / name for name in ("old", "new", "alias"))
    for path in (old, new):
        path.write_text("results")
    files.point_alias(alias, new)
    assert files.stands_for(alias, new)
    assert not files.stands_for(alias, old)
    alias.unlink()
    alias.write_text("results")
    assert files.stands_for(alias, old)
