"""A small training for several tests.

As a program it can run on several ranks, be killed, and be resumed:

python tests/toy_training.py OUT [--zero-stages 0 1 2 3] [--states FOLDER] [--every N]
    [--die-at STEP] [--die-in-save-of STEP]

With --die-in-save-of it dies in the middle of a checkpoint's data, two steps after that step.
"""

import argparse
import dataclasses
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from kdhpc.cluster.task import end_process, find_rank
from kdhpc.config.model import Shape, Training
from kdhpc.models import huggingface
from kdhpc.scoring.counting import Counting
from kdhpc.training import checkpoints, ranks
from kdhpc.training.data import Corpus
from kdhpc.training.engine import State
from kdhpc.training.loop import Trained, Watch, train

CPU = torch.device("cpu")
SHAPE = Shape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
RECIPE = Training(
    learning_rate=3e-3, epochs=2.5, batch_sequences=32, micro_batch_sequences=8, eps=1e-6
)
"""A training of 20 steps."""
LONG = dataclasses.replace(RECIPE, epochs=6.25)
"""A training of 50 steps."""
WIDTH = 72  # more than one block of attention


def corpus() -> Corpus:
    generator = np.random.default_rng(0)
    return Corpus(
        ids=generator.integers(0, 257, (256, WIDTH)).astype(np.uint16),
        length=generator.integers(4, WIDTH + 1, 256).astype(np.int32),
        counting=Counting(num_prompt=3, eos=-1, count_eos=True),
    )


def fresh() -> Any:
    return huggingface.new_model(SHAPE, vocab_size=257, length=WIDTH, eos=0, seed=1)


def one_process() -> None:
    torch.set_num_threads(1)
    ranks.join(rank=0, world_size=1, address="", port=0, device=CPU)


def run(recipe: Training = RECIPE, **options: Any) -> Trained:
    return train(fresh(), corpus(), recipe, seed=0, stream="test", device=CPU, **options)


def saver(folder: Path) -> Callable[[State], None]:
    return lambda state: checkpoints.save(
        folder, step=state.step, tensors=state.tensors, recipe="r", num_kept=2
    )


def newest(folder: Path) -> State | None:
    checkpoint = checkpoints.newest(folder, "r")
    return State(step=checkpoint[0], tensors=checkpoint[1]) if checkpoint else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--zero-stages", type=int, nargs="*", default=[1])
    parser.add_argument("--states", type=Path)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--die-in-save-of", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank, world_size = find_rank()
    ranks.join(
        rank=rank,
        world_size=world_size,
        address=os.environ.get("MASTER_ADDR", ""),
        port=int(os.environ.get("MASTER_PORT", "0")),
        device=CPU,
    )
    save = saver(options.states) if options.states else lambda state: None

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    went_on = threading.Event()

    def dying_save(state: State) -> None:
        if state.step == options.die_in_save_of:
            went_on.wait()
            # As if the kernel ended the process in the middle of a write.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(state)

    def on_step(facts: Mapping[str, Any]) -> None:
        if facts["step"] == options.die_in_save_of + 2:
            went_on.set()
        if facts["step"] == options.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for stage in options.zero_stages:
        recipe = dataclasses.replace(
            RECIPE if options.every else LONG,
            zero_stage=stage,
            nodes=world_size,
            checkpoint_every_steps=options.every,
        )
        state = newest(options.states) if options.states and rank == 0 else None
        trained = run(recipe, state=state, watch=Watch(save=dying_save, on_step=on_step))
        if rank == 0:
            (options.out / f"losses-{stage}.json").write_text(json.dumps(trained.losses))
            save_file(dict(trained.weights), options.out / f"weights-{stage}.safetensors")


if __name__ == "__main__":
    main()
    end_process(0)
