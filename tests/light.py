"""A quick pipeline for tests, whose records are a pure function of shard and index.

It has two stages and a merge. While the file `trouble/<stage>-<shard>` (`trouble/merge`) exists, a
shard misbehaves in the middle of writing. While `trouble/<stage>-<shard>-written` exists, it
misbehaves when all its data is written and nothing is published. The content of the file says how:

raise [WORDS]  raises an exception with this message
kill           sends itself SIGKILL
hang [...]     waits until the file is gone, then does the rest
obey           waits until it is told to stop, and stops, as a training does
sleep SECONDS  takes longer
oom            asks for more memory than it may have
flood BYTES    writes so many bytes into its file
once ...       does any of these once: the file's name gets the ending `.taken`, so that the next
               attempt succeeds
"""

import json
import os
import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Arm, Plan, Shard
from kdhpc.plan.stages import Pipeline, Stage
from kdhpc.storage.run_folder import RESULTS
from kdhpc.storage.work import Work, Written


@dataclass(frozen=True, kw_only=True)
class LightConfig(RunConfig):
    """Number of shards and their width, where trouble is announced, and how long a shard takes."""

    small: bool = True
    num_shards: int = 6
    width: int = 1
    trouble: str = ""
    trace: str = ""
    """File that gets a line at every start of a shard, from which starts are counted."""
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
    fields = {"keys": list(keys), "width": config.width}
    arm = Arm(stage="merge", name="all", fields=fields, inputs={})
    return [Shard(arm=arm, name=arm.recipe[:12], reads=keys)]


def begin(shard: Shard, work: Work[LightConfig]) -> str:
    """Note in the trace that a shard starts; return its name as the files of trouble have it."""
    if work.config.trace:
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        with Path(work.config.trace).open("a") as file:
            file.write(f"{shard.key} {restart} {os.getpid()}\n")
    return "merge" if shard.stage == "merge" else f"{shard.stage}-{shard.name}"


def write(shard: Shard, work: Work[LightConfig], value: int) -> Written | None:
    name = begin(shard, work)
    if obeys(name, work):
        return None
    path = work.new_path(shard, ".txt")
    text = json.dumps(value)
    with path.open("w") as file:
        file.write(text[:1])
        file.flush()
        misbehave(name, work, path)
        time.sleep(work.config.seconds)
        file.write(text[1:])
    misbehave(f"{name}-written", work)
    return Written(path=path, num_rows=1)


def obeys(name: str, work: Work[LightConfig]) -> bool:
    """Wait until this shard is told to stop, if it is to; return whether it was."""
    path = Path(work.config.trouble) / name
    while work.config.trouble and path.is_file() and path.read_text() == "obey":
        if work.should_stop():
            return True
        time.sleep(0.1)
    return False


def misbehave(name: str, work: Work[LightConfig], data: Path | None = None) -> None:
    path = Path(work.config.trouble) / name
    if not work.config.trouble or not path.is_file():
        return
    what = path.read_text().split()
    if what[0] == "once":
        path = path.rename(f"{path}.taken")
        what = what[1:]
    while what[0] == "hang" and path.is_file():
        time.sleep(0.1)
    what = what[1:] if what[0] == "hang" and what[1:] else what
    if what[0] == "raise":
        raise RuntimeError(" ".join(what[1:]) or "trouble was asked for")
    if what[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what[0] == "sleep":
        time.sleep(float(what[1]))
    if what[0] == "oom":
        resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
        bytearray(2**32)
    if what[0] == "flood" and data is not None:
        data.write_bytes(bytes(int(what[1])))


def run_make(shard: Shard, work: Work[LightConfig]) -> Written | None:
    return write(shard, work, int(shard.name) + work.config.seed)


def run_square(shard: Shard, work: Work[LightConfig]) -> Written | None:
    return write(shard, work, json.loads(work.input(shard.reads[0]).read_text()) ** 2)


def run_merge(shard: Shard, work: Work[LightConfig]) -> Written:
    import numpy as np

    from kdhpc.storage.results import write_results

    name = begin(shard, work)
    misbehave(name, work)
    values = [json.loads(work.input(key).read_text()) for key in shard.reads]
    table = np.add.outer(np.array(values, np.int64), np.arange(work.config.width))
    path = work.new_path(shard, ".h5")
    write_results(
        path,
        tables=[("all", {"value": table})],
        recipe=shard.recipe,
        provenance=work.provenance(shard.reads, ["numpy", "h5py"]),
    )
    misbehave(f"{name}-written", work)
    return Written(path=path, num_rows=len(values))


def stage(name: str, plan: Any, run: Any, alias: str | None = None) -> Stage[LightConfig]:
    return Stage(
        name=name,
        reads="",
        writes="",
        plan=plan,
        run=run,
        alias=alias,
    )


PIPELINE = Pipeline(
    name="light",
    config=LightConfig,
    stages=(
        stage("make", plan_make, run_make),
        stage("square", plan_square, run_square),
        stage("merge", plan_merge, run_merge, alias=RESULTS),
    ),
)


def expected(num_shards: int, seed: int = 0) -> list[int]:
    return [(i + seed) ** 2 for i in range(num_shards)]
