"""The small job after an array: `python -m kdhpc.cluster.gate RUN` advances the run once."""

import json
import subprocess
import sys
from pathlib import Path

from kdhpc.cluster import runs
from kdhpc.cluster.advance import State, advance
from kdhpc.cluster.task import load_pipeline


def main() -> None:
    """Advance, and tell the user when nothing is left to wait for."""
    path = Path(sys.argv[1])
    manifest = json.loads((path / "run.json").read_text())
    run = runs.folder(path, load_pipeline(manifest["pipeline"]))
    config, plan = runs.current(run)
    state = advance(run, config, plan)
    print(f"{len(state.situation.done)} of {len(plan.shards)} shards are done", flush=True)
    if state.missing and state.situation.active:
        return
    tell(path, state)


def tell(path: Path, state: State) -> None:
    """Call the user's hook and send the mail that the config asks for."""
    outcome = "stopped" if state.missing else "complete"
    slurm = state.config.slurm
    if slurm.on_end:
        subprocess.run([slurm.on_end, str(path), outcome], check=False, timeout=60)
    if slurm.mail_user:
        text = f"{len(state.missing)} shards are missing.\n" if state.missing else "All is done.\n"
        subprocess.run(
            ["mail", "-s", f"kdhpc: {path.name} {outcome}", slurm.mail_user],
            input=text,
            text=True,
            check=False,
            timeout=60,
        )
    print(f"{path.name}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
