"""Preview and check a launch: tasks, resources, and what Slurm says about the scripts."""

from collections import Counter
from dataclasses import dataclass, fields, replace

from kdhpc.cluster import runs, slurm
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
class Preview:
    """What a launch would submit, by stage."""

    num_tasks: dict[str, int]
    resources: dict[str, str]
    refused: tuple[str, ...]
    """Objections of `sbatch --test-only` to the scripts."""


def preview(pipeline: AnyPipeline, plan: Plan, config: RunConfig, executor: str) -> Preview:
    """Pack every stage as if all stages before it were done; submit nothing."""
    rates = {stage.name: 1.0 / stage.rate(config) for stage in pipeline.stages}
    on_slurm = executor == "slurm"
    max_array = (config.slurm.max_array or slurm.max_array_size()) if on_slurm else None
    policy = Policy.unlimited(config, max_array)
    num_tasks: dict[str, int] = {}
    resources: dict[str, str] = {}
    refused: dict[str | None, None] = {}
    done: set[str] = set()
    for stage in pipeline.stages:
        keys = {shard.key for shard in plan.stage(stage.name)}
        others = frozenset(plan.shards) - keys
        situation = Situation(done=frozenset(done), active=others - done, seconds_per_work=rates)
        batches = decide(plan, situation, policy).batches
        done |= keys
        num_tasks[stage.name] = sum(len(batch.tasks) for batch in batches)
        if not batches:
            resources[stage.name] = ""
            continue
        resources[stage.name] = (
            _describe(batches[0], config, stage.uses_device)
            if on_slurm
            else (f"{config.threads} thread{'s' * (config.threads > 1)}")
        )
        if on_slurm:
            refused[slurm.check_script(_script(batches[0], config, stage.uses_device))] = None
    if on_slurm and config.slurm.advance_from == "gate":
        refused[slurm.check_script(_gate_script(config))] = None
    return Preview(num_tasks=num_tasks, resources=resources, refused=tuple(filter(None, refused)))


def check_jobs(preview: Preview) -> None:
    """Refuse a launch with jobs that Slurm could never start.

    Raises:
        InputError: if there are any; the message has Slurm's words.
    """
    if preview.refused:
        raise InputError(f"Slurm would refuse: {'; '.join(preview.refused)}")


def _describe(batch: Batch, config: RunConfig, uses_device: bool) -> str:
    """Describe the resources of an array to people."""
    resources = array_resources(config, batch, uses_device)
    words = [
        f"{batch.nodes} x {batch.ranks_per_node} ranks"
        if batch.nodes * batch.ranks_per_node > 1
        else "",
        f"{resources.cpus_per_task} cores",
        f"{resources.gpus_per_node} GPUs a node" if resources.gpus_per_node else "",
        f"{resources.mem_gb:g} GB" if resources.mem_gb else "",
        f"{resources.time_min:g} min",
        f"on {resources.partition}" if resources.partition else "",
    ]
    return ", ".join(word for word in words if word)


def _script(batch: Batch, config: RunConfig, uses_device: bool) -> str:
    from kdhpc.cluster.batch_script import batch_script  # submitit loads only where it is needed

    first = replace(batch, tasks=batch.tasks[: config.slurm.max_parallel])
    return batch_script(
        name=f"{batch.stage}.{config.name}.dry-run",
        command="true",
        num_tasks=len(first.tasks),
        resources=array_resources(config, batch, uses_device),
    )


def _gate_script(config: RunConfig) -> str:
    from kdhpc.cluster.batch_script import batch_script

    gate = gate_resources(config.slurm, {})
    return batch_script(name="gate.dry-run", command="true", num_tasks=None, resources=gate)


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
