"""Preview and check a launch: tasks, resources, and what Slurm says about the scripts."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from kdhpc.cluster import eta, local, pace, runs, slurm
from kdhpc.cluster.decide import Batch, Policy, Situation, decide
from kdhpc.cluster.ledger import Ledger
from kdhpc.cluster.observe import observe
from kdhpc.cluster.resources import Resources, array_resources, gate_resources
from kdhpc.cluster.runs import Run
from kdhpc.config import presets
from kdhpc.config.run import RunConfig, check_run
from kdhpc.errors import InputError
from kdhpc.plan.shards import Plan
from kdhpc.plan.stages import AnyPipeline
from kdhpc.types import Json


@dataclass(frozen=True, kw_only=True)
class StagePreview:
    """What a launch would do for one stage."""

    folder: str
    num_shards: int
    num_tasks: int
    rank_hours: float
    """Hours of work of all ranks together."""
    num_bytes: float
    wall_s: float
    """Seconds from the first task to the end of the last, without waiting in the queue."""
    requests: tuple[str, ...]
    """What a task asks for, in a few words; there are several if tasks differ in their ranks."""
    starts: bool
    """Whether the stage is asked for; those after `until` are planned and not started."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a launch would do."""

    stages: tuple[StagePreview, ...]
    at_once: int
    """Most tasks that run at once: of a stage on Slurm, of all on this machine."""
    left_s: eta.Range
    """Seconds until the end, without waiting in the queue."""
    has_gpus: bool = False
    """Whether this machine shows GPUs."""
    num_accepted: int
    """Number of scripts that passed `sbatch --test-only`."""
    refused: tuple[str, ...]
    """Objections of `sbatch --test-only` to the scripts."""


def preview(
    pipeline: AnyPipeline,
    plan: Plan,
    config: RunConfig,
    executor: str,
    taken: frozenset[str] = frozenset(),
) -> Preview:
    """Plan every stage as if all stages before it were done, and ask Slurm; submit nothing.

    Args:
        pipeline: the pipeline.
        plan: plan of the config.
        config: config of the run.
        executor: `local` or `slurm`.
        taken: keys of shards that are there already; they are left out.
    """
    history = pace.read_history(pipeline, pace.place_of(executor, config), config, plan)
    factors = eta.factors(plan.stages, {}, history)
    medians = {stage: factor.at(0) for stage, factor in factors.items()}
    asked_for = set(plan.stages_until(config.until))
    keys = [k for k, s in plan.shards.items() if s.stage in asked_for and k not in taken]
    if executor == "local":
        num_gpus = local.num_gpu_devices(config)
        at_once = local.num_workers(config, num_gpus)
        batches = batches_by_stage(pipeline, plan, config, max_array=None, taken=taken)
        stages = preview_stages(
            pipeline, plan, config, batches, at_once=at_once, ranks_count=num_gpus > 0, asks=False,
            taken=taken, factors=medians,
        )  # fmt: skip
        left = pace.seconds_left(
            plan, keys, config, executor, factors, {}, num_places=at_once, begun=False
        )
        return Preview(
            stages=stages, at_once=at_once, left_s=left, has_gpus=num_gpus > 0, num_accepted=0,
            refused=(),
        )  # fmt: skip
    max_array = config.slurm.max_array or slurm.max_array_size()
    batches = batches_by_stage(pipeline, plan, config, max_array, taken)
    at_once = config.slurm.max_parallel
    stages = preview_stages(
        pipeline, plan, config, batches, at_once=at_once, taken=taken, factors=medians
    )
    left = pace.seconds_left(
        plan, keys, config, executor, factors, {}, num_places=at_once, begun=False
    )
    scripts = _scripts(pipeline, plan, config, batches)
    answers = [(what, slurm.check_script(text)) for what, text in scripts]
    return Preview(
        stages=stages,
        at_once=at_once,
        left_s=left,
        num_accepted=sum(answer == "" for _, answer in answers),
        refused=tuple(f"{what}: {answer}" for what, answer in answers if answer),
    )


def batches_by_stage(
    pipeline: AnyPipeline,
    plan: Plan,
    config: RunConfig,
    max_array: int | None,
    taken: frozenset[str] = frozenset(),
) -> dict[str, tuple[Batch, ...]]:
    """Pack every stage as if all stages before it were done.

    Args:
        pipeline: the pipeline.
        plan: plan of the config.
        config: config of the run.
        max_array: maximum number of tasks in one array; None for processes of this machine.
        taken: keys of shards that are there already.
    """
    policy = Policy.unlimited(config, max_array)
    batches = {}
    done: set[str] = {*taken}
    for stage in pipeline.stages:
        keys = {shard.key for shard in plan.stage(stage.name)}
        others = frozenset(plan.shards) - keys
        of_stage: tuple[Batch, ...] = ()
        # A shard may read others of its own stage, which then is submitted in several parts.
        while True:
            situation = Situation(done=frozenset(done), active=others - done)
            part = decide(plan, situation, policy).batches
            if not part:
                break
            of_stage += part
            done |= {key for batch in part for keys_of in batch.tasks for key in keys_of}
        batches[stage.name] = of_stage
        done |= keys
    return batches


