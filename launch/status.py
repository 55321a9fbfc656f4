#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Show the state of a run: counts for each stage, causes of failures, time left.

    python launch/status.py RUN [--watch] [--json]
    python launch/status.py RUN --costs              hours, memory, energy by stage; what to ask for
    python launch/status.py RUN --list STAGE         a line for each shard of this stage
    python launch/status.py RUN --explain SHARD      why this shard is where it is, what to do
    python launch/status.py RUN --log SHARD          what its last attempt wrote to its task's log
    python launch/status.py RUN --log SHARD --follow until it is published or failed

RUN is a name or a path. SHARD is STAGE/ARM/NAME, as --list shows it; --list says published,
running, queued, waiting, damaged, cancelled, or failed and the kind of failure. The exit code is 0
if all that was asked for is done (a run up to its `until`, that shard, that stage), else 1.
Works without accounting, and without Slurm.
"""

import argparse
import sys
import time

from rich.live import Live

from kdhpc.cluster import completion, runs
from kdhpc.cluster.costs import costs
from kdhpc.cluster.display import command, console, costs_view, status_view
from kdhpc.cluster.explain import explain, list_stage, planned_shard, show_log
from kdhpc.cluster.pace import measure
from kdhpc.cluster.status import look, status_of
from kdhpc.errors import InputError


def main(arguments: list[str]) -> int:
    """Observe the run and show it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", help="look for RUN only in this folder")
    parser.add_argument(
        "--watch", action="store_true", help="stay until nothing is queued or running"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--costs", action="store_true", help="hours, memory and energy by stage")
    parser.add_argument("--list", metavar="STAGE", help="list the shards of this stage")
    parser.add_argument("--explain", metavar="SHARD", help="explain the state of this shard")
    parser.add_argument("--log", metavar="SHARD", help="print the log of its last attempt")
    parser.add_argument("--follow", action="store_true", help="with --log: stay until it has ended")
    completion.answer(parser)
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    state = look(run)
    if options.follow and not options.log:
        raise InputError("--follow: expected --log SHARD too")
    if options.list:
        print("\n".join(list_stage(run, state, options.list)))
        return 0 if state.situation.done >= {s.key for s in state.plan.stage(options.list)} else 1
    if options.explain:
        shard = planned_shard(state, options.explain, "--explain")
        print("\n".join(explain(run, state, shard)))
        return 0 if shard.key in state.situation.done else 1
    if options.costs:
        console().print(costs_view(costs(run, state, measure(run, state).factors)))
        return 0 if state.finished else 1
    if options.log:
        return show_log(run, planned_shard(state, options.log, "--log"), follow=options.follow)
    status = status_of(run, state)
    if options.json:
        print(status.as_json())
    elif options.watch:
        out = console()
        try:
            with Live(
                status_view(status), console=out, refresh_per_second=1, transient=True
            ) as live:
                while state.situation.active or state.queued:
                    time.sleep(2)
                    state = look(run)
                    status = status_of(run, state)
                    live.update(status_view(status))
        except KeyboardInterrupt:
            print("stopped watching; the run goes on", file=sys.stderr)
            return 1
        out.print(status_view(status))
    else:
        console().print(status_view(status))
    return 0 if status.finished else 1


if __name__ == "__main__":
    command(main)
