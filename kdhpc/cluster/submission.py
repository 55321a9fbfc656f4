"""Submit one array and its gate: claim, submit held, record, release.

The steps have this order so that a launcher that dies between any two of them leaves a state that
the next caller can repair.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from kdhpc.cluster import slurm
from kdhpc.cluster.decide import Batch
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission
from kdhpc.cluster.observe import State
from kdhpc.cluster.resources import Resources, array_resources, gate_resources
from kdhpc.cluster.runs import Run
from kdhpc.config.run import RunConfig
from kdhpc.errors import ClusterError


def submit(run: Run, ledger: Ledger, state: State, batch: Batch) -> bool:
    """Submit one batch: claim, submit held, record, release.

    Returns:
        Whether it was submitted; False if another launcher or a newer request came first.

    Raises:
        OverLimitError: if the user may not have so many jobs in the queue.
        RefusedError: if Slurm refuses a script; failures of the shards are recorded.
        ClusterError: if Slurm does not answer.
    """
    limits = state.config.slurm
    uses_device = run.pipeline.stage(batch.stage).uses_device
    resources = _possible_resources(state.config, batch, uses_device)
    with_gate = limits.advance_from == "gate"
    gate = gate_resources(limits, batch.changes.asked) if with_gate else None
    number = max((s.number for s in ledger.submissions()), default=0) + 1
    newer = {key for s in ledger.submissions() if s.number > _newest(state) for key in s.keys}
    if newer & {key for task in batch.tasks for key in task}:
        return False
    submission = Submission(
        number=number,
        request=state.request.number,
        name=job_name(run, batch.stage, number),
        stage=batch.stage,
        tasks=batch.tasks,
        resources=asdict(resources),
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
        ids = _sbatch(run, ledger, submission, resources, gate)
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
    if ledger.requests()[-1].kind == "cancel":  # typed meanwhile: it has not seen these jobs
        slurm.cancel(ids)
        return False
    slurm.release(ids)
    ledger.note_released(number)
    return True


def _possible_resources(config: RunConfig, batch: Batch, uses_device: bool) -> Resources:
    """Return the resources of an array, without the remedies if no node has what they ask for.

    Otherwise the array would wait for ever, and what went wrong before would be forgotten.
    """
    from kdhpc.cluster.batch_script import batch_script

    resources = array_resources(config, batch, uses_device)
    changes = batch.changes
    if changes.time_factor == changes.mem_factor == 1 and not changes.avoid:
        return resources
    text = batch_script(
        name="test", command="true", num_tasks=len(batch.tasks), resources=resources
    )
    objection = slurm.check_script(text)
    if not objection:
        return resources
    print(f"{batch.stage}: without its remedies, because of {objection}", file=sys.stderr)
    same = replace(changes, time_factor=1.0, mem_factor=1.0, avoid=())
    return array_resources(config, replace(batch, changes=same), uses_device)


def _newest(state: State) -> int:
    """Return the number of the newest submission that was observed; 0 if there was none."""
    return max((s.number for s in state.submissions), default=0)


def _sbatch(
    run: Run,
    ledger: Ledger,
    submission: Submission,
    resources: Resources,
    gate: Resources | None,
) -> list[str]:
    """Submit the array and its gate, if it has one, both held. Returns their ids."""
    from kdhpc.cluster.batch_script import batch_script  # submitit loads only where it is needed

    folder = ledger.log_path(submission.number, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    task = ["kdhpc.cluster.task", str(run.path), str(submission.number)]
    text = batch_script(
        name=submission.name,
        command=_command(run, submission.code, task, resources.prefix),
        num_tasks=len(submission.tasks),
        resources=resources,
    )
    path = run.path / "submissions" / f"{submission.number:04d}.sh"
    path.write_text(text)
    if gate is None:
        return [slurm.submit_held(path, submission.name, folder / "%a.log")]
    words = ["kdhpc.cluster.gate", str(run.path)]
    command = _command(run, submission.code, words, ())  # a container has no sbatch

    def gate_script(resources: Resources) -> str:
        name = submission.gate_name
        return batch_script(name=name, command=command, num_tasks=None, resources=resources)

    gate_path = path.with_suffix(".gate.sh")
    ids = [slurm.submit_held(path, submission.name, folder / "%a.log")]
    gate_path.write_text(gate_script(replace(gate, dependency=f"afterany:{ids[0]}")))
    try:
        ids.append(slurm.submit_held(gate_path, submission.gate_name, folder / "gate.log"))
    except ClusterError:
        slurm.cancel(ids)
        raise
    return ids


def _command(run: Run, code: str, words: list[str], prefix: Sequence[str]) -> str:
    """Return shell text that runs a module of the code snapshot with this Python."""
    home = run.path / "code" / code
    start = [str(home / "slurm" / "environment.sh"), str(home), sys.executable, "-m", *words]
    return slurm.command_line([*prefix, "bash", *start])


def job_name(run: Run, stage: str, number: int) -> str:
    """Return a name such as `score.paper.3f9a-0007`, which is unique in the cluster.

    The stage comes first, because squeue shows only the first letters.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", run.path.name)
    return f"{stage}.{name}.{run.identity}-{number:04d}"
