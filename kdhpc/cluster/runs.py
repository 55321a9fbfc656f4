"""Open a run: from a config to a folder that a request stands in, with code that will not change.

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

from kdhpc import compose
from kdhpc.artifacts import RunFolder, Scan, disk_errors, open_run, read_once, write_once
from kdhpc.cluster import ledger as ledgers
from kdhpc.cluster.ledger import Request
from kdhpc.cluster.task import load_pipeline
from kdhpc.config import RunConfig, checked
from kdhpc.errors import BusyError, DamagedError, InputError
from kdhpc.shards import Pipeline, Plan

PROJECT_DIR = Path(compose.__file__).resolve().parents[1]
PIPELINE_ERRORS = (KeyError, ImportError, AttributeError, TypeError, ValueError)
"""What `load_pipeline` raises for a name that is none."""
SNAPSHOT = ("kdhpc", "configs", "slurm")


def from_words(words: list[str]) -> tuple[Pipeline, RunConfig]:
    """Pipeline and checked config from what was typed.

    Raises:
        InputError: for anything that cannot be.
    """
    if all("=" in word and not word.startswith("pipeline=") for word in words):
        words = ["demo", *words]
    values = compose.compose(words)
    name = str(values.get("pipeline", "language"))
    try:
        pipeline = load_pipeline(name)
        if not isinstance(pipeline, Pipeline):
            raise TypeError(name)
    except PIPELINE_ERRORS as error:
        raise InputError(
            f"pipeline={name}: no such pipeline; expected language or mixture"
        ) from error
    config: RunConfig = checked(compose.build(pipeline.config, values))
    names = [stage.name for stage in pipeline.stages]
    for key in ("slurm.stages", "throughput"):
        owner: Any = config.slurm.stages if key == "slurm.stages" else getattr(config, key, {})
        for stage in owner:
            if stage not in names:
                raise InputError(f"{key}.{stage}: no such stage; expected {', '.join(names)}")
    return pipeline, config


def folder(path: Path, pipeline: Pipeline | None = None) -> RunFolder:
    """An existing run folder.

    Raises:
        InputError: if it is none.
    """
    if pipeline is None:
        run = open_run(path, _NO_PIPELINE)
        with contextlib.suppress(DamagedError, *PIPELINE_ERRORS):
            return open_run(path, load_pipeline(_manifest(run.path)["pipeline"]))
        raise InputError(f"{path}/run.json: not readable; expected what sweep.py wrote")
    return open_run(path, pipeline)


_NO_PIPELINE = Pipeline(name="", config=RunConfig, stages=())


def _manifest(path: Path) -> dict[str, Any]:
    return read_once(path / "run.json")


def find(name: str, runs_dir: str = "runs") -> RunFolder:
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
    return folder(path.resolve())


def current(run: RunFolder) -> tuple[int, RunConfig, Plan]:
    """Number of the last request, its config and plan.

    Raises:
        InputError: if nothing was ever asked for.
    """
    ledger = ledgers.Ledger(run.path)
    requests = ledger.requests() if (run.path / "requests").is_dir() else []
    if not requests:
        raise InputError(f"{run.path}: a run without a request; run sweep.py again")
    config: Any = compose.build(run.pipeline.config, dict(requests[-1].config))
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
        found = compose.difference(dict(record.fields), json.loads(json.dumps(shard.arm.fields)))
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


def open_for(pipeline: Pipeline, config: RunConfig, plan: Plan) -> RunFolder:
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
                "pipeline": config.pipeline,
                "identity": secrets.token_hex(2),
                "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            write_once(path / "run.json", manifest)
    run = open_run(path, pipeline)
    check_unchanged(run, config, plan)
    return run


def check_unchanged(run: RunFolder, config: RunConfig, plan: Plan) -> None:
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
    run: RunFolder,
    config: RunConfig,
    *,
    kind: str,
    executor: str,
    stage: str | None = None,
    keys: tuple[str, ...] | None = None,
    resources: Mapping[str, Any] | None = None,
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
                config=compose.plain(config),
                code=code,
                executor=executor,
                stage=stage,
                keys=keys,
                resources=dict(resources or {}),
            )
            if ledger.add_request(request):
                return request


def snapshot(run: RunFolder) -> str:
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


def _sources(run: RunFolder) -> dict[str, Path]:
    """Files of a snapshot by relative name; for a pipeline from elsewhere, its module too."""
    wanted = {".py", ".cpp", ".yaml", ".sh"}
    files = [
        path
        for name in SNAPSHOT
        for path in sorted((PROJECT_DIR / name).rglob("*"))
        if path.suffix in wanted and path.is_file()
    ]
    sources = {str(path.relative_to(PROJECT_DIR)): path for path in files}
    module_name = _manifest(run.path)["pipeline"].partition(":")[0]
    module = sys.modules.get(module_name)
    if module is not None and module.__file__ and not module_name.startswith("kdhpc"):
        sources[module_name.replace(".", "/") + ".py"] = Path(module.__file__)
    return sources


@contextlib.contextmanager
def launcher_lock(run: RunFolder) -> Iterator[None]:
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


def is_locked(run: RunFolder) -> bool:
    """Whether a local launcher is working on the run now."""
    try:
        with (run.path / "launcher.lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
