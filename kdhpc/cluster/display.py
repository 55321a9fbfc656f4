"""Format what the launch scripts print: plans, status, and one line for an error."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kdhpc.cluster import slurm
from kdhpc.cluster.costs import CORE_WATTS, GPU_WATTS, Hours, StageCost
from kdhpc.cluster.eta import Range
from kdhpc.cluster.overview import Overview
from kdhpc.cluster.planning import Preview
from kdhpc.cluster.status import DAMAGE_ADVICE, Status
from kdhpc.config.run import RunConfig
from kdhpc.errors import KdhpcError
from kdhpc.plan.stages import AnyPipeline

if TYPE_CHECKING:
    from kdhpc.storage.comparison import Pair

WIDTH = 100
"""Characters in a line of a table."""


def command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a launch script; a `KdhpcError` becomes one line and its exit code."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KdhpcError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is published", file=sys.stderr)
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


def between(seconds: Range) -> str:
    """Format a range of seconds for people: 2.1 to 3.5 min, 50 s to 2.5 min, 3.0 min."""
    low, high = duration(seconds.low), duration(seconds.high)
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def size(num_bytes: float) -> str:
    """Format bytes for people: 42 B, 1.5 MB."""
    for exponent, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if num_bytes >= 1000**exponent:
            return f"{num_bytes / 1000**exponent:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def preview_view(preview: Preview, config: RunConfig, executor: str) -> Group:
    """Format what a launch would do: a line for each stage, the total, and what the times assume.

    The table is at most `WIDTH` characters wide.
    """
    starting = [stage for stage in preview.stages if stage.starts]
    num_shards = sum(stage.num_shards for stage in preview.stages)
    table = Table(title=f"{config.name}: {num_shards} shards", title_justify="left", box=None)
    table.add_column("stage", overflow="fold")
    for name in ("shards", "tasks", "rank-hours", "disk", "wall time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("a task asks for")
    for stage in preview.stages:
        table.add_row(
            stage.folder,
            str(stage.num_shards),
            str(stage.num_tasks),
            _hours(stage.rank_hours),
            size(stage.num_bytes),
            duration(stage.wall_s) if stage.starts else "not now",
            "\n".join(stage.requests),
            style="" if stage.starts else "dim",
        )
    table.add_row(
        "total" if config.until is None else f"until {config.until}",
        str(sum(stage.num_shards for stage in starting)),
        str(sum(stage.num_tasks for stage in starting)),
        _hours(sum(stage.rank_hours for stage in starting)),
        size(sum(stage.num_bytes for stage in starting)),
        between(preview.left_s),
        style="bold",
    )
    return Group(table, *(Text(line) for line in _assumptions(preview, config, executor)))


def _assumptions(preview: Preview, config: RunConfig, executor: str) -> Iterator[str]:
    """Yield lines that say what the numbers of a preview mean."""
    if executor == "slurm":
        yield "cores are for each rank, memory and GPUs for each node; 2x4: 2 nodes with 4 ranks"
        yield (
            f"wall time: an estimate for {preview.at_once} tasks at once (slurm.max_parallel), "
            "without waiting"
        )
    else:
        yield f"wall time: an estimate for {preview.at_once} tasks at once (local_workers)"
        if config.slurm.gpus_per_node and not preview.has_gpus:
            yield "TIMES ARE THOSE OF GPUs (slurm.gpus_per_node), and this machine shows none"
        if config.executor == "slurm":
            yield "executor=slurm, but no sbatch works here: this is not the cluster's plan"
    yield "in the total, stages overlap where they can; four of five runs end inside its range"
    if config.until is not None:
        yield f"until={config.until}: later stages start when sweep.py is typed without it"
    if preview.num_accepted and not preview.refused:
        yield f"sbatch --test-only passed for {preview.num_accepted} scripts of arrays and gates"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "<0.01"
    return f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def stages_table(pipeline: AnyPipeline) -> Table:
    """Format what each stage reads and writes."""
    table = Table(box=None)
    for name in ("stage", "reads", "writes"):
        table.add_column(name)
    for stage in pipeline.stages:
        table.add_row(pipeline.folders[stage.name], stage.reads, stage.writes)
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
    if status.left_s is not None:
        parts.append(Text(f"about {between(status.left_s)} left"))
    parts.append(Text(_work(status.hours)))
    if status.waiting:
        reasons = ", ".join(f"{count} {reason}" for reason, count in status.waiting.items())
        parts.append(Text(f"waiting in the queue: {reasons}"))
    parts += [Text(note) for note in status.notes]
    for cause in status.causes:
        count = f"{len(cause.shards)} shards" if len(cause.shards) > 1 else cause.shards[0]
        first = f" (first: {cause.shards[0]})" if len(cause.shards) > 1 else ""
        parts.append(Text(f"{cause.kind} in {count}{first}: {cause.message}", style="red"))
        parts += [Text(f"    {line}", style="dim") for line in cause.last_lines]
        if Path(cause.log).is_file():  # what Slurm refused has none
            parts.append(Text(f"  log: {cause.log}"))
        parts.append(Text(f"  what to do: {cause.advice}"))
    for key, reason in status.damaged.items():
        parts.append(Text(f"DAMAGED {key}: {reason}; {DAMAGE_ADVICE}", style="red"))
    return Group(*parts)


def _work(hours: Hours) -> str:
    """Say what published shards have cost, and what the others will."""
    left = hours.left
    more = f", {_hours(left.low)} to {_hours(left.high)} are left" if left.high else ""
    return f"{_hours(hours.done)} {hours.unit}-hours of work are done{more}"


def costs_view(costs: Sequence[StageCost]) -> Group:
    """Format what a run has cost: a line for each stage, and what follows for the next."""
    table = Table(title="core-hours, and memory of a node in GB", title_justify="left", box=None)
    table.add_column("stage", no_wrap=True)
    for name in ("spent", "lost", "left", "GPU-hours", "used", "asked", "GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        left = cost.left_core_hours
        table.add_row(
            cost.stage,
            _hours(cost.core_hours) if cost.core_hours else "",
            _hours(cost.lost_core_hours) if cost.lost_core_hours else "",
            f"{_hours(left.low)} to {_hours(left.high)}" if left.high else "",
            _hours(cost.gpu_hours) if cost.gpu_hours else "",
            f"{cost.memory_gb:.2f}" if cost.memory_gb else "",
            f"{cost.asked_gb:g}" if cost.asked_gb is not None else "",
            f"{cost.gpu_memory_gb:.2f}" if cost.gpu_memory_gb else "",
        )
    lines = [*_memory_advice(costs)]
    spent, lost = sum(c.core_hours for c in costs), sum(c.lost_core_hours for c in costs)
    if spent:
        lines.append(f"{1 - lost / spent:.0%} of {_hours(spent)} core-hours were useful")
        lines.append(
            f"about {sum(c.energy_kwh for c in costs):.2g} kWh, if a busy core takes "
            f"{CORE_WATTS:g} W at the wall and a GPU {GPU_WATTS:g} W"
        )
    return Group(table, *map(Text, lines))


def _memory_advice(costs: Sequence[StageCost]) -> Iterator[str]:
    """Yield what to ask for where what was asked for does not fit what was used."""
    for cost in costs:
        if cost.suggested_gb is not None and cost.asked_gb is not None:
            why = "is enough" if cost.suggested_gb < cost.asked_gb else "is safer"
            key = f"slurm.stages.{cost.stage}.mem_gb={cost.suggested_gb}"
            yield f"{cost.stage} used {cost.memory_gb:.2f} of {cost.asked_gb:g} GB: {key} {why}"


def runs_view(overviews: Sequence[Overview]) -> Group:
    """Format a line for each run, then what is wrong with those that cannot be read.

    A run has its path in place of its name if several have that name.
    """
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("run", "pipeline"):
        table.add_column(name, overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("done", "disk", "rank-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last change", no_wrap=True)
    count = Counter(run.name for run in overviews)
    for run in overviews:
        table.add_row(
            run.name if count[run.name] == 1 else run.path,
            run.pipeline,
            run.state,
            f"{run.done}/{run.planned}" if run.planned else "",
            size(run.num_bytes),
            _hours(run.rank_hours) if run.planned else "",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed)),
            style={"failed": "red", "unreadable": "red", "complete": "green"}.get(run.state, ""),
        )
    problems = [Text(run.problem, style="red") for run in overviews if run.problem]
    return Group(table, *problems)


def comparison_view(pairs: "Sequence[Pair]") -> Table:
    """Format a line for each array of two files of results."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("scores", overflow="fold")
    for name in ("rows", "mean", "other mean", "difference", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bits", no_wrap=True)
    for pair in pairs:
        rows = [str(num_rows) for num_rows in dict.fromkeys(pair.rows) if num_rows is not None]
        only = [word for word, n in zip(("second", "first"), pair.rows, strict=True) if n is None]
        table.add_row(
            pair.name,
            "/".join(rows),
            *(_number(value) for value in (*pair.means, pair.difference, pair.largest)),
            f"only in the {only[0]}" if only else "equal" if pair.is_equal else "differ",
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def console() -> Console:
    """Return a console on standard output.

    If that is not a terminal, tables are at most `WIDTH` characters wide, and no other line is
    broken, so that a log can be searched for paths and messages.
    """
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH, soft_wrap=True)
