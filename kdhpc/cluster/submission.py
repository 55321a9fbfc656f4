"""One array and its gate: claimed, submitted held, recorded, released.

In that order, so that whoever dies in between leaves something that the next caller can put right.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from kdhpc.artifacts import RunFolder
from kdhpc.cluster import slurm
from kdhpc.cluster.decide import Batch
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission
from kdhpc.cluster.observe import State
from kdhpc.config import RunConfig, Slurm
from kdhpc.errors import ClusterError


def final_resources(config: RunConfig, batch: Batch, uses_device: bool) -> dict[str, Any]:
    """Fields of `slurm` for one array: config, stage, what rerun asked for, then remedies."""
    limits, threads = config.slurm, config.threads
    wanted: dict[str, Any] = {
        name: getattr(limits, name)
        for name in (
            "account", "partition", "qos", "constraint", "exclude", "time_min", "mem_gb",
            "cpus_per_task", "gpus_per_node", "max_parallel", "signal_s", "setup", "scratch",
            "prefix",
        )
    }  # fmt: skip
    if not uses_device:
        wanted["gpus_per_node"] = 0
    stage = limits.stages.get(batch.stage)
    if stage is not None:
        wanted |= {name: value for name, value in vars(stage).items() if value is not None}
    changes = dict(batch.changes)
    time_factor, mem_factor = changes.pop("time_factor", 1.0), changes.pop("mem_factor", 1.0)
    avoid = [name for name in (wanted["exclude"], changes.pop("exclude", None)) if name]
    wanted |= changes
    if time_factor > 1:
        limit_min = slurm.time_limit_min(wanted["partition"])
        wanted["time_min"] = min(wanted["time_min"] * time_factor, limit_min)
    if mem_factor > 1:
        limit_gb = limits.max_mem_gb or float("inf")
        wanted["mem_gb"] = max(wanted["mem_gb"], min(wanted["mem_gb"] * mem_factor, limit_gb))
    wanted["cpus_per_task"] = max(wanted["cpus_per_task"], threads)
    wanted["exclude"] = ",".join(avoid) or None
    return wanted | {"nodes": batch.nodes, "ranks_per_node": batch.ranks_per_node}


def gate_resources(limits: Slurm, array_id: str) -> dict[str, Any]:
    """Fields of `slurm` for the gate after an array."""
    given = {name: value for name, value in vars(limits.gate).items() if value is not None}
    plain = {
        "partition": limits.partition, "account": limits.account, "qos": limits.qos,
        "time_min": 10, "mem_gb": 1.0, "cpus_per_task": 1, "setup": limits.setup,
        "scratch": limits.scratch,
    }  # fmt: skip
    return (
        plain
        | given
        | {
            "nodes": 1,
            "ranks_per_node": 1,
            "max_parallel": 1,
            "signal_s": 30,
            "dependency": f"afterany:{array_id}",
        }
    )


def submit(run: RunFolder, ledger: Ledger, state: State, batch: Batch) -> bool:
    """Claim, submit held, record, release. Returns whether the number was ours."""
    limits = state.config.slurm
    stage = run.pipeline.stage(batch.stage)
    number = max((s.number for s in ledger.submissions()), default=0) + 1
    known = {key for s in ledger.submissions() if s.number > _newest(state) for key in s.keys}
    if known & {key for task in batch.tasks for key in task}:
        return False
    submission = Submission(
        number=number,
        request=state.request.number,
        name=job_name(run, batch.stage, number),
        stage=batch.stage,
        tasks=batch.tasks,
        resources=final_resources(state.config, batch, stage.uses_device),
        code=state.request.code,
        time=time.time(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    if not ledger.claim(submission):
        return False
    if ledger.requests()[-1].number != state.request.number:
        ledger.settle(number, Job(job_id=None, note="something else was asked for meanwhile"))
        return False
    try:
        ids = _sbatch(run, ledger, submission, limits)
    except slurm.OverLimitError as error:
        ledger.settle(number, Job(job_id=None, note=str(error)))
        raise
    except slurm.RefusedError as error:
        ledger.settle(number, Job(job_id=None, note=str(error)))
        for key in submission.keys:
            ledger.add_failure(
                Failure(
                    key=key,
                    kind="LAUNCH",
                    message=str(error),
                    fingerprint="refused",
                    submission=number,
                    time=time.time(),
                )
            )
        raise
    if not ledger.settle(number, Job(job_id=ids[0], gate_id=ids[1] if ids[1:] else None)):
        slurm.cancel(ids)
        return False
    slurm.release(ids)
    return True


def _newest(state: State) -> int:
    return max((s.number for s in state.submissions), default=0)


def _sbatch(run: RunFolder, ledger: Ledger, submission: Submission, limits: Slurm) -> list[str]:
    """Submit the array and its gate, both held. Returns their ids."""
    folder = ledger.log_path(submission.number, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    text = array_script(run, submission)
    path = run.path / "submissions" / f"{submission.number:04d}.sh"
    path.write_text(text)
    ids = [slurm.submit_held(path, submission.name, folder / "%a.log")]
    if limits.advance_from == "gate":
        name = f"gate-{submission.name}"
        text = slurm.script(
            name=name,
            command=_command(
                run, submission.code, ["kdhpc.cluster.gate", str(run.path)], limits.prefix
            ),
            num_tasks=None,
            resources=gate_resources(limits, ids[0]),
        )
        path = path.with_suffix(".gate.sh")
        path.write_text(text)
        try:
            ids.append(slurm.submit_held(path, name, folder / "gate.log"))
        except ClusterError:
            slurm.cancel(ids)
            raise
    return ids


def array_script(run: RunFolder, submission: Submission) -> str:
    """Batch script of a submission."""
    return slurm.script(
        name=submission.name,
        command=_command(
            run,
            submission.code,
            ["kdhpc.cluster.task", str(run.path), str(submission.number)],
            submission.resources["prefix"],
        ),
        num_tasks=len(submission.tasks),
        resources=submission.resources,
    )


def _command(run: RunFolder, code: str, words: list[str], prefix: Sequence[str]) -> str:
    """Shell text that runs a module of the code snapshot with this Python."""
    home = run.path / "code" / code
    start = [str(home / "slurm" / "environment.sh"), str(home), sys.executable, "-m", *words]
    return slurm.command_line([*prefix, "bash", *start])


def job_name(run: RunFolder, stage: str, number: int) -> str:
    """`score.paper.3f9a-0007`: stage first (squeue shows few letters), unique in the cluster."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", run.path.name)
    return f"{stage}.{name}.{run.identity}-{number:04d}"
