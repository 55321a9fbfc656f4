"""Run the gate, the small job after an array: it advances the run once.

Its command is `python -m kdhpc.cluster.gate RUN`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from kdhpc.cluster import runs, slurm
from kdhpc.cluster.advance import advance
from kdhpc.cluster.ledger import Ledger
from kdhpc.cluster.observe import State
from kdhpc.cluster.pace import note_history
from kdhpc.cluster.runs import Run
from kdhpc.errors import BusyError, ClusterError, KdhpcError
from kdhpc.storage.run_folder import check_run_folder

PATIENCE_S = 8 * 60.0
"""How long to try again while Slurm does not answer; below the gate's time limit of 10 minutes."""
RETRY_S = 15.0


def main() -> None:
    """Advance the run; tell the user if it has ended, unless that was what cancel.py asked for."""
    path = Path(sys.argv[1])
    check_run_folder(path)  # it may have been moved since the gate was submitted
    _use_newest_code(path)
    run = runs.open_run(path)
    state = patiently(run)
    print(f"{len(state.situation.done)} of {len(state.plan.shards)} shards are done", flush=True)
    if not state.situation.active and not state.situation.stopped:
        tell(run, state)


def patiently(run: Run) -> State:
    """Advance, and try again while Slurm does not answer or another launcher is submitting.

    Raises:
        ClusterError: if Slurm refused everything, or did not answer for eight minutes.
        BusyError: if another launcher was submitting for eight minutes.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            state = advance(run)
            if state.request.executor == "local" or all(
                submission.number in state.jobs for submission in state.submissions
            ):
                return state
        except (ClusterError, BusyError) as error:
            print(error, file=sys.stderr, flush=True)
            if isinstance(error, slurm.RefusedError) or time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            return state
        time.sleep(RETRY_S)


def _use_newest_code(path: Path) -> None:
    """Start again from the code snapshot of the last request, if this process runs another one."""
    newest = path / "code" / Ledger(path).requests()[-1].code
    if Path(__file__).is_relative_to(path / "code") and not Path(__file__).is_relative_to(newest):
        environment = os.environ | {"PYTHONPATH": str(newest)}
        os.execve(  # noqa: S606 (no shell is wanted)
            sys.executable, [sys.executable, "-m", "kdhpc.cluster.gate", str(path)], environment
        )


def tell(run: Run, state: State) -> None:
    """Call the user's hook and send the mail, if asked for; note how fast a complete run was."""
    path, outcome = run.path, "complete" if state.finished else "stopped"
    if state.finished:
        note_history(run, state)
    settings = state.config.slurm
    if settings.on_end:
        _try("slurm.on_end", [settings.on_end, str(path), outcome])
    if settings.mail_user:
        text = f"{len(state.situation.done)} of {len(state.plan.shards)} shards are done.\n"
        command = ["mail", "-s", f"kdhpc: {path.name} {outcome}", settings.mail_user]
        _try("slurm.mail_user", command, text)
    print(f"{path.name}: {outcome}", flush=True)


def _try(key: str, command: list[str], text: str = "") -> None:
    """Run a program that only tells of the end; a failure of it is a warning."""
    try:
        ended = subprocess.run(command, input=text, text=True, check=False, timeout=60)
        problem = f"exit code {ended.returncode}" if ended.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        print(
            f"warning: {key}: {command[0]} did not succeed: {problem}", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    try:
        main()
    except KdhpcError as error:
        sys.exit(f"error: {error}")
