#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Run failed and missing shards again, with other resources if given.

    python launch/rerun.py RUN [--stage S] [--shards 3,17-20] [--put-aside] [slurm.mem_gb=64 ...]

    python launch/rerun.py RUN --partial

--partial runs no shard; it merges the published results into 8-merge/partial.h5, marked incomplete.
Shards are numbered from 0 within their stage, in the order of the plan. Published results are kept,
except that --put-aside renames the records of what was made with other settings than the run has
now.
"""

import argparse

from kdhpc.cluster import completion, local, planning, runs
from kdhpc.cluster.advance import advance, wait_for_cancelled
from kdhpc.cluster.display import command, console, note_ignored_variables, status_view
from kdhpc.cluster.gate import tell
from kdhpc.cluster.ledger import Ledger
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look, status_of
from kdhpc.config.run import RunConfig
from kdhpc.errors import InputError
from kdhpc.plan.shards import Plan
from kdhpc.storage.files import disk_errors
from kdhpc.storage.work import Work


def main(arguments: list[str]) -> int:
    """Choose shards, write the request, and advance the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("words", nargs="*", metavar="slurm.key=value")
    parser.add_argument("--runs-dir", help="look for RUN only in this folder")
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--shards", help="only these shards of --stage, such as 3,17-20")
    parser.add_argument(
        "--put-aside",
        action="store_true",
        help="make again what was made with other settings, too",
    )
    parser.add_argument("--partial", action="store_true", help="merge the results published so far")
    completion.answer(parser, words=completion.resources)
    options = parser.parse_intermixed_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    runs.check_not_restored(run, "it makes no more shards; rerun the run that was archived")
    _, config, plan = runs.current(run)
    if options.partial:
        return merge_partly(run, config, plan)
    resources = planning.resource_overrides(options.words, config)
    keys = chosen(run, plan, options.stage, options.shards)
    if options.stage and options.stage not in plan.stages_until(config.until):
        raise InputError(
            f"--stage {options.stage}: the run was asked to stop after the stage {config.until}; "
            "type sweep.py without until to go on"
        )
    executor = Ledger(run.path).requests()[-1].executor
    request = {"kind": "rerun", "executor": executor, "stage": options.stage, "keys": keys}
    damaged = look(run).situation.damaged if options.put_aside else run.scan().damaged
    stage = f"{options.stage}/" if options.stage else ""
    for key in damaged:
        if (keys is None or key in keys) and key.startswith(stage):
            run.quarantine(key)
    if executor == "local":
        with runs.launcher_lock(run):
            runs.add_request(run, config, resources=resources, **request)
            with disk_errors(run.path):
                state = local.run_all(run, config, plan)
        console().print(status_view(status_of(run, state)))
        tell(run, state)
        return 0 if state.finished else 1
    note_ignored_variables()
    wait_for_cancelled(run)
    runs.add_request(run, config, resources=resources, **request)
    advance(run)
    console().print(status_view(status_of(run, look(run))))
    return 0


def merge_partly(run: Run, config: RunConfig, plan: Plan) -> int:
    """Merge the complete arms in this process; nothing is published."""
    if run.pipeline.merge_partial is None:
        raise InputError(f"--partial: the pipeline {run.pipeline.name} has no partial merge")
    state = look(run)
    path = run.stage_dir(run.pipeline.stages[-1].name) / "partial.h5"
    run.pipeline.merge_partial(Work(run, config, plan), state.situation.done, path)
    missing = len(state.missing)
    print(f"{path}: complete = {not missing}; {missing} of {len(plan.shards)} shards are missing")
    return 0


def chosen(run: Run, plan: Plan, stage: str | None, shards: str | None) -> tuple[str, ...] | None:
    """Return the keys of the shards that --shards names; None for all shards of the stage or run.

    Raises:
        InputError: for a stage or number that does not exist.
    """
    stages = [s.name for s in run.pipeline.stages]
    if stage is not None and stage not in stages:
        raise InputError(f"--stage {stage}: expected one of {', '.join(stages)}")
    if shards is None:
        return None
    if stage is None:
        raise InputError(
            "--shards: expected --stage too, because shards are numbered within a stage"
        )
    planned = plan.stage(stage)
    if not planned:
        raise InputError(f"--stage {stage}: this run has no shards of that stage")
    keys = []
    for part in shards.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise InputError(f"--shards {shards}: expected numbers and ranges, such as 3,17-20")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= len(planned):
            raise InputError(f"--shards {part}: {stage} has shards 0 to {len(planned) - 1}")
        keys += [planned[number].key for number in numbers]
    return tuple(keys)


if __name__ == "__main__":
    command(main)
