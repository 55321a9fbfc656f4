#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Plan and submit a run. Typed again, it submits only what is missing and not queued.

    python launch/sweep.py [PRESET ...] [key=value ...] [--dry-run [--verbose]] [--watch]

Without a preset it runs `demo`. Examples:

    python launch/sweep.py paper --dry-run
    python launch/sweep.py demo name=second 'taus=[1.0,0.7]'
    python launch/sweep.py demo capacity reuse=temperature
    python launch/sweep.py paper cluster=mysite slurm.mem_gb=64
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.live import Live

from kdhpc.cluster import completion, local, planning, reuse, runs, slurm
from kdhpc.cluster.advance import advance, wait_for_cancelled
from kdhpc.cluster.display import (
    command,
    console,
    note_ignored_variables,
    preview_view,
    stages_table,
    status_view,
)
from kdhpc.cluster.gate import patiently, tell
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look, status_of
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Plan
from kdhpc.plan.stages import AnyPipeline
from kdhpc.storage.files import disk_errors
from kdhpc.storage.run_folder import Record

WATCH_EVERY_S = 5.0


def main(arguments: list[str]) -> int:
    """Compose the config, plan, and submit or show the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="PRESET|key=value")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and submit nothing")
    parser.add_argument(
        "--watch", action="store_true", help="stay until the end, with a live display"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="with --dry-run: what each stage reads and writes"
    )
    completion.answer(parser, words=completion.settings)
    options = parser.parse_intermixed_args(arguments)

    pipeline, config = runs.from_words(options.words)
    slurm_here = slurm.available()
    if options.dry_run:
        return _dry_run(pipeline, config, slurm_here, verbose=options.verbose)

    executor = runs.pick_executor(config, slurm_here)
    if not any(word.startswith("runs_dir=") for word in options.words):
        runs.check_place(config)
    config = reuse.with_place(config)
    if executor == "slurm":
        planning.check_partitions(config)
    config = pipeline.prepare(config)
    plan = pipeline.plan(config)
    if executor == "slurm":
        planning.check_jobs(planning.preview(pipeline, plan, config, executor))
        note_ignored_variables()
    reused = reuse.find(config, plan)
    run = runs.open_for(config, plan)
    if executor == "slurm":
        wait_for_cancelled(run)
    planning.check_active(run, plan)
    if planning.nothing_to_do(run, config, plan):
        console().print(status_view(status_of(run, look(run))))
        num_shards = sum(len(plan.stage(stage)) for stage in plan.stages_until(config.until))
        print(f"nothing to do: all {num_shards} shards are done")
        return 0
    runs.check_executor(run, config, executor)
    if note := planning.left_out(run, plan):
        print(note)
    if executor == "local":
        with runs.launcher_lock(run):
            return _local(run, config, plan, reused)
    for key in run.scan().damaged:
        run.quarantine(key)
    reuse.take(run, reused)
    runs.add_request(run, config, kind="sweep", executor=executor)
    advance(run)
    if options.watch:
        return _watch(run)
    console().print(status_view(status_of(run, look(run))))
    print(f"follow it: squeue --me; python launch/status.py {run.path}")
    return 0


def _dry_run(pipeline: AnyPipeline, config: RunConfig, slurm_here: bool, *, verbose: bool) -> int:
    """Show what would be submitted; write nothing."""
    executor = "slurm" if slurm_here and config.executor != "local" else "local"
    config = reuse.with_place(config)
    place = Path(config.runs_dir).expanduser() / config.name
    is_begun = (place / "run.json").is_file()
    measured = getattr(config, "throughput_from", None)
    # Which shards are the same, and what was measured, is known with what a run starts from.
    if config.reuse or is_begun or measured:
        config = pipeline.prepare(config)
    plan = pipeline.plan(config)
    reused = frozenset(record.key for record in reuse.find(config, plan))
    done = runs.done_already(runs.open_run(place.resolve()), plan) if is_begun else frozenset[str]()
    taken = reused | done
    preview = planning.preview(pipeline, plan, config, executor, taken)
    console().print(preview_view(preview, config, executor))
    if verbose:
        console().print(stages_table(pipeline))
    for line in pipeline.estimate(config):
        print(line)
    if config.reuse:
        print(f"not in the table: {len(reused)} shards that are taken from {config.reuse} (reuse)")
    if is_begun:
        print(f"not in the table: {len(done)} shards that are done")
    print(f"planned for {executor}, in {config.runs_dir}/{config.name}; nothing was written")
    planning.check_jobs(preview)
    return 0


def _local(run: Run, config: RunConfig, plan: Plan, reused: Sequence[Record]) -> int:
    for key in run.scan().damaged:
        run.quarantine(key)
    reuse.take(run, reused)
    runs.add_request(run, config, kind="sweep", executor="local")
    out = console()
    finished: set[str] = set()
    with Live(console=out, refresh_per_second=4, transient=True) as live:

        def show(state: State) -> None:
            status = status_of(run, state)
            live.update(status_view(status))
            for stage in status.stages:
                if stage.done == stage.planned and stage.folder not in finished:
                    finished.add(stage.folder)
                    if not out.is_terminal:
                        print(f"{stage.folder}: {stage.done} shards done", flush=True)

        with disk_errors(run.path):
            state = local.run_all(run, config, plan, on_change=show)
    status = status_of(run, state)
    out.print(status_view(status))
    tell(run, state)
    return 0 if state.finished else 1


def _watch(run: Run) -> int:
    """Stay until nothing is queued or running; where gates may not submit, this loop does."""
    out, from_here = console(), False
    try:
        with Live(console=out, refresh_per_second=1, transient=True) as live:
            while True:
                state = patiently(run)
                from_here = state.config.slurm.advance_from == "login"
                status = status_of(run, state)
                live.update(status_view(status))
                if not state.situation.active and not state.queued:
                    break
                time.sleep(WATCH_EVERY_S)
    except KeyboardInterrupt:
        later = "nothing more is submitted until sweep.py is typed again; " if from_here else ""
        goes_on = f"jobs in the queue run on; {later}cancel.py {run.path.name} ends them"
        print(f"stopped watching; {goes_on}", file=sys.stderr)
        return 1
    out.print(status_view(status))
    if state.config.slurm.advance_from == "login":
        tell(run, state)
    return 0 if state.finished else 1


if __name__ == "__main__":
    command(main)
