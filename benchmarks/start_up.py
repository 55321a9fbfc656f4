#!/usr/bin/env python
"""Time a task from the start of its process to its first batch, and find where the time goes.

python benchmarks/start_up.py [--turns 5] [--folder build]

The run has the demo's sizes and a truth with fresh weights. `python -m kdhpc.cluster.task` samples
one shard of one batch as in a job: every time in a new process, with the code in the run's folder.
Its record says when the attempt began, and when everything was imported and loaded (ready), so that
the first batch begins. A process that only imports one module after the other takes turns with it.
Times are medians and are counted from when the kernel started the process; the difference to the
CPU seconds was spent waiting for a core. The exit code is 1 if the first batch begins after more
than 3 s.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tables

from kdhpc.cluster import runs
from kdhpc.cluster.ledger import Ledger, Submission
from kdhpc.experiment import arms
from kdhpc.pipeline import LANGUAGE
from kdhpc.plan.shards import Shard
from kdhpc.storage.run_folder import RunFolder, read_record
from kdhpc.storage.work import Work, Written

LIMIT_S = 3.0
Times = dict[str, tuple[float, float | None]]
"""Seconds from the start of the process, and its CPU seconds, by what had been done by then."""
IMPORTS = """
import json, sys, time
from kdhpc.storage.work import process_started
begun, found = process_started(), {}
for statement in sys.argv[1:]:
    exec(statement)
    found[statement] = time.time() - begun, time.process_time()
print(json.dumps(found))
"""
STATEMENTS = (
    "from kdhpc.cluster import task",
    "import torch",
    "from kdhpc.sampling import sampler",
    "from kdhpc.scoring import scorer",
    "import safetensors, tokenizers, pyarrow",
    "from kdhpc.models import huggingface",
)


def main() -> int:
    """Make the run, let tasks and imports take turns, and print the table."""
    parser = tables.options(__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=tables.BUILD)
    options = parser.parse_args()
    path = (options.folder / "start-up").resolve()
    shutil.rmtree(path, ignore_errors=True)
    run, shards = make_run(path, options.turns + 1)
    times: dict[str, list[tuple[float, float | None]]] = {}
    for turn, shard in enumerate(shards):
        for name, seconds in (imports() | task(run, shard)).items():
            if turn:  # not the first turn, which compiles byte code
                times.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(s for s, _ in each) for name, each in times.items()}
    rows: list[dict[str, Any]] = []
    for name, each in times.items():
        cpu = [cpu_s for _, cpu_s in each if cpu_s is not None]
        rows.append(
            {
                "after the start of the process": name,
                "seconds": medians[name],
                "CPU seconds": statistics.median(cpu) if cpu else None,
            }
        )
    tables.save("start_up", "Start of a task", rows, facts={"turns": options.turns})
    shutil.rmtree(path)
    return int(medians["task: first batch begins"] > LIMIT_S)


def make_run(path: Path, num_shards: int) -> tuple[RunFolder, list[Shard]]:
    """Make a run with a truth; return it and its sampling shards of one batch each."""
    from kdhpc.models import huggingface

    words = [
        "demo",
        "cluster=local",
        "sampling.batch_rows=64",
        "sampling.shard_sequences=64",
        f"sampling.train_sequences={64 * num_shards}",
        f"runs_dir={path.parent}",
        f"name={path.name}",
    ]
    config: Any = runs.from_words(words)[1]
    plan = LANGUAGE.plan(config)
    run = runs.open_for(config, plan)
    runs.add_request(run, config, kind="sweep", executor="local")
    work = Work(run, config, plan)
    [truth] = plan.stage(arms.TRUTH)
    tokenizer = huggingface.byte_tokenizer()
    model = huggingface.new_model(
        config.truth.shape, vocab_size=len(tokenizer), length=config.length, eos=0, seed=0
    )
    checkpoint = work.new_path(truth)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    work.publish(truth, Written(path=checkpoint, num_rows=1), time.time())
    return run, plan.arm(arms.SAMPLE_TRUTH, "train")


def environment() -> dict[str, str]:
    """Return the environment of this process, in which Python may cache byte code as usual."""
    return {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def imports() -> Times:
    """Return the time after each import."""
    command = [sys.executable, "-c", IMPORTS, *STATEMENTS]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    times = json.loads(done.stdout.splitlines()[-1])
    return {f"`{name}`": (seconds, cpu_s) for name, (seconds, cpu_s) in times.items()}


def task(run: RunFolder, shard: Shard) -> Times:
    """Run a task with the run's code; return when it read its plan, began to sample, and ended."""
    ledger = Ledger(run.path)
    number = len(ledger.submissions()) + 1
    submission = Submission(
        number=number,
        request=1,
        name=str(number),
        stage=shard.stage,
        tasks=((shard.key,),),
        resources={},
        code=ledger.requests()[-1].code,
        time=time.time(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    ledger.claim(submission)
    command = [sys.executable, "-m", "kdhpc.cluster.task", str(run.path), str(number)]
    [code] = (run.path / "code").iterdir()
    env = environment() | {
        "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", "SLURM_ARRAY_TASK_ID": "0"
    }  # fmt: skip
    before = tables.cpu_of_children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    cpu_s = tables.cpu_of_children() - before
    facts = read_record(run.record_path(shard.key), shard.key).attempt
    begun = facts["process_started"]
    return {
        "task: config and plan are read": (facts["started"] - begun, None),
        "task: first batch begins": (facts["ready"] - begun, None),
        "task: published": (facts["started"] + facts["seconds"] - begun, cpu_s),
    }


if __name__ == "__main__":
    sys.exit(main())
