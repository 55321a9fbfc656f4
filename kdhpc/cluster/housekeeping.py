"""Find what may be deleted from a run folder."""

from pathlib import Path

from kdhpc.storage.run_folder import RunFolder, Scan


def unneeded(run: RunFolder, scan: Scan, *, complete: bool) -> dict[Path, str]:
    """List the paths that may be deleted while nothing runs.

    Args:
        run: the run folder.
        scan: its records.
        complete: whether the run is complete, so that its logs may be deleted too.

    Returns:
        Why each path is not needed, by path.
    """
    reasons: dict[Path, str] = {}
    data = {record.data for record in scan.records.values()}
    records = {run.record_path(key) for key in (*scan.records, *scan.damaged)}
    for stage in run.folders:
        for arm in sorted(run.stage_dir(stage).glob("*/")):
            for path in sorted(arm.iterdir()):
                if path in data or path in records:
                    continue
                if path.suffix == ".checkpoints":
                    key = f"{stage}/{arm.name}/{path.stem}"
                    if key in scan.records:
                        reasons |= {
                            inner: "checkpoint of a finished training"
                            for inner in sorted(path.iterdir())
                            if inner.suffix != ".jsonl"
                        }
                elif ".json.damaged-" in path.name:
                    reasons[path] = "damaged record that was put aside"
                else:
                    reasons[path] = "data of an attempt that did not publish it"
    reasons |= dict.fromkeys(sorted((run.path / "progress").iterdir()), "progress of a task")
    if complete:
        reasons |= dict.fromkeys(sorted((run.path / "logs").iterdir()), "logs")
    return reasons


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return path.stat().st_size
