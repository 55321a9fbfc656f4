"""The unit of work: what a stage plans, what a task runs, what a record publishes.

A `Pipeline` is a tuple of stages; planning it gives a `Plan`: every shard of every stage, in order,
each with its recipe. Nothing here touches a disk.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdhpc.artifacts import Work, Written

Json = Any  # a number, string, bool, None, list or dict of these
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Json) -> str:
    """sha256 over the canonical JSON of `value`, as 64 hexadecimal digits."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One series of shards with one meaning: the samples of one model, the training of another.

    Its recipe is the digest of all that determines its content. How many shards it is cut into does
    not belong to it.
    """

    stage: str
    name: str
    fields: Mapping[str, Json]
    """The scientific settings that determine the content."""
    inputs: Mapping[str, str]
    """Recipes of what is read, by role."""
    nodes: int = 1
    ranks_per_node: int = 1

    @cached_property
    def recipe(self) -> str:
        return digest({"fields": self.fields, "inputs": self.inputs, "stage": self.stage})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One unit of work and its output; the unit of loss."""

    arm: Arm
    name: str
    """File name of its record, without `.json`."""
    rows: tuple[int, int] | None = None
    """First and one past the last sequence, for arms that are cut by sequence."""
    reads: tuple[str, ...] = ()
    """Keys of the shards whose records must exist before this one may start."""
    work: float = 1.0
    """Amount of work of each rank in the unit of its stage, for estimates and packing."""
    num_bytes: float = 0.0
    """Expected size of the output."""

    @property
    def stage(self) -> str:
        return self.arm.stage

    @cached_property
    def key(self) -> str:
        """`stage/arm/name`, unique in a plan and stable for ever."""
        return f"{self.arm.stage}/{self.arm.name}/{self.name}"

    @cached_property
    def recipe(self) -> str:
        return digest([self.arm.recipe, self.rows])

    @property
    def num_rows(self) -> int:
        return 1 if self.rows is None else self.rows[1] - self.rows[0]


def cut(num_rows: int, rows_per_shard: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and row ranges of the shards of an arm of `num_rows` rows.

    A last shard that is not full carries its size in its name, so that an arm that grows later gets
    a new shard beside it and no published record changes.
    """
    for index, start in enumerate(range(0, num_rows, rows_per_shard)):
        stop = min(start + rows_per_shard, num_rows)
        full = stop - start == rows_per_shard
        yield (f"{index:05d}" if full else f"{index:05d}-{stop - start}"), (start, stop)


def merge_of(
    shards: Sequence[Shard],
    *,
    stage: str,
    fields: Mapping[str, Json],
    rows: int,
    bytes_per_row: float,
) -> Shard:
    """The shard that merges others, named after its recipe.

    A run that grew is merged again beside the old merge.
    """
    inputs = {shard.key: shard.recipe for shard in shards}
    arm = Arm(stage=stage, name="results", fields=fields, inputs=inputs)
    return Shard(
        arm=arm,
        name=arm.recipe[:12],
        reads=tuple(inputs),
        work=rows,
        num_bytes=bytes_per_row * rows,
    )


class Plan:
    """All shards of a run, in pipeline order."""

    def __init__(self) -> None:
        self.shards: dict[str, Shard] = {}
        self._arms: dict[tuple[str, str], list[Shard]] = {}
        self._stages: dict[str, list[Shard]] = {}

    def add(self, shards: list[Shard]) -> None:
        for shard in shards:
            if shard.key in self.shards:
                raise ValueError(f"two shards are called {shard.key}")
            self.shards[shard.key] = shard
            self._arms.setdefault((shard.stage, shard.arm.name), []).append(shard)
            self._stages.setdefault(shard.stage, []).append(shard)

    def arm(self, stage: str, name: str) -> list[Shard]:
        """Shards of one arm, in order; never empty.

        Raises:
            KeyError: when no such arm is planned.
        """
        return self._arms[stage, name]

    def arms(self, stage: str) -> dict[str, list[Shard]]:
        return {name: shards for (s, name), shards in self._arms.items() if s == stage}

    def stage(self, stage: str) -> list[Shard]:
        """Shards of one stage, in order."""
        return self._stages.get(stage, [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a pipeline; a module in `kdhpc.stages` makes each."""

    name: str
    reads: str
    """What it reads, for people."""
    writes: str
    """What it writes, for people: shapes, dtypes, units."""
    unit: str
    """Unit of `Shard.work`, such as tokens."""
    plan: Callable[[Any, Plan], list[Shard]]
    """Shards from the config and the plan of the earlier stages; pure, no disk access."""
    run: "Callable[[Shard, Work], Written | None]"
    """Does one shard, heavy imports inside; None when told to stop, and on ranks above 0."""
    rate: Callable[[Any], float] = lambda config: 1.0
    """Work that one rank does in a second, by estimate; measured seconds replace it."""
    uses_device: bool = True
    """Whether its tasks ask for the GPUs of the cluster config."""
    modules: tuple[str, ...] = ()
    """What `run` imports that takes seconds: a local worker without a task loads it meanwhile."""
    alias: str | None = None
    """A fixed file name in the stage's folder for the newest output, replaced whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A named tuple of stages and the config class that they plan from."""

    name: str
    config: type
    stages: tuple[Stage, ...]

    def plan(self, config: object) -> Plan:
        """Plan every stage, each from the config and the shards planned before it."""
        plan = Plan()
        for stage in self.stages:
            plan.add(stage.plan(config, plan))
        return plan

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def folder(self, stage_name: str) -> str:
        """Numbered folder of a stage inside a run, such as `4-sample-teacher`."""
        number = [stage.name for stage in self.stages].index(stage_name) + 1
        return f"{number}-{stage_name}"
