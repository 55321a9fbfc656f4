#!/usr/bin/env python
"""Compare the formula for training memory in kdhpc/models/sizes.py with the memory of processes.

python benchmarks/training_memory.py             measure on CPUs and print both
python benchmarks/training_memory.py --plan      print what each GPU would hold by the formula
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import tables
from limits import LARGE, VOCAB_SIZE

from kdhpc.config.model import Shape, Training
from kdhpc.models.sizes import num_parameters, sizes_of_shape, training_memory
from kdhpc.scoring.counting import Counting

LENGTH = 512
SHAPES = {
    "135M": LARGE,
    "360M": Shape(layers=32, hidden=960, heads=15, kv_heads=5, ffn=2560),
    "1.7B": Shape(layers=24, hidden=2048, heads=32, kv_heads=32, ffn=8192),
    "eight layers": dataclasses.replace(LARGE, layers=8),
}
BASE = Training(batch_sequences=8, micro_batch_sequences=2, dtype="bfloat16")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("eight layers", {}),
    ("eight layers", {"dtype": "float32"}),
    ("eight layers", {"micro_batch_sequences": 4}),
    ("eight layers", {"activation_checkpointing": True, "head_tokens": 256}),
    ("eight layers", {"ranks_per_node": 2}),
    ("eight layers", {"ranks_per_node": 2, "zero_stage": 3}),
    ("135M", {}),
    ("135M", {"activation_checkpointing": True, "head_tokens": 256}),
]


def main() -> None:
    """Measure, or print the plan."""
    parser = tables.options(__doc__)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        hold(*CASES[options.case])
    elif options.plan:
        plan()
    else:
        measure()


def plan() -> None:
    """Print a table for the paper's batch of 256 sequences in bfloat16."""
    print("| model | GPUs | ZeRO | at once x parts | states GB | activations GB | total GB |")
    print("|---|---|---|---|---|---|---|")
    for name in ("135M", "360M", "1.7B"):
        sizes = sizes_of_shape(SHAPES[name])
        for gpus in (4, 8, 64):
            for stage in (1, 3) if name == "1.7B" else (1,):
                recipe = Training(
                    batch_sequences=256, micro_batch_sequences=16, dtype="bfloat16",
                    zero_stage=stage, ranks_per_node=gpus,
                )  # fmt: skip
                memory = training_memory(sizes, recipe, vocab_size=VOCAB_SIZE, length=LENGTH)
                states = memory.weights + memory.gradients + memory.optimizer + memory.buckets
                print(
                    f"| {name} | {gpus} | {stage} | {recipe.micro_batch} x {recipe.accumulation} "
                    f"| {states / 1e9:.1f} | {(memory.activations + memory.head) / 1e9:.1f} "
                    f"| {memory.total / 1e9:.1f} |"
                )


def measure() -> None:
    """Run every case in processes of its own and print a table."""
    print("| model | setting | formula GB | measured GB |\n|---|---|---|---|")
    for index, (name, changes) in enumerate(CASES):
        recipe, sizes = dataclasses.replace(BASE, **changes), sizes_of_shape(SHAPES[name])
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--case", str(index)],
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
                | {"RANK": str(rank), "WORLD_SIZE": str(recipe.world_size)}
                | {"MASTER_PORT": str(20000 + os.getpid() % 10000)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(recipe.world_size)
        ]
        answers = [rank.communicate()[0] for rank in ranks]
        measured = json.loads(answers[0].splitlines()[-1])
        formula = training_memory(sizes, recipe, vocab_size=VOCAB_SIZE, length=LENGTH).total
        what = ", ".join(f"{key}={value}" for key, value in changes.items()) or "as they are"
        millions = num_parameters(sizes, VOCAB_SIZE) / 1e6
        print(
            f"| {name} ({millions:.0f}M) | {what} | {formula / 1e9:.2f} | {measured / 1e9:.2f} |",
            flush=True,
        )


def hold(name: str, changes: dict[str, Any]) -> None:
    """Train two steps and print by how much peak memory grew since the model was made."""
    import numpy as np
    import torch

    from kdhpc.cluster.task import find_rank
    from kdhpc.models import devices, huggingface
    from kdhpc.training import ranks
    from kdhpc.training.data import Corpus
    from kdhpc.training.engine import load_deepspeed
    from kdhpc.training.loop import Watch, train

    devices.set_threads(1)
    rank, world_size = find_rank()
    cpu = torch.device("cpu")
    ranks.join(
        rank=rank, world_size=world_size, address="127.0.0.1",
        port=int(os.environ["MASTER_PORT"]), device=cpu,
    )  # fmt: skip
    load_deepspeed(cpu)
    before = tables.peak_bytes()
    recipe = dataclasses.replace(BASE, **changes)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (64, LENGTH)).astype(np.uint16)
    train(
        huggingface.new_model(SHAPES[name], vocab_size=VOCAB_SIZE, length=LENGTH, eos=0, seed=0),
        Corpus(
            ids=ids,
            length=np.full(64, LENGTH, np.int32),
            counting=Counting(num_prompt=1, eos=-1, count_eos=True),
        ),
        recipe,
        seed=0,
        stream="memory",
        device=cpu,
        watch=Watch(on_step=lambda facts: _end(before) if facts["step"] == 2 else None),
    )


def _end(before: float) -> None:
    print(tables.peak_bytes() - before, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
