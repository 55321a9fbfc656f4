"""A pipeline of the tests' own: records that are a pure function of shard and index, and quick.

Two stages and a merge. A shard misbehaves while the file `trouble/<shard name>` exists: its content
says how (`raise`, `kill`, `sleep SECONDS`).
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdhpc.artifacts import Work, Written
from kdhpc.config import RunConfig
from kdhpc.shards import Arm, Pipeline, Plan, Shard, Stage


@dataclass(frozen=True, kw_only=True)
class LightConfig(RunConfig):
    """How many shards, where trouble is announced, how long a shard takes."""

    small: bool = True
    num_shards: int = 6
    trouble: str = ""
    seconds: float = 0.02


def shards_of(stage: str, config: LightConfig, reads: Sequence[Sequence[str]]) -> list[Shard]:
    arm = Arm(stage=stage, name="arm", fields={"seed": config.seed}, inputs={})
    return [Shard(arm=arm, name=f"{i:05d}", reads=tuple(keys)) for i, keys in enumerate(reads)]


def plan_make(config: LightConfig, before: Plan) -> list[Shard]:
    return shards_of("make", config, [()] * config.num_shards)


def plan_square(config: LightConfig, before: Plan) -> list[Shard]:
    return shards_of("square", config, [(shard.key,) for shard in before.stage("make")])


def plan_merge(config: LightConfig, before: Plan) -> list[Shard]:
    keys = tuple(shard.key for shard in before.stage("square"))
    arm = Arm(stage="merge", name="all", fields={"keys": list(keys)}, inputs={})
    return [Shard(arm=arm, name=arm.recipe[:12], reads=keys)]


def write(shard: Shard, work: Work, value: Any) -> Written:
    misbehave(Path(work.config.trouble) / f"{shard.stage}-{shard.name}", work)
    time.sleep(work.config.seconds)
    path = work.new_path(shard, ".json")
    path = path.with_suffix(".txt")
    path.write_text(json.dumps(value))
    return Written(path=path, rows=1)


def misbehave(path: Path, work: Work) -> None:
    if not work.config.trouble or not path.is_file():
        return
    what, _, argument = path.read_text().partition(" ")
    if what == "raise":
        raise RuntimeError("trouble was asked for")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(float(argument))


def run_make(shard: Shard, work: Work) -> Written:
    return write(shard, work, int(shard.name) + work.config.seed)


def run_square(shard: Shard, work: Work) -> Written:
    return write(shard, work, json.loads(work.input(shard.reads[0]).read_text()) ** 2)


def run_merge(shard: Shard, work: Work) -> Written:
    return write(shard, work, [json.loads(work.input(key).read_text()) for key in shard.reads])


def stage(name: str, plan: Any, run: Any, alias: str | None = None) -> Stage:
    return Stage(
        name=name,
        reads="",
        writes="",
        unit="rows",
        plan=plan,
        run=run,
        rate=lambda c: 1.0,
        alias=alias,
    )


PIPELINE = Pipeline(
    name="light",
    config=LightConfig,
    stages=(
        stage("make", plan_make, run_make),
        stage("square", plan_square, run_square),
        stage("merge", plan_merge, run_merge, alias="all.json"),
    ),
)


def expected(num_shards: int, seed: int = 0) -> list[int]:
    return [(i + seed) ** 2 for i in range(num_shards)]