def preview_stages(
    pipeline: AnyPipeline,
    plan: Plan,
    config: RunConfig,
    batches: Mapping[str, Sequence[Batch]],
    *,
    at_once: int,
    ranks_count: bool = False,
    asks: bool = True,
    taken: frozenset[str] = frozenset(),
    factors: Mapping[str, float] | None = None,
) -> tuple[StagePreview, ...]:
    """Describe every stage that the plan has shards of; a pure function.

    Args:
        pipeline: the pipeline.
        plan: plan of the config.
        config: config of the run.
        batches: arrays of each stage, from `batches_by_stage`.
        at_once: most tasks of a stage that run at once.
        ranks_count: whether a task with several ranks takes the places of as many tasks.
        asks: whether tasks ask Slurm for resources; on this machine they do not.
        taken: keys of shards that are there already; they are left out.
        factors: by stage, how long shards take by what was estimated; 1 if not given.
    """
    asked_for = plan.stages_until(config.until)
    rows = []
    for stage in (pipeline.stage(name) for name in plan.stages):
        shards = [shard for shard in plan.stage(stage.name) if shard.key not in taken]
        factor = (factors or {}).get(stage.name, 1.0)
        requests = [f"{config.threads} thread{'s' * (config.threads > 1)}"] if shards else []
        if asks:
            of_batches = [
                array_resources(config, batch, stage.uses_device) for batch in batches[stage.name]
            ]
            requests = [describe(resources) for resources in of_batches]
        tasks = [
            (
                _seconds_until_end(
                    [(plan.shards[key].work * factor, 1) for key in keys], batch.pack
                ),
                batch.nodes * batch.ranks_per_node if ranks_count else 1,
            )
            for batch in batches[stage.name]
            for keys in batch.tasks
        ]
        work = sum(shard.work * shard.arm.nodes * shard.arm.ranks_per_node for shard in shards)
        row = StagePreview(
            folder=pipeline.folders[stage.name],
            num_shards=len(shards),
            num_tasks=len(tasks),
            rank_hours=work * factor / 3600,
            num_bytes=sum(shard.num_bytes for shard in shards),
            wall_s=_seconds_until_end(tasks, at_once),
            requests=tuple(dict.fromkeys(requests)),
            starts=stage.name in asked_for,
        )
        rows.append(row)
    return tuple(rows)


def _seconds_until_end(jobs: Sequence[tuple[float, int]], num_places: int) -> float:
    """Return after how many seconds the last job ends if each starts, in turn, as soon as it can.

    Args:
        jobs: seconds that a job takes and the number of places that it needs; if there are fewer,
            it takes all.
        num_places: number of places.
    """
    free_at = [0.0] * min(num_places, sum(needed for _, needed in jobs))
    for seconds, needed in jobs:
        taken = [heapq.heappop(free_at) for _ in range(min(needed, len(free_at)))]
        for _ in taken:
            heapq.heappush(free_at, max(taken) + seconds)
    return max(free_at, default=0.0)


def describe(resources: Resources) -> str:
    """Describe what a task asks Slurm for, such as `2x4: 8 cores 256 GB 4 GPUs 24 h`.

    Cores are those of each rank; memory and GPUs are those of each of two nodes with four ranks.
    Options of sbatch that the config gives replace the words for the same resources.
    """
    nodes, ranks, cores = resources.nodes, resources.ranks_per_node, resources.cpus_per_task
    gpus, minutes = resources.gpus_per_node, resources.time_min
    words: dict[str, str] = {
        "nodes": f"{nodes}x{ranks}:" if nodes * ranks > 1 else "",
        "ntasks-per-node": f"pack {resources.pack}:" if resources.pack > 1 else "",
        "cpus-per-task": f"{cores} core{'s' * (cores > 1)}",
        "mem": f"{resources.mem_gb:g} GB" if resources.mem_gb else "",
        "gpus-per-node": f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "",
        "time": f"{minutes:g} min" if minutes % 60 else f"{minutes / 60:g} h",
        "partition": f"on {resources.partition}" if resources.partition else "",
    }
    for option, value in resources.sbatch.items():
        words[option] = f"{option}={value}" if value is not None else ""
    return " ".join(filter(None, words.values()))


