"""How fast a run goes: its progress, what earlier runs took, and the time left (see `eta.py`)."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from kdhpc.cluster import eta, local, places
from kdhpc.cluster.decide import LOCAL_TASK_S
from kdhpc.cluster.ledger import Ledger
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.config import presets
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Plan
from kdhpc.plan.stages import AnyPipeline
from kdhpc.storage.run_folder import Record
from kdhpc.types import Json

HISTORY = "pace.json"
"""Name of the file in a finished run that says what its stages took."""
MEASURED = "measured"
"""Name in that file's `throughput` for speeds of models instead of a stage."""
NUM_RUNS = 5
"""Number of earlier runs that count, the newest."""
ALIKE = 4.0
"""Shards count as alike in size if their estimates are apart by less than this factor."""
START_S = 8.0
"""Seconds on Slurm from the end of what a shard reads until its task works, if a node is free."""
WARM_UP_S = 4.0
"""Seconds in which the first processes of a local run import what they need."""
LIVE_S = 120.0
"""Age in seconds up to which a note of progress counts."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a task said last of the shard that it works on."""

    fraction: float
    """Done fraction of the shard, with that of earlier attempts."""
    since: float
    """The fraction when this attempt said it first."""
    seconds: float
    """Seconds between the two."""


def progress(run: Run, state: State) -> dict[str, Progress]:
    """Read what tasks say of the shards that they work on now, by key."""
    notes = {}
    ledger, active = Ledger(run.path), state.situation.active - state.situation.done
    for path in sorted((run.path / "progress").glob("*.json")):
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            written = path.stat().st_mtime
            key, fraction = str(raw["key"]), float(raw["fraction"])
            since, started = map(float, raw.get("first", (fraction, written)))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if key in active and key in state.plan.shards and time.time() - written < LIVE_S:
            number, task = path.stem.partition(".")[0].split("-")
            # If it has failed, its task goes on with other shards.
            if ledger.last_events(int(number), int(task)).get(key) == "started":
                notes[key] = Progress(fraction=fraction, since=since, seconds=written - started)
    return notes


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a run goes, as far as it is known now."""

    progress: Mapping[str, Progress]
    """Progress of the shards that are being worked on, by key."""
    factors: Mapping[str, eta.Factor]
    """How long shards take by what was estimated, by stage."""
    num_at_once: int
    """Most shards that earlier runs of alike shards worked on at once; 0 if there are none."""
    begun: bool
    """Whether any work of this run has been seen to be done."""


def measure(run: Run, state: State) -> Pace:
    """Find out how fast a run goes: what is done, the progress of the rest, and earlier runs."""
    plan, records = state.plan, state.scan.records.values()
    took = eta.took(records, plan)
    notes = progress(run, state)
    for key, note in notes.items():
        shard, gained = plan.shards[key], note.fraction - note.since
        if gained > 0 and note.seconds > 0 and shard.work > 0:
            part = eta.Took(
                seconds=note.seconds, estimated_s=gained * shard.work, num_shards=gained
            )
            took[shard.stage] = took[shard.stage] + part if shard.stage in took else part
    place = place_of(state.request.executor, state.config)
    history = read_history(run.pipeline, place, state.config, plan, but_not=run.path)
    return Pace(
        progress=notes,
        factors=eta.factors(plan.stages, took, history),
        num_at_once=history.num_at_once,
        begun=bool(took),
    )


def time_left(state: State, pace: Pace) -> eta.Range | None:
    """Return how long the rest takes; None if nothing is running or nothing is left."""
    plan = state.plan
    asked_for = set(plan.stages_until(state.config.until))
    left = [key for key in state.missing if plan.shards[key].stage in asked_for]
    if not left or not state.running:
        return None
    return seconds_left(
        plan,
        left,
        state.config,
        state.request.executor,
        pace.factors,
        {key: note.fraction for key, note in pace.progress.items()},
        num_places=_num_places(state, pace),
        begun=pace.begun,
    )


def seconds_left(
    plan: Plan,
    keys: Iterable[str],
    config: RunConfig,
    executor: str,
    factors: Mapping[str, eta.Factor],
    done: Mapping[str, float],
    *,
    num_places: int,
    begun: bool,
) -> eta.Range:
    """Return how long it takes until some shards are done, with the tasks of an executor.

    Args:
        plan: plan of the run.
        keys: keys of the shards that are left, in order.
        config: config of the run.
        executor: `local` or `slurm`.
        factors: factor of each stage.
        done: fraction that is done, by the key of each shard that is being worked on.
        num_places: how many shards are worked on at once.
        begun: whether processes have been at work already.
    """
    is_local = executor == "local"
    seconds = eta.seconds_left(
        plan,
        keys,
        factors,
        done,
        num_places=num_places,
        task_s=LOCAL_TASK_S if is_local else config.slurm.task_min * 60,
        start_s=0.0 if is_local else START_S,
    )
    return seconds if begun or not is_local else seconds.later(WARM_UP_S)


def _num_places(state: State, pace: Pace) -> int:
    """Return how many shards are worked on at once from now on."""
    if state.request.executor == "local":
        return local.num_workers(state.config, local.num_gpu_devices(state.config))
    pack = {submission.name: submission.pack for submission in state.submissions}
    tasks = [task for task in state.queued if task.is_task and task.name in pack]
    now = max(1, sum(pack[task.name] for task in tasks if task.state == "RUNNING"))
    if any(task.state == "PENDING" for task in tasks):
        return now  # there is no room for more
    return max(now, pace.num_at_once or state.config.slurm.max_parallel)


def most_at_once(records: Iterable[Record]) -> int:
    """Return how many shards of a run were worked on at once, at most."""
    changes = []
    for record in records:
        started = float(record.attempt["started"])
        changes += [(started, 1), (started + record.seconds, -1)]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def read_history(
    pipeline: AnyPipeline,
    place: str,
    config: RunConfig,
    plan: Plan,
    *,
    but_not: Path | None = None,
) -> eta.History:
    """Read what the newest runs of a pipeline took that ended in a place.

    A stage counts only if its shards were of about the size that they have in the plan: those of a
    toy are over before they have done much, and say nothing of large ones. Its `throughput`, if the
    config has such a field, must be the same too, as estimates come from it.

    Args:
        pipeline: the pipeline.
        place: where they ended, from `place_of`.
        config: config of the run that they are compared with.
        plan: its plan.
        but_not: absolute path of a run that does not count.
    """
    shard_s, speeds = _shard_seconds(plan), _throughput(config)
    notes = []
    for path in places.known():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            note: dict[str, Json] = json.loads((path / HISTORY).read_text())
            alike = (note["pipeline"], note["place"]) == (pipeline.name, place)
            if alike and path.resolve() != but_not:
                log_factors = {
                    stage: float(value)
                    for stage, value in note["log_factors"].items()
                    if 1 / ALIKE < note["shard_s"][stage] / (shard_s.get(stage) or math.inf) < ALIKE
                    and all(
                        note["throughput"].get(name) == speeds.get(name)
                        for name in (stage, MEASURED)
                    )
                }
                if log_factors:
                    notes.append((float(note["time"]), int(note["num_at_once"]), log_factors))
    newest = sorted(notes, key=lambda note: note[0])[-NUM_RUNS:]
    by_stage: dict[str, list[float]] = {}
    for _, _, log_factors in newest:
        for stage, value in log_factors.items():
            by_stage.setdefault(stage, []).append(value)
    return eta.History(
        log_factors={stage: sum(values) / len(values) for stage, values in by_stage.items()},
        num_at_once=max((at_once for _, at_once, _ in newest), default=0),
    )


def note_history(run: Run, state: State) -> None:
    """Write what the stages of a finished run took, for later runs; a full disk is ignored."""
    records = state.scan.records.values()
    took = eta.took(records, state.plan)
    if not took:
        return
    facts = {
        "pipeline": run.pipeline.name,
        "place": place_of(state.request.executor, state.config),
        "time": time.time(),
        "log_factors": {stage: round(of.log_factor, 3) for stage, of in took.items()},
        "shard_s": _shard_seconds(state.plan),
        "throughput": _throughput(state.config),
        "num_at_once": most_at_once(record for record in records if not record.reused_from),
    }
    with contextlib.suppress(OSError):
        temporary = run.path / f".{HISTORY}.{os.getpid()}"
        temporary.write_text(json.dumps(facts))
        os.replace(temporary, run.path / HISTORY)


def _shard_seconds(plan: Plan) -> dict[str, float]:
    """Return the mean estimate of a shard of each stage, in seconds."""
    return {
        stage: sum(shard.work for shard in plan.stage(stage)) / len(plan.stage(stage))
        for stage in plan.stages
    }


def _throughput(config: RunConfig) -> dict[str, Json]:
    """Return the speeds that the config gives, by stage and as measured, if its class has them."""
    plain = presets.plain(config)
    return {**plain.get("throughput", {}), MEASURED: plain.get("speeds") or None}


def place_of(executor: str, config: RunConfig) -> str:
    """Return the name of where a run is, in which speeds are alike: a cluster, or a machine."""
    return config.cluster if executor == "slurm" else f"local on {socket.gethostname()}"
