"""What a run folder holds that nobody needs."""

from pathlib import Path

from kdhpc.storage.run_folder import RunFolder, Scan


def unneeded(run: RunFolder, scan: Scan, *, complete: bool) -> dict[Path, str]:
    """Paths that may be deleted while nothing runs, and why."""
    found: dict[Path, str] = {}
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
                        found |= {
                            inner: "checkpoint of a finished training"
                            for inner in sorted(path.iterdir())
                            if inner.suffix != ".jsonl"
                        }
                elif ".json.damaged-" in path.name:
                    found[path] = "damaged record, made again since"
                else:
                    found[path] = "data of an attempt that did not publish it"
    found |= dict.fromkeys(sorted((run.path / "progress").iterdir()), "progress of a task")
    if complete:
        found |= dict.fromkeys(sorted((run.path / "logs").iterdir()), "logs")
    return found


def bytes_of(path: Path) -> int:
    """Bytes of a file or of all files below a folder."""
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return path.stat().st_size
