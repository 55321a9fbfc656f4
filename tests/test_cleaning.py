"""Cleaning lists what nobody needs, and never what a record has published or may have published."""

import dataclasses
import time
from collections.abc import Set
from pathlib import Path

import pytest
import torch
from commands import launch

from kdhpc.cluster import runs
from kdhpc.cluster.housekeeping import unneeded
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Arm, Plan, Shard
from kdhpc.storage.run_folder import RunFolder
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
