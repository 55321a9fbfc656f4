"""Open a run: from a config to a folder with a request in it and code that will not change.

Relaunching with another config is refused only if a published record's recipe would change.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdhpc.cluster import ledger as ledgers
from kdhpc.cluster.ledger import Request
from kdhpc.config import presets
from kdhpc.config.run import RunConfig
from kdhpc.errors import BusyError, DamagedError, InputError
from kdhpc.plan.shards import Plan
from kdhpc.plan.stages import AnyPipeline, find_pipeline
from kdhpc.storage.files import disk_errors, read_once, write_once
from kdhpc.storage.run_folder import RunFolder, Scan, check_run_folder
from kdhpc.types import Json

PROJECT_DIR = Path(presets.__file__).resolve().parents[2]
SNAPSHOT = ("kdhpc", "configs", "slurm")
FORMAT = 1
"""Of run folders. Every commit reads, extends, verifies and merges the runs of this format that any
earlier commit made; a change that cannot keep this raises the number and says what to do."""


class Run(RunFolder):
    """A run folder and the pipeline that it is a run of."""

    def __init__(self, path: Path, pipeline: AnyPipeline) -> None:
        super().__init__(path, pipeline.folders, pipeline.aliases)
        self.pipeline = pipeline


def from_words(words: list[str]) -> tuple[AnyPipeline, RunConfig]:
    """Pipeline and checked config from what was typed.

    Raises:
        InputError: for anything that cannot be.
    """
    if all("=" in word and not word.startswith("pipeline=") for word in words):
        words = ["demo", *words]
    values = presets.compose(words)
    if "pipeline" not in values:
        raise InputError("pipeline: nothing is given; expected a preset, or pipeline=NAME")
    pipeline = find_pipeline(str(values["pipeline"]))
    return pipeline, pipeline.checked(presets.build(pipeline.config, values))


def open_run(path: Path) -> Run:
    """An existing run.

    Raises:
        InputError: if it is none, or of another format.
    """
    return Run(path, find_pipeline(_manifest(path)["pipeline"]))


def _manifest(path: Path) -> dict[str, Json]:
    """What run.json says of a run that this version can read."""
    check_run_folder(path)
    try:
        manifest = read_once(path / "run.json")
    except DamagedError as error:
        raise InputError(f"{path}: not a run that can be read ({error})") from error
    number = manifest.get("format", 0)
    if number != FORMAT:
        raise InputError(
            f"{path}: is a run of format {number}, made by another version of kdhpc; expected "
            f"format {FORMAT}; use the version that made it, or choose another name"
        )
    return manifest


def find(name: str, runs_dir: str = "runs") -> Run:
    """A run by its name in the runs folder, or by its path.

    Raises:
        InputError: if there is none.
    """
    path = Path(name)
    if not path.is_dir():
        path = Path(runs_dir) / name
    if not path.is_dir():
        there = sorted(p.parent.name for p in Path(runs_dir).glob("*/run.json"))
        expected = f"one of {', '.join(there)}" if there else "the path of a run"
        raise InputError(f"{name}: no run of this name in {runs_dir}/; expected {expected}")
    return open_run(path.resolve())


def current(run: Run) -> tuple[int, RunConfig, Plan]:
    """Number of the last request, its config and plan.

    Raises:
        InputError: if nothing was ever asked for.
    """
    ledger = ledgers.Ledger(run.path)
    requests = ledger.requests() if (run.path / "requests").is_dir() else []
    if not requests:
        raise InputError(f"{run.path}: a run without a request; run sweep.py again")
    config: Any = presets.build(run.pipeline.config, dict(requests[-1].config))
    return requests[-1].number, config, run.pipeline.plan(config)


def pick_executor(config: RunConfig, slurm_here: bool) -> str:
    """`local` or `slurm`.

    Raises:
        InputError: if Slurm is asked for and not there, or the run is too large to start here.
    """
    if config.executor == "slurm" and not slurm_here:
        raise InputError(
            f"cluster={config.cluster}: no working sbatch here; load Slurm's module, "
            "or use cluster=local"
        )
    if config.executor != "auto":
        return config.executor
    if slurm_here:
        return "slurm"
    if not config.small:
        raise InputError(
            f"{config.name}: no working sbatch here, and this run is too large to start on this "
            "machine by itself; load Slurm's module, or say cluster=local"
        )
    return "local"


def changed_recipes(plan: Plan, scan: Scan) -> list[str]:
    """Field by field, what a new plan would change under published records."""
    lines: dict[str, None] = {}
    for key, record in scan.records.items():
        shard = plan.shards.get(key)
        if shard is None or shard.recipe == record.recipe:
            continue
        found = presets.difference(dict(record.fields), json.loads(json.dumps(shard.arm.fields)))
        if shard.rows != record.row_range:
            found.append(f"rows of {key}: {record.row_range} -> {shard.rows}")
        if not found:  # what it was made from changed, and is not there to say so itself
            found = [
                f"made from another {role}"
                for role, recipe in shard.arm.inputs.items()
                if record.inputs.get(role) != recipe
            ] or ["recipe"]
        for line in found:
            lines.setdefault(f"{shard.stage}: {line}")
    return list(lines)


def open_for(config: RunConfig, plan: Plan) -> Run:
    """Make the run's folder, or open it and check that nothing published would change.

    Raises:
        InputError: for a changed recipe, field by field.
        DamagedError: if the folder cannot be written.
    """
    path = (Path(config.runs_dir) / config.name).expanduser().resolve()
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise InputError(
                f"{part}: is a file; expected a folder (runs_dir={config.runs_dir}, "
                f"name={config.name})"
            )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path / "run.json").exists():
            path.mkdir(mode=0o700, exist_ok=True)
            ledgers.make(path)
            manifest = {
                "format": FORMAT,
                "pipeline": config.pipeline,
                "identity": secrets.token_hex(2),
                "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            write_once(path / "run.json", manifest)
    if (there := _manifest(path)["pipeline"]) != config.pipeline:
        raise InputError(
            f"{path}: is a run of the pipeline {there}, not of {config.pipeline}; choose another "
            f"name, such as name={config.name}-2"
        )
    run = open_run(path)
    check_unchanged(run, config, plan)
    return run


def check_unchanged(run: Run, config: RunConfig, plan: Plan) -> None:
    """Refuse a plan that would change a published record.

    Raises:
        InputError: with every field that differs.
    """
    changed = changed_recipes(plan, run.scan())
    if changed:
        raise InputError(
            f"{run.path}: published results were made with other settings: "
            f"{'; '.join(changed[:6])}; go back to those, or choose another name, "
            f"such as name={config.name}-2"
        )


def add_request(
    run: Run,
    config: RunConfig,
    *,
    kind: str,
    executor: str,
    stage: str | None = None,
    keys: tuple[str, ...] | None = None,
    resources: Mapping[str, Json] | None = None,
) -> Request:
    """Write down what was asked for, with a snapshot of the code that will do it."""
    ledger = ledgers.make(run.path)
    with disk_errors(run.path):
        code = snapshot(run)
        while True:
            request = Request(
                number=max((r.number for r in ledger.requests()), default=0) + 1,
                kind=kind,
                time=time.time(),
                config=presets.plain(config),
                code=code,
                executor=executor,
                stage=stage,
                keys=keys,
                resources=dict(resources or {}),
            )
            if ledger.add_request(request):
                return request


def snapshot(run: Run) -> str:
    """Copy kdhpc, configs and slurm/ once into the run, under the digest of their content."""
    sources = _sources(run)
    found = hashlib.sha256()
    for name, path in sources.items():
        found.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    digest = found.hexdigest()[:12]
    target = run.path / "code" / digest
    if not target.is_dir():
        temporary = run.path / "code" / f".{digest}.{secrets.token_hex(4)}"
        for name, path in sources.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        try:
            temporary.rename(target)
        except OSError:  # another launcher was first
            shutil.rmtree(temporary)
    return digest


def _sources(run: Run) -> dict[str, Path]:
    """Files of a snapshot by relative name; for a pipeline from elsewhere, its package too."""
    wanted = {".py", ".cpp", ".yaml", ".sh"}
    files = [
        path
        for name in SNAPSHOT
        for path in sorted((PROJECT_DIR / name).rglob("*"))
        if path.suffix in wanted and path.is_file()
    ]
    sources = {str(path.relative_to(PROJECT_DIR)): path for path in files}
    module_name = _manifest(run.path)["pipeline"].rpartition(":")[0]
    if module_name and module_name.partition(".")[0] != "kdhpc":
        sources |= _module_sources(module_name.partition(".")[0])
    return sources


def _module_sources(name: str) -> dict[str, Path]:
    """Files of an imported top-level module or package."""
    module = sys.modules[name]
    folder = Path(str(module.__file__)).parent
    files = (
        sorted(folder.rglob("*")) if hasattr(module, "__path__") else [Path(str(module.__file__))]
    )
    top = folder.parent if hasattr(module, "__path__") else folder
    return {
        str(path.relative_to(top)): path
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }


@contextlib.contextmanager
def launcher_lock(run: Run) -> Iterator[None]:
    """One local launcher a run; the lock goes with the process.

    Raises:
        BusyError: if another process holds it.
    """
    with disk_errors(run.path), (run.path / "launcher.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise BusyError(
                f"{run.path}: process {file.read().strip() or '?'} is working on this run; "
                "watch it with status.py"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_locked(run: Run) -> bool:
    """Whether a local launcher is working on the run now."""
    try:
        with (run.path / "launcher.lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
