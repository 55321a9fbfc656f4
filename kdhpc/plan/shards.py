"""The unit of work: what a stage plans, what a task runs, what a record publishes.

An `Arm` is a series of `Shard`s with one meaning; a `Plan` holds every shard of a run, in order,
each with its recipe. Nothing here touches a disk.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

from kdhpc.types import Json

ADDED = {"added": True}
"""`metadata` of a field of settings that was added after the first version of a run format. While
it has its default it is left out of recipes, so that older records keep theirs."""
S = TypeVar("S")
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """Sha256 of the canonical JSON of `value`, as 64 hexadecimal digits."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def fields_of(settings: object) -> dict[str, Json]:
    """Settings, a dataclass, as the fields of an arm; nested ones too."""
    found: dict[str, Json] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]  # a dataclass
        value = getattr(settings, field.name)
        if "added" in field.metadata and value == field.default:
            continue
        found[field.name] = fields_of(value) if dataclasses.is_dataclass(value) else value
    return found


def settings_of(fields: Mapping[str, Json], settings_class: type[S]) -> S:
    """The settings that `fields_of` made fields from; what the fields lack has its default."""
    types = typing.get_type_hints(settings_class)
    values = {
        name: settings_of(value, types[name]) if dataclasses.is_dataclass(types[name]) else value
        for name, value in fields.items()
    }
    return settings_class(**values)


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

    The recipe covers the arms and how many rows they have, not how they are cut into shards. A run
    that has grown is merged again beside the old merge.
    """
    arms = {f"{shard.stage}/{shard.arm.name}": shard.arm for shard in shards}
    num_rows = dict.fromkeys(arms, 0)
    for shard in shards:
        num_rows[f"{shard.stage}/{shard.arm.name}"] += shard.num_rows
    arm = Arm(
        stage=stage,
        name="results",
        fields={**fields, "num_rows": num_rows},
        inputs={name: arm.recipe for name, arm in arms.items()},
    )
    return Shard(
        arm=arm,
        name=arm.recipe[:12],
        reads=tuple(shard.key for shard in shards),
        work=rows,
        num_bytes=bytes_per_row * rows,
    )


class Plan:
    """All shards of a run, in pipeline order."""

    def __init__(self) -> None:
        self.shards: dict[str, Shard] = {}
        self._arms: dict[tuple[str, str], list[Shard]] = {}
        self._stages: dict[str, list[Shard]] = {}

    def add(self, shards: Iterable[Shard]) -> None:
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

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have shards, in pipeline order."""
        return tuple(self._stages)

    def stage(self, stage: str) -> list[Shard]:
        """Shards of one stage, in order."""
        return self._stages.get(stage, [])
