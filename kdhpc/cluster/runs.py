"""Open a run: turn a config into a run folder with a request and a snapshot of the code.

A run is opened again with another config unless a published record's recipe would change.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdhpc.cluster import ledger as ledgers
from kdhpc.cluster import places
from kdhpc.cluster.ledger import Request
from kdhpc.config import presets
from kdhpc.config.run import RunConfig
from kdhpc.errors import BusyError, DamagedError, InputError
from kdhpc.plan.shards import Plan
from kdhpc.plan.stages import AnyPipeline, find_pipeline
from kdhpc.project import files_of
from kdhpc.storage.files import disk_errors, read_once, write_once
from kdhpc.storage.run_folder import ARCHIVE, RunFolder, Scan, check_run_folder
from kdhpc.types import Json

SNAPSHOT = ("kdhpc", "configs", "slurm")
"""Folders of the project that are copied into a run."""
FORMAT = 1
"""Format number of run folders. Every commit reads, extends, verifies and merges the runs of this
format that earlier commits made; a change that cannot keep this raises the number and says what to
do with older runs."""


class Run(RunFolder):
    """A run folder and its pipeline."""

    def __init__(self, path: Path, pipeline: AnyPipeline) -> None:
        super().__init__(path, pipeline.folders, pipeline.aliases, pipeline.links)
        self.pipeline = pipeline


def from_words(words: list[str]) -> tuple[AnyPipeline, RunConfig]:
    """Turn the words of a command line into a pipeline and its checked config.

    Raises:
        InputError: for an unknown preset or key, or a value that is not allowed.
    """
    if all("=" in word and not word.startswith("pipeline=") for word in words):
        words = ["demo", *words]
    values = presets.compose(words)
    if "pipeline" not in values:
        raise InputError("pipeline: nothing is given; expected a preset, or pipeline=NAME")
    pipeline = find_pipeline(str(values["pipeline"]))
    return pipeline, pipeline.checked(presets.build(pipeline.config, values))


def open_run(path: Path) -> Run:
    """Open an existing run.

    Raises:
        InputError: if the folder is not a run, or its format is another one.
    """
    return Run(path, find_pipeline(_manifest(path)["pipeline"]))


def _manifest(path: Path) -> dict[str, Json]:
    """Read run.json, and check that this version can read the run."""
    check_run_folder(path)
    try:
        manifest = read_once(path / "run.json")
    except DamagedError as error:
        raise InputError(f"{path}: this run cannot be read ({error})") from error
    number = manifest.get("format", 0)
    if number != FORMAT:
        raise InputError(
            f"{path}: this run has format {number}, from another version of kdhpc; expected "
            f"format {FORMAT}; use the version that made it, or choose another name"
        )
    return manifest


def find(name: str, runs_dir: str | None = None) -> Run:
    """Open a run by its name or its path, as `places.locate` finds it.

    Raises:
        InputError: if there is no such run, or runs in several places have this name.
    """
    return open_run(places.locate(name, runs_dir))


def check_not_restored(run: Run, so: str) -> None:
    """Refuse what a run that was restored from an archive cannot do.

    Args:
        run: the run.
        so: what follows from that, and what to do.

    Raises:
        InputError: if it was restored.
    """
    if run.is_restored:
        raise InputError(
            f"{run.path}: was restored from an archive, which has the data of only some shards, "
            f"so {so}"
        )


def current(run: Run) -> tuple[int, RunConfig, Plan]:
    """Return the number of the last request, its config and its plan.

    Raises:
        InputError: if the run has no request.
    """
    ledger = ledgers.Ledger(run.path)
    requests = ledger.requests() if (run.path / "requests").is_dir() else []
    if not requests:
        raise InputError(f"{run.path}: this run has no request; run sweep.py again")
    config: Any = presets.build(run.pipeline.config, dict(requests[-1].config))
    return requests[-1].number, config, run.pipeline.plan(config)


def pick_executor(config: RunConfig, slurm_here: bool) -> str:
    """Choose the executor, `local` or `slurm`.

    Args:
        config: config of the run.
        slurm_here: whether Slurm works on this machine.

    Raises:
        InputError: if Slurm is asked for and does not work here, or the run is too large to start
            here by default.
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
            "machine by default; load Slurm's module, or use cluster=local"
        )
    return "local"


def changed_recipes(plan: Plan, scan: Scan) -> list[str]:
    """List, field by field, what a new plan would change in the recipes of published records."""
    arms_of: dict[tuple[str, str], set[str]] = {}
    for key, record in scan.records.items():
        shard = plan.shards.get(key)
        if shard is None or shard.recipe == record.recipe:
            continue
        changes = presets.difference(dict(record.fields), json.loads(json.dumps(shard.arm.fields)))
        if shard.row_range != record.row_range:
            changes.append(f"rows of {key}: {record.row_range} -> {shard.row_range}")
        if not changes:  # an input changed whose own record is missing, so it is not listed itself
            changes = [
                f"made from another {role}"
                for role, recipe in shard.arm.inputs.items()
                if record.inputs.get(role) != recipe
            ] or ["recipe"]
        for line in changes:
            arms_of.setdefault((shard.stage, line), set()).add(shard.arm.name)
    lines = []
    for (stage, line), names in arms_of.items():
        one_of_many = len(names) == 1 and len(plan.arms(stage)) > 1
        lines.append(f"{stage}{'/' + min(names) if one_of_many else ''}: {line}")
    return lines


def done_already(run: Run, plan: Plan) -> frozenset[str]:
    """Return the keys of planned shards that are published as they are planned."""
    records = run.scan().records
    shards = plan.shards.items()
    return frozenset(k for k, s in shards if k in records and records[k].recipe == s.recipe)


