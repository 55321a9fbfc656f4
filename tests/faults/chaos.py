"""Play twenty random faults on one `tiny` run of many packed shards, on the real cluster.

    make chaos SEED=1      # PYTHONPATH=tests python -m faults.chaos 1

At the end rerun.py may be called once. Then the logical digest must equal that of an undisturbed
run in local processes. Exit code 0 if it does and no shard was published again.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from commands import ROOT, launch, status
from real_slurm import DEVCLUSTER, SMALL, queue, running_cluster, wait_for

from faults.scenario import published_again
from faults.test_launchers import DEATHS, wrapper
from kdhpc.cluster.ledger import Ledger
from kdhpc.storage.results import logical_digest

RESULTS = "8-merge/results.h5"
NUM_FAULTS = 20
WORDS = [
    "tiny", "sampling.train_sequences=384", "sampling.eval_sequences=192",
    "sampling.shard_sequences=32", "scoring.shard_sequences=48", "scoring.batch_rows=24",
    "teacher.training.checkpoint_every_steps=2",
]  # fmt: skip
ON_SLURM = [
    "cluster=slurm", *SMALL, "slurm.mem_gb=1.3", "slurm.task_min=0.25", "slurm.canary=0",
    "slurm.partition=low", "slurm.max_parallel=2", "slurm.pack=2",
]  # fmt: skip
NODES = ("n1", "n2", "n3", "n4")


class Chaos:
    """A run and everything that is done to it."""

    def __init__(self, seed: int, folder: Path, cluster: Path) -> None:
        self.random = random.Random(seed)  # noqa: S311 (no secret)
        self.folder, self.cluster, self.run = folder, cluster, folder / "tiny"
        self.later: list[threading.Timer] = []
        self.num_launches = 0

    def faults(self) -> dict[str, Callable[[], str]]:
        return {
            "1 scancel": self.cancel,
            "2 kill -9": self.kill,
            "3 node down": self.node_down,
            "4 slurmd stopped": self.stop_slurmd,
            "5 told to stop": self.tell_to_stop,
            "6 requeue": self.requeue,
            "6 preemption": self.preempt,
            "6 SIGTERM": self.terminate,
            "7 slurmctld stopped": self.stop_controller,
            "7 slurmctld killed": self.kill_controller,
            "8 launcher killed": self.kill_launcher,
            "14 slurmdbd killed": self.kill_accounting,
            "15 killed at a checkpoint": self.kill_at_checkpoint,
        }

    # What there is to disturb.

    def running(self) -> list[str]:
        """Return the array elements that are running, without gates."""
        return [line for line in queue("%i:%T") if line.endswith(":RUNNING") and "_" in line]

    def element(self) -> str:
        return self.random.choice(self.running()).partition(":")[0]

    def processes(self) -> list[int]:
        """Return the ids of the Python processes of this run's tasks."""
        words = ["pgrep", "-f", f"kdhpc.cluster.task {self.run}"]
        pids = subprocess.run(words, capture_output=True, text=True).stdout.split()
        return [pid for pid in map(int, pids) if name_of(pid).startswith("python")]

    def devcluster(self, *words: str) -> None:
        command = [DEVCLUSTER, words[0], str(self.cluster), *words[1:]]
        subprocess.run(command, capture_output=True)

    def after(self, seconds: float, *command: str) -> None:
        timer = threading.Timer(
            seconds, lambda: subprocess.run(command, capture_output=True, check=False)
        )
        timer.start()
        self.later.append(timer)

    # What is done to it.

    def cancel(self) -> str:
        element = self.element()
        subprocess.run(["scancel", element], check=False)
        return element

    def kill(self, number: int = 9) -> str:
        pid = self.random.choice(self.processes())
        os.kill(pid, number)
        return str(pid)

    def terminate(self) -> str:
        return self.kill(15)

    def node_down(self) -> str:
        node = self.random.choice(NODES)
        words = ["scontrol", "update", f"nodename={node}"]
        subprocess.run([*words, "state=down", "reason=chaos"], capture_output=True)
        self.after(5, *words, "state=resume")
        return node

    def stop_slurmd(self) -> str:
        node = self.random.choice(NODES)
        self.devcluster("kill", node, "--signal", "STOP")
        command = [DEVCLUSTER, "kill", str(self.cluster), node, "--signal", "CONT"]
        self.after(self.random.choice([5, 30]), *command)
        return node

    def tell_to_stop(self) -> str:
        element = self.element()
        subprocess.run(["scancel", "--signal=USR2", element], check=False)
        return element

    def requeue(self) -> str:
        element = self.element()
        subprocess.run(["scontrol", "requeue", element], capture_output=True)
        return element

    def preempt(self) -> str:
        subprocess.run(
            ["sbatch", "--partition=hi", "--nodes=2", "--exclusive", "--mem=50M", "--wrap=sleep 1",
             "--output=/dev/null", "--chdir=/tmp", "--job-name=other"],
            capture_output=True,
        )  # fmt: skip
        return "two nodes"

    def stop_controller(self) -> str:
        self.devcluster("kill", "slurmctld", "--signal", "STOP")
        time.sleep(8)
        self.devcluster("kill", "slurmctld", "--signal", "CONT")
        return "for 8 s"

    def kill_controller(self) -> str:
        self.devcluster("kill", "slurmctld")
        time.sleep(3)
        self.devcluster("start", "slurmctld")
        return "for 3 s"

    def kill_accounting(self) -> str:
        self.devcluster("kill", "slurmdbd")
        self.after(10, DEVCLUSTER, "start", str(self.cluster), "slurmdbd")
        return "for 10 s"

    def kill_launcher(self) -> str:
        """Type sweep again and kill it at a step, if it gets that far; then type it once more."""
        name = self.random.choice(list(DEATHS))
        self.num_launches += 1
        folder = self.folder / f"bin{self.num_launches}"
        self.sweep(code=None, PATH=wrapper(folder, *DEATHS[name]))
        self.sweep(code=None)
        return name

    def kill_at_checkpoint(self) -> str:
        """Kill a training when the data of a checkpoint is there and its record is not."""
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            for data in self.run.glob("*/*/*.checkpoints/*/*.safetensors"):
                record = data.with_name(f"{data.name.partition('.')[0]}.json")
                if not record.exists():
                    return f"{self.kill()} at {data.name.partition('.')[0]}"
        return f"{self.kill()}, no training was writing"

    def sweep(self, code: int | None = 0, **environment: str) -> None:
        words = [*WORDS, *ON_SLURM, f"runs_dir={self.folder}"]
        launch("sweep", *words, code=code, **environment)

    # The sequence of faults.

    def play(self) -> int:
        self.sweep()
        for number in range(1, NUM_FAULTS + 1):
            name, fault = self.random.choice(list(self.faults().items()))
            wait_for(lambda: bool(self.processes() and self.running()) or self.stuck(), "work")
            if self.stuck():
                if status(self.run)["complete"]:
                    print(f"the run was complete after {number - 1} faults", flush=True)
                    break
                name, fault = "8 launcher killed", self.kill_launcher
            self.wait_for_progress(number)
            try:
                what = fault()
            except (IndexError, ProcessLookupError):
                what = "it was gone already"
            print(f"{number:2d}. {name}: {what}", flush=True)
        for timer in self.later:
            timer.join()
        for name in ("slurmdbd", "slurmctld", *NODES):
            self.devcluster("start", name)
        resume = ["scontrol", "update", "nodename=n[1-4]", "state=resume"]
        subprocess.run(resume, capture_output=True)
        self.wait_for_the_end()
        return number

    def wait_for_the_end(self) -> None:
        """Wait without a limit, because the machine may be slow and every task has a time limit."""
        while not self.stuck():
            time.sleep(2)

    def wait_for_progress(self, number: int) -> None:
        """Wait for more shards, ten seconds at most, to spread the faults over the run."""
        wanted = 4 * number
        deadline = time.monotonic() + self.random.uniform(2, 10)
        while time.monotonic() < deadline and self.num_published() < wanted:
            time.sleep(0.5)

    def num_published(self) -> int:
        return len(list(self.run.glob("[0-9]-*/*/*[0-9a-f].json")))

    def stuck(self) -> bool:
        """Return whether, for ten seconds, nothing was going to start by itself.

        This is so at the end of the run, and if all that is left waits or is held.
        """
        for _ in range(10):
            jobs = [line.split("|") for line in queue("%j|%T|%r")]
            waiting = {"Dependency", "JobHeldUser", "JobHeldAdmin", "launch failed requeued held"}
            if any(name != "other" and reason not in waiting for name, _, reason in jobs):
                return False
            time.sleep(1)
        return True


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def main() -> int:
    seed = int(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="kdhpc-chaos-") as name:
        folder = Path(name)
        launch("sweep", *WORDS, "cluster=local", "local_workers=1", f"runs_dir={folder}/whole")
        expected = logical_digest(folder / "whole/tiny" / RESULTS)
        options = ("--min-job-age", "5", "--memory-mb", "1800", "--cpus-per-node", "2")
        with running_cluster(*options) as cluster:
            started = time.monotonic()
            chaos = Chaos(seed, folder, cluster)
            num_faults = chaos.play()
            complete = status(chaos.run)["complete"]
            if not complete:
                launch("rerun", str(chaos.run))
                chaos.wait_for_the_end()
            shown = launch("status", str(chaos.run), code=None)
            if shown.returncode:
                print(shown.stdout)
                return 1
            merged = logical_digest(chaos.run / RESULTS)
            ledger = Ledger(chaos.run)
            kinds = sorted({failure.kind for failure in ledger.failures()})
            num_shards = chaos.num_published()
            again = published_again(chaos.run)
            print(
                f"seed {seed}: {num_faults} faults, {num_shards} shards, "
                f"{len(ledger.submissions())} submissions, {len(ledger.failures())} failures "
                f"({', '.join(kinds)}), {'no rerun' if complete else 'one rerun'}, "
                f"{time.monotonic() - started:.0f} s, published again {len(again)}, "
                f"digest {merged[:12]} {'equal' if merged == expected else 'DIFFERS'}"
            )
            return 0 if merged == expected and not again else 1


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
