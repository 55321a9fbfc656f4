"""Stages and pipelines: everything that the batch system knows about what it runs.

A `Pipeline` is a tuple of stages; planning it gives every shard of every stage. What only some
pipelines need (checks, inputs to fetch, estimates, a line of progress, a partial merge) is an
optional function of `Pipeline` or `Stage`.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from kdhpc.config.bounds import out_of_bounds, refuse
from kdhpc.config.run import RunConfig, check_run
from kdhpc.errors import InputError
from kdhpc.plan.shards import Plan, Shard

if TYPE_CHECKING:
    from kdhpc.storage.work import Work, Written

HOME = "kdhpc.pipeline"
"""Module whose `PIPELINES` can be named without their module."""
C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[C]):
    """One step of a pipeline."""

    name: str
    """Name of the stage, which is part of folder names, job names and keys. It consists of
    letters, digits and hyphens."""
    reads: str
    """Description of the inputs, for people."""
    writes: str
    """Description of the outputs with shapes, dtypes and units, for people."""
    plan: Callable[[C, Plan], Iterable[Shard]]
    """Makes the shards of the stage from the config and the plan of the earlier stages. It must be
    pure and must not access the disk."""
    run: "Callable[[Shard, Work[C]], Written | None]"
    """Computes one shard. Heavy imports belong inside the function. It returns None if it was told
    to stop, and on every rank above 0."""
    progress: Callable[[Path], str] = lambda scratch: ""
    """Describes a running shard in a few words for status.py, from the shard's scratch folder."""
    uses_device: bool = True
    """Whether tasks of the stage request the GPUs of the cluster config."""
    modules: tuple[str, ...] = ()
    """Modules that `run` imports and that load slowly; an idle local worker loads them early."""
    beside: bool = False
    """Whether the stage has the number of the stage before it, in folder names. A stage that is
    added to a pipeline later has this, so that the folders of existing runs keep their names."""
    alias: str | None = None
    """Fixed file name in the stage's folder for the newest output; the file is replaced as a
    whole."""
    links: str | None = None
    """Folder of the run, such as `models`, in which the output of each arm, which has one shard,
    has a symbolic link under the arm's name. It is for people; nothing depends on it."""
    archived: Callable[[C, Shard], str] | None = None
    """Returns which part of a shard's output `runs.py archive` keeps, beside all records: `*` for
    all of it, a pattern such as `*.json` for those files of a folder, or an empty text for none.
    It is pure. By default the output of the pipeline's last stage is kept."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Generic[C]):
    """A named tuple of stages and the class of config that they are planned from."""

    name: str
    """Name of the pipeline, for people."""
    config: type[C]
    """Frozen dataclass that extends `RunConfig`; presets and overrides are merged into it."""
    stages: tuple[Stage[C], ...]
    """Stages in order; each is planned from those before it."""
    check: Callable[[C], Iterable[str]] = lambda config: ()
    """Yields one line for everything that is wrong with the values of a config: key, value and
    what was expected. It must be pure."""
    prepare: Callable[[C], C] = lambda config: config
    """Finds, fetches and checks the inputs of the run on the login node, and returns the config
    with their identity filled in. It raises `InputError` if something is missing or does not
    fit."""
    estimate: Callable[[C], Iterable[str]] = lambda config: ()
    """Yields lines for --dry-run, such as which batch fits into memory. It must be pure."""
    merge_partial: "Callable[[Work[C], frozenset[str], Path], None] | None" = None
    """Merges the outputs of shards with the given keys into a file, for `rerun.py --partial`."""

    def plan(self, config: C) -> Plan:
        """Plan every stage, each from the config and the shards of the stages before it.

        Raises:
            InputError: if the config plans no shard of the last stage that it asks for.
        """
        plan = Plan()
        for stage in self.stages:
            plan.add(stage.plan(config, plan))
        if config.until is not None and config.until not in plan.stages:
            names = ", ".join(plan.stages)
            raise InputError(
                f"until={config.until}: this run has no such stage; expected one of {names}"
            )
        return plan

    def checked(self, config: C) -> C:
        """Return the same config after checking every value.

        Raises:
            InputError: if a value is not possible; names the key, its value and what was expected.
        """
        check_run(config)
        stages = {f"slurm.stages.{stage}": stage for stage in config.slurm.stages}
        if config.until is not None:
            stages[f"until={config.until}"] = config.until
        for key, stage in stages.items():
            # A cluster's file serves all pipelines.
            if stage not in self.folders and (key.startswith("until") or stage not in _known()):
                names = ", ".join(self.folders)
                raise InputError(f"{key}: no such stage; expected one of {names}")
        refuse(out_of_bounds(config, self.config))
        refuse(self.check(config))
        return config

    def stage(self, name: str) -> Stage[C]:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def folders(self) -> dict[str, str]:
        """Numbered folder of each stage inside a run, such as `4-sample-teacher`, by stage name."""
        numbers = accumulate(0 if stage.beside else 1 for stage in self.stages)
        return {
            stage.name: f"{number}-{stage.name}"
            for number, stage in zip(numbers, self.stages, strict=True)
        }

    @property
    def aliases(self) -> dict[str, str]:
        """Fixed file name of the newest output of each stage that has one, by stage name."""
        return {stage.name: stage.alias for stage in self.stages if stage.alias}

    @property
    def links(self) -> dict[str, str]:
        """Folder of the links to the output of each stage that has them, by stage name."""
        return {stage.name: stage.links for stage in self.stages if stage.links}

    def archived(self, config: C, shard: Shard) -> str:
        """Return which part of a shard's output an archive keeps, as `Stage.archived` says it."""
        stage = self.stage(shard.stage)
        if stage.archived is not None:
            return stage.archived(config, shard)
        return "*" if stage is self.stages[-1] else ""


AnyPipeline: TypeAlias = Pipeline[Any]
"""A pipeline whose class of config its user does not need to know."""


def _known() -> set[str]:
    """Return the names of all stages of kdhpc's own pipelines; they may be absent."""
    try:
        pipelines = importlib.import_module(HOME).PIPELINES.values()
    except ImportError:
        return set()
    return {stage.name for pipeline in pipelines for stage in pipeline.stages}


def find_pipeline(name: str) -> AnyPipeline:
    """Find a pipeline of kdhpc by its name, or one in another module by `module:NAME`.

    Raises:
        InputError: if there is no such pipeline.
    """
    module, _, attribute = name.rpartition(":")
    try:
        if module:
            pipeline = getattr(importlib.import_module(module), attribute)
        else:
            pipeline = importlib.import_module(HOME).PIPELINES[name]
    except (ImportError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"pipeline={name}: no such pipeline ({' '.join(str(error).split())}); expected "
            f"{_expected()}"
        ) from error
    if not isinstance(pipeline, Pipeline):
        raise InputError(f"pipeline={name}: is a {type(pipeline).__name__}; expected a Pipeline")
    return pipeline


def _expected() -> str:
    """Return what a pipeline may be called, for an error; kdhpc's own may be absent."""
    try:
        names = list(importlib.import_module(HOME).PIPELINES)
    except ImportError:
        names = []
    return " or ".join([*names, "module:NAME of a Pipeline that Python can import"])
