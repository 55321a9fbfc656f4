"""Find what may be deleted from a run folder, while nothing works on it."""

from collections.abc import Iterator, Set
from pathlib import Path

from kdhpc.cluster import runs
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.errors import BusyError, DamagedError
from kdhpc.storage.files import read_once, stands_for
from kdhpc.storage.run_folder import RunFolder, Scan


def check_at_rest(run: Run, state: State, so: str) -> None:
    """Refuse to work on a run while something else may.

    Args:
        run: the run.
        state: what was observed of it.
        so: what to do when nothing runs.

    Raises:
        BusyError: if the run is active, or it is unknown whether it is.
    """
    if state.queue_error:
        raise BusyError(
            f"{run.path}: Slurm does not answer, so it is unknown what is active; try again later"
        )
    if state.situation.active or runs.is_locked(run):
        raise BusyError(f"{run.path}: is active; {so} when nothing runs, or cancel.py it first")


def unneeded(
    run: RunFolder,
    scan: Scan,
    *,
    finished: Set[str],
    complete: bool,
    planned: Set[str] | None = None,
) -> dict[Path, str]:
    """List the paths that may be deleted while nothing runs.

    Args:
        run: the run folder.
        scan: all its records, also those that were made with other settings than the plan's.
        finished: keys of the shards that will not be made again, so that nothing resumes from
            their checkpoints.
        complete: whether the run is complete, so that its logs may be deleted too.
        planned: keys of the shards that the last request plans, so that merges of earlier ones may
            be deleted; None to keep them. Typing an earlier request again merges again.

    Returns:
        Why each path is not needed, by path.
    """
    reasons: dict[Path, str] = {}
    for stage in run.folders:
        for arm in sorted(run.stage_dir(stage).glob("*/")):
            reasons |= _unneeded_in(arm, f"{stage}/{arm.name}", scan, finished)
    if planned is not None:
        reasons |= _superseded(run, scan, planned)
    reasons |= dict.fromkeys(sorted((run.path / "progress").iterdir()), "progress of a task")
    if complete:
        reasons |= dict.fromkeys(sorted((run.path / "logs").iterdir()), "logs")
    return reasons


def _superseded(run: RunFolder, scan: Scan, planned: Set[str]) -> dict[Path, str]:
    """List the merges that no request plans any more, but for the one with the fixed name.

    A record comes before its data, so that what is deleted in this order is never damaged.
    """
    reasons: dict[Path, str] = {}
    for stage in run.aliases:
        alias = run.alias_path(stage)
        for key, record in scan.records.items():
            is_old = key.startswith(f"{stage}/") and key not in planned
            if alias and is_old and not stands_for(alias, record.data):
                paths = [run.record_path(key), record.data]
                reasons |= dict.fromkeys(paths, "merge of an earlier request")
    return reasons


def _unneeded_in(arm: Path, prefix: str, scan: Scan, finished: Set[str]) -> dict[Path, str]:
    """List the paths of one arm that may be deleted.

    If a record is damaged, nobody knows which data it published, so all that has the name of its
    shard is kept.
    """
    reasons: dict[Path, str] = {}
    paths = sorted(arm.iterdir())
    record_paths = {path for path in paths if path.suffix == ".json" and path.name[0] != "."}
    records = {path.stem: scan.records.get(f"{prefix}/{path.stem}") for path in record_paths}
    published = {record.data for record in records.values() if record}
    kept = tuple(
        f"{name}."
        for name, record in records.items()
        if record is None or not record.data_name.startswith(f"{name}.")
    )
    for path in paths:
        if path in record_paths or path in published:
            continue
        if path.name.removeprefix(".").startswith(kept):
            continue
        if path.suffix == ".checkpoints":
            if f"{prefix}/{path.stem}" in finished:
                checkpoints = sorted(_passing_checkpoints(path))
                reasons |= dict.fromkeys(checkpoints, "checkpoint of a finished training")
        elif ".json.damaged-" in path.name:
            reasons[path] = "damaged record that was put aside"
        else:
            reasons[path] = "data of an attempt that did not publish it"
    return reasons


def _passing_checkpoints(scratch: Path) -> Iterator[Path]:
    """Yield what a finished training left, but for its log and the checkpoints kept for good."""
    for path in scratch.iterdir():
        kept = _kept_for_good(path)
        if kept:
            yield from (inner for inner in path.iterdir() if not inner.name.startswith(kept))
        elif path.suffix != ".jsonl":
            yield path


def _kept_for_good(folder: Path) -> tuple[str, ...]:
    """Return how the names begin of all files of checkpoints that are, or may be, kept for good."""
    kept: list[str] = []
    for path in folder.glob("*.json"):
        try:
            record = read_once(path)
            if record.get("for_good"):
                kept += path.name, record["data"]
        except DamagedError:  # it cannot say whether it is kept for good
            kept.append(f"{path.stem}.")
    return tuple(kept)
