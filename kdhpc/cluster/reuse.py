"""Take published shards from another run: the same data under hard links, never a copy.

A run that differs from another one in a part, such as one more size of students, needs truth, D and
teachers that are there already. Where a planned shard has the recipe and the rows of a shard that
the other run has published, its data is linked into this run and its record is written once more.
The data then belongs to both runs: either may be deleted, and neither changes it. Merges are not
taken; they are quick, and belong to a plan.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from kdhpc.cluster import places
from kdhpc.cluster.runs import Run, check_not_restored, open_run
from kdhpc.config.run import RunConfig
from kdhpc.errors import DamagedError, InputError
from kdhpc.plan.shards import Plan
from kdhpc.storage.files import read_once, sync_tree, write_once
from kdhpc.storage.run_folder import Record, read_record


def with_place(config: RunConfig) -> RunConfig:
    """Return the config with the absolute path of the run that it reuses, if it does.

    A name is looked for in `runs_dir` first.

    Raises:
        InputError: if there is no such run.
    """
    if config.reuse is None:
        return config
    beside = Path(config.runs_dir).expanduser() / config.reuse
    try:
        there = (beside / "run.json").is_file()
        place = beside.resolve() if there else places.locate(config.reuse)
    except InputError as error:
        raise InputError(f"reuse={error}") from error
    return dataclasses.replace(config, reuse=str(place))


def find(config: RunConfig, plan: Plan) -> list[Record]:
    """Find the published shards of another run that a plan has too; nothing is written.

    Args:
        config: config of the new run, after `with_place`.
        plan: plan of the new run.

    Raises:
        InputError: if the other run has another pipeline or is on another file system, or if one of
            these shards is damaged or gone.
    """
    if config.reuse is None:
        return []
    source = open_run(Path(config.reuse))
    check_not_restored(source, "nothing of it can be reused; expected the run that was archived")
    if source.pipeline.name != config.pipeline:
        raise InputError(
            f"reuse={config.reuse}: a run of the pipeline {source.pipeline.name}; expected one of "
            f"{config.pipeline}"
        )
    target = Path(config.runs_dir).expanduser().resolve()
    if target / config.name == source.path:
        raise InputError(f"reuse={config.reuse}: is this run itself; expected another one")
    while not target.exists():
        target = target.parent
    if target.stat().st_dev != source.path.stat().st_dev:
        raise InputError(
            f"reuse={config.reuse}: on another file system than {target}, so its data cannot be "
            "linked; expected runs_dir on the same one"
        )
    scan = source.scan()
    for key, problem in scan.damaged.items():
        if key in plan.shards and _may_be_shared(source, plan, key):
            raise InputError(
                f"reuse={config.reuse}: {problem}; expected whole shards; let launch/sweep.py make "
                "it again in that run, or go on without reuse"
            )
    found = [
        record
        for key, record in scan.records.items()
        if key in plan.shards
        and plan.shards[key].stage not in source.aliases
        and (plan.shards[key].recipe, plan.shards[key].row_range)
        == (record.recipe, record.row_range)
    ]
    if not found:
        raise InputError(
            f"reuse={config.reuse}: has published nothing with the settings of this run; expected "
            "a run of the same truth and seed, or no reuse"
        )
    return found


def _may_be_shared(source: Run, plan: Plan, key: str) -> bool:
    """Return whether a damaged shard of another run has the recipe of ours, as far as is known."""
    try:
        return read_record(source.record_path(key), key).recipe == plan.shards[key].recipe
    except DamagedError:
        return True


def take(run: Run, found: Sequence[Record]) -> None:
    """Take shards that `find` has found, unless the run has them.

    Raises:
        InputError: if their data cannot be linked; what was taken before stays.
    """
    own = run.scan().records if found else {}
    for record in found:
        if record.key not in own:
            _link(run, record)


def _link(run: Run, record: Record) -> None:
    """Link the data of a record into a run and publish it there."""
    path = run.record_path(record.key)
    run.make_folder(path.parent)
    data = path.with_name(record.data_name)
    try:
        _link_tree(record.data, data)
    except OSError as error:
        raise InputError(
            f"reuse: {record.data} cannot be linked to {data} ({error.strerror}); expected a file "
            "system with hard links"
        ) from error
    sync_tree(data)
    place = record.folder / path.name
    made_by = record.reused_from or str(record.folder.parents[1])
    write_once(path, {**read_once(place), "reused_from": made_by})


def _link_tree(source: Path, target: Path) -> None:
    """Link a file, or each file of a folder; what an interrupted launch has linked is kept."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            _link_tree(entry, target / entry.name)
    elif not (target.exists() and target.samefile(source)):
        os.link(source, target)
