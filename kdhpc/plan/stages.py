"""Stages and pipelines: what the batch system runs, and all that it needs to know of it.

A `Pipeline` is a tuple of stages; planning it gives every shard of every stage. Whatever only some
pipelines have (checks, inputs to fetch, estimates, a line of progress, a partial merge) is an
optional function of `Pipeline` or `Stage`.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from kdhpc.config.bounds import out_of_bounds, refuse
from kdhpc.config.run import RunConfig, check_run
from kdhpc.errors import InputError
from kdhpc.plan.shards import Plan, Shard

if TYPE_CHECKING:
    from kdhpc.storage.work import Work, Written

HOME = "kdhpc.pipeline"
"""Module whose `PIPELINES` are found by a bare name."""
C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[C]):
    """One step of a pipeline."""

    name: str
    """Part of folder names, job names and keys: letters, digits and hyphens."""
    reads: str
    """What it reads, for people."""
    writes: str
    """What it writes, for people: shapes, dtypes, units."""
    unit: str
    """Unit of `Shard.work`, such as tokens."""
    plan: Callable[[C, Plan], Iterable[Shard]]
    """Makes its shards from the config and the plan of the earlier stages. Pure, no disk access."""
    run: "Callable[[Shard, Work[C]], Written | None]"
    """Does one shard; heavy imports belong inside. Returns None when told to stop, and on ranks
    above 0."""
    rate: Callable[[C], float] = lambda config: 1.0
    """Estimates the work that one rank does in a second; measured seconds replace it."""
    progress: Callable[[Path], str] = lambda scratch: ""
    """Describes a running shard in a few words for status.py, from the shard's scratch folder."""
    uses_device: bool = True
    """Whether its tasks ask for the GPUs of the cluster config."""
    modules: tuple[str, ...] = ()
    """Modules that `run` imports and that take seconds: an idle local worker loads them ahead."""
    alias: str | None = None
    """A fixed file name in the stage's folder for the newest output, replaced whole."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Generic[C]):
    """A named tuple of stages and the config class that they plan from."""

    name: str
    """For people."""
    config: type[C]
    """A frozen dataclass that extends `RunConfig`; YAML and typed words are merged into it."""
    stages: tuple[Stage[C], ...]
    """In order: a stage plans from those before it."""
    check: Callable[[C], Iterable[str]] = lambda config: ()
    """Yields what is wrong with the values of a config, one line each: key, value, what was
    expected. Pure."""
    prepare: Callable[[C], C] = lambda config: config
    """Finds, fetches and checks on the login node what the run starts from, and returns the config
    with its identity filled in. Raises `InputError`."""
    estimate: Callable[[C], Iterable[str]] = lambda config: ()
    """Yields lines for --dry-run, such as what fits into memory. Pure."""
    merge_partial: "Callable[[Work[C], frozenset[str], Path], None] | None" = None
    """Merges into a file what the shards of these keys have so far, for `rerun.py --partial`."""

    def plan(self, config: C) -> Plan:
        """Plan every stage, each from the config and the shards planned before it."""
        plan = Plan()
        for stage in self.stages:
            plan.add(stage.plan(config, plan))
        return plan

    def checked(self, config: C) -> C:
        """The same config if every value is possible.

        Raises:
            InputError: naming the key, its value, what is expected.
        """
        check_run(config)
        for stage in config.slurm.stages:
            if stage not in self.folders:
                names = ", ".join(self.folders)
                raise InputError(f"slurm.stages.{stage}: no such stage; expected one of {names}")
        refuse(out_of_bounds(config, self.config))
        refuse(self.check(config))
        return config

    def stage(self, name: str) -> Stage[C]:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def folders(self) -> dict[str, str]:
        """By stage name, its numbered folder inside a run, such as `4-sample-teacher`."""
        return {stage.name: f"{i}-{stage.name}" for i, stage in enumerate(self.stages, 1)}

    @property
    def aliases(self) -> dict[str, str]:
        """By stage name, the fixed file name of its newest output, of stages that have one."""
        return {stage.name: stage.alias for stage in self.stages if stage.alias}


AnyPipeline: TypeAlias = Pipeline[Any]
"""A pipeline whose class of config is known to itself alone."""


def find_pipeline(name: str) -> AnyPipeline:
    """A pipeline of kdhpc by its name, or `module:NAME` for one that lives elsewhere.

    Raises:
        InputError: if there is none.
    """
    module, _, attribute = name.rpartition(":")
    try:
        if module:
            found = getattr(importlib.import_module(module), attribute)
        else:
            found = importlib.import_module(HOME).PIPELINES[name]
    except (ImportError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"pipeline={name}: no such pipeline ({' '.join(str(error).split())}); expected one of "
            f"{HOME}, or module:NAME of a Pipeline that Python can import"
        ) from error
    if not isinstance(found, Pipeline):
        raise InputError(f"pipeline={name}: is a {type(found).__name__}; expected a Pipeline")
    return found
