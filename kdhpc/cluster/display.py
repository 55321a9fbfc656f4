"""Format what the launch scripts print: plans, status, and one line for an error."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kdhpc.cluster import slurm
from kdhpc.cluster.status import DAMAGE_ADVICE, Status
from kdhpc.config.run import RunConfig
from kdhpc.errors import KdhpcError
from kdhpc.plan.shards import Plan
from kdhpc.plan.stages import AnyPipeline


def command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a launch script; a `KdhpcError` becomes one line and its exit code."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KdhpcError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; type the same command to go on", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)


def note_ignored_variables() -> None:
    """Say which variables of the environment sbatch would have read, if there are any."""
    if names := slurm.ignored_variables():
        print(
            f"note: {', '.join(names)}: not used, so that gates submit as you do; give the options "
            "in configs/cluster/, such as slurm.account or slurm.sbatch",
            file=sys.stderr,
        )


def duration(seconds: float) -> str:
    """Format seconds for people: 42 s, 3.0 min, 2.5 h, 4.1 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def size(num_bytes: float) -> str:
    """Format bytes for people: 42 B, 1.5 MB."""
    for exponent, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if num_bytes >= 1000**exponent:
            return f"{num_bytes / 1000**exponent:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def plan_table(
    pipeline: AnyPipeline,
    plan: Plan,
    config: RunConfig,
    num_tasks: dict[str, int],
    resources: dict[str, str],
) -> Table:
    """Format the pipeline with its shards, tasks, hours and bytes."""
    table = Table(title=f"{config.name}: {len(plan.shards)} shards", title_justify="left", box=None)
    for name in ("stage", "reads", "writes"):
        table.add_column(name, overflow="fold")
    for name in ("shards", "tasks", "rank-hours", "on disk"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("a task asks for", overflow="fold")
    all_hours = all_bytes = 0.0
    for stage in pipeline.stages:
        shards = plan.stage(stage.name)
        hours = sum(s.work * s.arm.nodes * s.arm.ranks_per_node for s in shards)
        hours /= stage.rate(config) * 3600
        num_bytes = sum(s.num_bytes for s in shards)
        all_hours, all_bytes = all_hours + hours, all_bytes + num_bytes
        table.add_row(
            pipeline.folders[stage.name],
            stage.reads,
            stage.writes,
            str(len(shards)),
            str(num_tasks[stage.name]),
            f"{hours:.3g}",
            size(num_bytes),
            resources[stage.name],
        )
    total = [str(len(plan.shards)), str(sum(num_tasks.values())), f"{all_hours:.3g}"]
    table.add_row("total", "", "", *total, size(all_bytes), "a rank is one GPU or CPU process")
    return table


def status_view(status: Status) -> Group:
    """Format the status of a run: a table, then what is wrong."""
    table = Table(title=f"{status.run} ({status.executor})", title_justify="left", box=None)
    table.add_column("stage", no_wrap=True)
    for name in ("done", "running", "queued", "failed", "missing"):
        table.add_column(name, justify="right")
    for stage in status.stages:
        style = "red" if stage.failed else ("green" if stage.done == stage.planned else "")
        table.add_row(
            stage.folder,
            f"{stage.done}/{stage.planned}",
            *(str(n or "") for n in (stage.running, stage.queued, stage.failed, stage.missing)),
            style=style,
        )
    parts: list[Any] = [table]
    if status.logical_digest:
        parts.append(Text(f"logical digest of the results: {status.logical_digest}"))
    parts += [Text(f"  {line}", style="cyan") for line in status.live]
    if status.eta_s is not None:
        parts.append(Text(f"about {duration(status.eta_s)} left at this pace"))
    if status.waiting:
        reasons = ", ".join(f"{count} {reason}" for reason, count in status.waiting.items())
        parts.append(Text(f"waiting in the queue: {reasons}"))
    parts += [Text(note) for note in status.notes]
    for cause in status.causes:
        count = f"{len(cause.shards)} shards" if len(cause.shards) > 1 else cause.shards[0]
        first = f" (first: {cause.shards[0]})" if len(cause.shards) > 1 else ""
        parts.append(Text(f"{cause.kind} in {count}{first}: {cause.message}", style="red"))
        parts += [Text(f"    {line}", style="dim") for line in cause.last_lines]
        parts.append(Text(f"  log: {cause.log}\n  what to do: {cause.advice}"))
    for key, reason in status.damaged.items():
        parts.append(Text(f"DAMAGED {key}: {reason}; {DAMAGE_ADVICE}", style="red"))
    return Group(*parts)


def console() -> Console:
    """Return a console on standard output, 160 characters wide if that is not a terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=160)