def open_for(config: RunConfig, plan: Plan) -> Run:
    """Create the run's folder, or open it and check that no published recipe would change.

    Raises:
        InputError: if a recipe would change, field by field; if the path is not a folder, or is a
            run of another pipeline.
        DamagedError: if the folder cannot be written.
    """
    path = _place(config)
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
    if (pipeline := _manifest(path)["pipeline"]) != config.pipeline:
        raise InputError(
            f"{path}: is a run of the pipeline {pipeline}, not of {config.pipeline}; choose "
            f"another name, such as name={config.name}-2"
        )
    run = open_run(path)
    check_not_restored(
        run, f"it makes no more shards; choose another name, such as name={config.name}-2"
    )
    check_unchanged(run, config, plan)
    run.make_lost_links()
    places.note(path)
    return run


def _place(config: RunConfig) -> Path:
    """Return the absolute path of the run's folder."""
    return (Path(config.runs_dir) / config.name).expanduser().resolve()


def check_executor(run: Run, config: RunConfig, executor: str) -> None:
    """Refuse to go on in local processes with a run that was started on Slurm, unless asked to.

    Raises:
        InputError: if nobody asked for it; the message says what to type.
    """
    requests = ledgers.Ledger(run.path).requests()
    was_on_slurm = bool(requests) and requests[-1].executor == "slurm"
    if was_on_slurm and executor == "local" and config.executor == "auto":
        raise InputError(
            f"{run.path}: runs on Slurm, which does not answer here; type the same when it does, "
            "or cluster=local to go on in processes of this machine"
        )


def check_place(config: RunConfig) -> None:
    """Refuse to work in runs/ while a run of this name is elsewhere.

    Somebody who types a preset again without `cluster=` does not mean a second run in the default
    place. With `runs_dir=` typed, or in the cluster's YAML, the place is meant.

    Raises:
        InputError: if such a run exists; the message says what to type.
    """
    here = _place(config)
    others = [
        path
        for path in places.named(config.name)
        if path != here and not (path / ARCHIVE).exists()  # a restored run cannot be gone on with
    ]
    if config.runs_dir != places.DEFAULT_DIR or not others:
        return
    requests = ledgers.Ledger(others[0]).requests()
    cluster = requests[-1].config["cluster"] if requests else "auto"
    words = [f"cluster={cluster}"] if cluster not in {"auto", config.cluster} else []
    words.append(shlex.quote(f"runs_dir={others[0].parent}"))
    raise InputError(
        f"name={config.name}: a run of this name is in {others[0]}; type {' '.join(words)} to go "
        f"on with it, or runs_dir={places.DEFAULT_DIR} if you mean {here}"
    )


def check_unchanged(run: Run, config: RunConfig, plan: Plan) -> None:
    """Refuse a plan that would change the recipe of a published record.

    Raises:
        InputError: if it would; the message lists the first six differences.
    """
    changed = changed_recipes(plan, run.scan())
    if changed:
        raise InputError(
            f"{run.path}: published results were made with other settings: "
            f"{'; '.join(changed[:6])}; use those settings, or choose another name, "
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
    """Write a request, after a snapshot of the code that will do it; a cancel needs none."""
    with disk_errors(run.path):
        ledger = ledgers.make(run.path)
        code = ledger.requests()[-1].code if kind == "cancel" else snapshot(run)
        if kind != "cancel":
            run.make_lost_links()
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
    """Copy kdhpc, configs and slurm/ into the run, once for each digest of their content.

    Returns:
        The digest, the first 12 hexadecimal digits of a sha256: the name of the copy.
    """
    sources = _sources(run)
    content = hashlib.sha256()
    for name, path in sources.items():
        content.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    digest = content.hexdigest()[:12]
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
    """Find the files of a snapshot by relative name, with the package of a foreign pipeline."""
    suffixes = {".py", ".cpp", ".yaml", ".sh"}
    sources = {
        relative: path
        for name in SNAPSHOT
        for relative, path in files_of(name)
        if path.suffix in suffixes
    }
    module_name = _manifest(run.path)["pipeline"].rpartition(":")[0]
    if module_name and module_name.partition(".")[0] != "kdhpc":
        sources |= _module_sources(module_name.partition(".")[0])
    return sources


def _module_sources(name: str) -> dict[str, Path]:
    """Find the files of an imported top-level module or package, by relative name."""
    module = sys.modules[name]
    if not hasattr(module, "__path__"):
        return {f"{name}.py": Path(str(module.__file__))}
    if module.__file__ is None:
        raise InputError(
            f"pipeline: the package {name} has no __init__.py, so its files are not known; "
            "expected a module, or a package that has one"
        )
    folder = Path(module.__file__).parent
    return {
        str(path.relative_to(folder.parent)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@contextlib.contextmanager
def launcher_lock(run: Run) -> Iterator[None]:
    """Allow only one local launcher for a run; the lock ends with its process.

    Raises:
        BusyError: if another process holds the lock.
        InputError: if the file system has no locks.
    """
    with disk_errors(run.path), (run.path / "launcher.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BusyError(
                f"{run.path}: process {file.read().strip() or '?'} is working on this run; "
                "watch it with status.py"
            ) from error
        except OSError as error:
            raise InputError(
                f"{run.path}: its file system has no locks ({error.strerror}), which a run in "
                "processes of this machine needs; choose a runs_dir on another one"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_locked(run: Run) -> bool:
    """Return whether a local launcher is working on the run now."""
    try:
        with (run.path / "launcher.lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or its file system has none
        return False
