"""Shards, the units of work: a stage plans them, a task runs them, a record publishes them.

An `Arm` is a series of `Shard`s with one meaning. A `Plan` holds every shard of a run in order,
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
"""`metadata` of a settings field that was added after the first version of a run format. A field
with this mark is left out of recipes while it has its default, so that older records keep their
recipes."""
MERGED_BYTES_PER_S = 1e8
"""Estimate of how much is merged in a second: checked, read and written."""
S = TypeVar("S")
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """Return the sha256 of the canonical JSON of `value` as 64 hexadecimal digits."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def fields_of(settings: object) -> dict[str, Json]:
    """Convert settings, a dataclass that may hold others, to the fields of an arm."""
    arm_fields: dict[str, Json] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]  # a dataclass
        value = getattr(settings, field.name)
        if "added" in field.metadata and value == field.default:
            continue
        arm_fields[field.name] = fields_of(value) if dataclasses.is_dataclass(value) else value
    return arm_fields


def settings_of(fields: Mapping[str, Json], settings_class: type[S]) -> S:
    """Convert the fields of an arm back to settings; missing fields take their defaults."""
    types = typing.get_type_hints(settings_class)
    values = {}
    for name, value in fields.items():
        kinds = [types[name], *typing.get_args(types[name])]  # `Shape | None` holds `Shape`
        nested = [k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)]
        values[name] = settings_of(value, nested[0]) if nested and value is not None else value
    return settings_class(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A series of shards with one meaning, such as the samples or the training of one model.

    Its recipe is the digest of everything that determines its content. The number of shards that it
    is cut into is not part of the recipe.
    """

    stage: str
    name: str
    fields: Mapping[str, Json]
    """The scientific settings that determine the content."""
    inputs: Mapping[str, str]
    """Recipes of the inputs, by role."""
    nodes: int = 1
    ranks_per_node: int = 1

    @cached_property
    def recipe(self) -> str:
        return digest({"fields": self.fields, "inputs": self.inputs, "stage": self.stage})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A unit of work and its output; a failure loses at most one shard."""

    arm: Arm
    name: str
    """File name of the shard's record, without `.json`."""
    row_range: tuple[int, int] | None = None
    """Index of the first row and one past the last; None for arms that are not cut by rows."""
    reads: tuple[str, ...] = ()
    """Keys of the shards whose records must exist before this shard may start."""
    work: float = 1.0
    """Estimate of how long each rank works on it, in seconds. Once shards of its stage are done,
    what they took corrects it."""
    num_bytes: float = 0.0
    """Expected size of the output in bytes."""

    @property
    def stage(self) -> str:
        return self.arm.stage

    @cached_property
    def key(self) -> str:
        """The text `stage/arm/name`, which is unique in a plan and never changes."""
        return f"{self.arm.stage}/{self.arm.name}/{self.name}"

    @cached_property
    def recipe(self) -> str:
        return digest([self.arm.recipe, self.row_range])

    @property
    def num_rows(self) -> int:
        return 1 if self.row_range is None else self.row_range[1] - self.row_range[0]


def cut(num_rows: int, rows_per_shard: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield names and row ranges of the shards of an arm of `num_rows` rows.

    If the last shard is not full, its name contains its size. When the arm grows later, the full
    shard gets another name and the published record does not change.
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
    num_rows: int,
    bytes_per_row: float,
) -> Shard:
    """Make the shard that merges other shards; its name is the start of its recipe.

    The recipe covers the arms and their numbers of rows, not how they are cut into shards. When a
    run has grown, it is merged again and the old merge is kept.
    """
    arms = {f"{shard.stage}/{shard.arm.name}": shard.arm for shard in shards}
    rows_of = dict.fromkeys(arms, 0)
    for shard in shards:
        rows_of[f"{shard.stage}/{shard.arm.name}"] += shard.num_rows
    arm = Arm(
        stage=stage,
        name="results",
        fields={**fields, "num_rows": rows_of},
        inputs={name: arm.recipe for name, arm in arms.items()},
    )
    return Shard(
        arm=arm,
        name=arm.recipe[:12],
        reads=tuple(shard.key for shard in shards),
        work=0.5 + bytes_per_row * num_rows / MERGED_BYTES_PER_S,
        num_bytes=bytes_per_row * num_rows,
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
        """Return the shards of one arm in order; there is at least one.

        Raises:
            KeyError: if no such arm is planned.
        """
        return self._arms[stage, name]

    def arms(self, stage: str) -> dict[str, list[Shard]]:
        """Return the shards of every arm of one stage, by the arm's name."""
        return {name: shards for (s, name), shards in self._arms.items() if s == stage}

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have shards, in pipeline order."""
        return tuple(self._stages)

    def stages_until(self, last: str | None) -> tuple[str, ...]:
        """Return the same names up to a stage, which has shards; all if it is None."""
        return self.stages if last is None else self.stages[: self.stages.index(last) + 1]

    def stage(self, stage: str) -> list[Shard]:
        """Return the shards of one stage in order; empty if it has none."""
        return self._stages.get(stage, [])