def _scripts(
    pipeline: AnyPipeline, plan: Plan, config: RunConfig, batches: Mapping[str, Sequence[Batch]]
) -> Iterable[tuple[str, str]]:
    """Yield what is asked for and its script: each kind of array that starts, and the gate."""
    from kdhpc.cluster.batch_script import batch_script  # submitit loads only where it is needed

    for stage in map(pipeline.stage, plan.stages_until(config.until)):
        kinds = {(b.nodes, b.ranks_per_node, b.pack): b for b in reversed(batches[stage.name])}
        for batch in kinds.values():
            resources = array_resources(config, batch, stage.uses_device)
            text = batch_script(
                name=f"{batch.stage}.{config.name}.dry-run",
                command="true",
                num_tasks=min(len(batch.tasks), config.slurm.max_parallel),
                resources=resources,
            )
            yield f"{stage.name} ({describe(resources)})", text
    if config.slurm.advance_from == "gate":
        gate = gate_resources(config.slurm, {})
        text = batch_script(name="gate.dry-run", command="true", num_tasks=None, resources=gate)
        yield f"gate ({describe(gate)})", text


def check_jobs(preview: Preview) -> None:
    """Refuse a launch with jobs that Slurm could never start.

    Raises:
        InputError: if there are any; the message has Slurm's words.
    """
    if preview.refused:
        more = f"; and {len(preview.refused) - 1} more" if len(preview.refused) > 1 else ""
        raise InputError(
            f"Slurm would refuse {preview.refused[0]}{more}; change slurm, slurm.stages or "
            "slurm.gate"
        )


def check_partitions(config: RunConfig) -> None:
    """Check that every partition in the config exists.

    Raises:
        InputError: for one that does not; the message lists those that do.
    """
    existing = slurm.partitions()
    configured = {
        "slurm.partition": config.slurm.partition,
        "slurm.gate.partition": config.slurm.gate.partition,
    }
    for stage, resources in config.slurm.stages.items():
        configured[f"slurm.stages.{stage}.partition"] = resources.partition
    for key, given in configured.items():
        for name in (given or "").split(","):
            if name and name not in existing:
                names = ", ".join(sorted(filter(None, existing)))
                raise InputError(f"{key}={name}: no such partition; expected one of {names}")


def check_active(run: Run, plan: Plan) -> None:
    """Refuse settings that would change shards that are queued or running.

    Raises:
        InputError: for the first such shard.
    """
    if not Ledger(run.path).requests():
        return
    _, config, old_plan = runs.current(run)
    changed = {
        key
        for key, shard in old_plan.shards.items()
        if key in plan.shards and plan.shards[key].recipe != shard.recipe
    }
    if not changed:
        return
    for key in observe(run, config, old_plan).situation.active:
        if key in changed:
            raise InputError(
                f"{key}: is in the queue with other settings; cancel.py {run.path.name} first, or "
                "choose another name"
            )


def nothing_to_do(run: Run, config: RunConfig, plan: Plan) -> bool:
    """Return whether the last request asked for the same shards, and all of them are done.

    Shards of other settings have the same keys and other recipes.
    """
    requests = Ledger(run.path).requests()
    if not requests or requests[-1].kind == "cancel":
        return False
    _, last_config, last_plan = runs.current(run)
    recipes, last_recipes = (
        {key: shard.recipe for key, shard in of.shards.items()} for of in (plan, last_plan)
    )
    if last_config.until != config.until or last_recipes != recipes:
        return False
    state = observe(run, config, plan, policy=Policy.looking(config), with_queue=False)
    return state.finished and not state.scan.damaged


def left_out(run: Run, plan: Plan) -> str:
    """Name the shards of the last request that a new plan does not have; empty if there are none.

    A narrower plan is allowed, and a tau that was forgotten looks the same. The output of a stage
    with a fixed name, which is made anew whenever the plan changes, does not count.
    """
    if not Ledger(run.path).requests():
        return ""
    arms = Counter(
        f"{shard.stage}/{shard.arm.name}"
        for key, shard in runs.current(run)[2].shards.items()
        if key not in plan.shards and run.alias_path(shard.stage) is None
    )
    if not arms:
        return ""
    more = f" and {len(arms) - 3} more" if len(arms) > 3 else ""
    return (
        f"note: {arms.total()} shards of the last request are not in this one: "
        f"{', '.join(list(arms)[:3])}{more}; what is published of them stays, and typing the wider "
        "settings takes them up again"
    )


def resource_overrides(words: list[str], config: RunConfig) -> dict[str, Json]:
    """Read fields of `slurm` from words of the form `slurm.key=value`.

    Raises:
        InputError: for any other key, or a value that is not allowed.
    """
    for word in words:
        if not word.startswith("slurm.") or "=" not in word:
            raise InputError(f"{word}: rerun takes resources only, such as slurm.mem_gb=64")
    values = presets.compose(words).get("slurm", {})
    changed = presets.build(type(config), presets.merged(presets.plain(config), {"slurm": values}))
    check_run(changed)
    resources = {field.name for field in fields(Resources)}
    for name in values:
        if name not in resources:
            raise InputError(f"slurm.{name}: not a resource of a task; change it with sweep.py")
    return {name: getattr(changed.slurm, name) for name in values}
