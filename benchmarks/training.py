#!/usr/bin/env python
"""Compare training speed and memory with the Hugging Face Trainer with DeepSpeed.

python benchmarks/training.py [--dtype bfloat16 float32] [--rounds 3] [--systems NAME ...]

All systems have the same model (SmolLM2-135M's shape), data, batch, dtype, ZeRO stage, attention
(SDPA), optimizer (torch's fused AdamW) and threads. Every system is a process of its own, pinned to
one core on CPUs. They take turns, one optimizer step each, after a first step that is not counted.
Times are medians. Peak memory is the most that the process ever held (on GPUs, the most that the
allocator reserved).

The Trainer has the best settings that were found: torch_compile off (with it, 0.8 times the speed
on the CPU where this was written), adamw_torch_fused, no logging or saving, no gradient
checkpointing, and no worker processes for data. `Trainer, kept memory` also has the allocator
settings that kdhpc gives itself on CPUs. `kdhpc fast` has compile: true, `kdhpc` does not, and
`kdhpc small` has activation checkpointing and logits of 256 positions at once.
All systems of a comparison are in memory at once. --systems chooses fewer of them; the first is the
baseline.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import limits
import tables
import turns

LENGTH = 512
SYSTEMS = ("Trainer", "kdhpc fast", "kdhpc small")
MORE = ("Trainer, kept memory", "kdhpc")
"""Systems that run only if `--systems` names them."""
DTYPES = ("bfloat16", "float32")
WORKER_ENV = {"OMP_NUM_THREADS": "1", "ACCELERATE_LOG_LEVEL": "ERROR"}
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def main() -> None:
    """Start every system, let them take turns, and print a table."""
    parser = tables.options(__doc__)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=4, help="in a micro-batch")
    parser.add_argument("--parts", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS + MORE, metavar="NAME"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
    for dtype in options.dtype:
        compare(dtype, options)


def compare(dtype: str, options: argparse.Namespace) -> None:
    """Time all systems in one dtype."""
    words = ["--sequences", str(options.sequences), "--parts", str(options.parts)]
    words += ["--zero-stage", str(options.zero_stage), "--dtype", dtype]
    workers = {}
    # Workers are started one after the other, so that their first steps do not disturb each other.
    for name in options.systems:
        command = [sys.executable, __file__, "--worker", name, *words]
        allocator = KEPT_MEMORY if name == "Trainer, kept memory" else {}
        workers[name] = turns.Worker(command, WORKER_ENV | allocator)
    answers = turns.take_turns(workers, options.rounds)
    for worker in workers.values():
        worker.stop()
    num_tokens = options.sequences * options.parts * LENGTH
    base = workers[options.systems[0]].ready
    peak = statistics.median(worker.ready["peak_flops_per_s"] for worker in workers.values())
    flops = base["flops_per_token"] * num_tokens
    print(
        f"\n{dtype}: {num_tokens} tokens a step, {options.sequences} sequences at once, "
        f"{base['versions']}"
    )
    print(f"matrix peak, measured: {peak / 1e12:.3f} TFLOP/s")
    print("| system | tokens/s | times the first | of peak | GB | of the first |")
    print("|---|---|---|---|---|---|")
    first, *_ = answers.values()
    for name, all_turns in answers.items():
        each, peak_bytes = turns.median(all_turns), all_turns[-1]["peak_bytes"]
        print(
            f"| {name} | {num_tokens / each:.1f} | {turns.median(first) / each:.2f} "
            f"| {flops / each / peak:.0%} | {peak_bytes / 1e9:.2f} "
            f"| {peak_bytes / first[-1]['peak_bytes']:.2f} |",
            flush=True,
        )
    rounds = {name: [round(a["seconds"], 2) for a in each] for name, each in answers.items()}
    print(rounds, flush=True)


def work(options: argparse.Namespace) -> NoReturn:
    """Be the worker of one system: train, one step per turn, until the process is killed."""
    answer = turns.begin()
    import torch
    import transformers

    from kdhpc.models import devices, huggingface
    from kdhpc.models.sizes import sizes_of_shape, training_flops

    device = devices.pick_device("auto")
    if device.type == "cpu":
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
        devices.set_threads(1)
    model = huggingface.new_model(
        limits.LARGE, vocab_size=limits.VOCAB_SIZE, length=LENGTH, eos=0, seed=0
    )
    ids = torch.randint(
        limits.VOCAB_SIZE, (1024, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    [dtype] = options.dtype
    facts = {
        "peak_flops_per_s": devices.matmul_flops_per_s(device, devices.DTYPES[dtype]),
        "flops_per_token": training_flops(sizes_of_shape(limits.LARGE), limits.VOCAB_SIZE, LENGTH),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }

    def wait() -> None:
        answer({"peak_bytes": tables.peak_bytes(device), **facts})

    train = _trainer if options.worker.startswith("Trainer") else _kdhpc
    train(model, ids, dtype, options, wait)
    sys.exit("trained to the end of the data")


def _kdhpc(
    model: Any, ids: Any, dtype: Any, options: argparse.Namespace, wait: Callable[[], None]
) -> None:
    import numpy as np

    from kdhpc.config.model import Training
    from kdhpc.models import devices
    from kdhpc.scoring.counting import Counting
    from kdhpc.training import ranks
    from kdhpc.training.data import Corpus
    from kdhpc.training.loop import Watch, train

    small = options.worker == "kdhpc small"
    device = devices.pick_device("auto")
    devices.set_allocator(keep_freed=not small)
    ranks.join(rank=0, world_size=1, address="", port=0, device=device)
    train(
        model,
        Corpus(
            ids=ids.numpy().astype(np.uint16),
            length=np.full(len(ids), LENGTH, np.int32),
            counting=Counting(num_prompt=1, eos=-1, count_eos=True),
        ),
        Training(
            batch_sequences=options.sequences * options.parts,
            micro_batch_sequences=options.sequences,
            zero_stage=options.zero_stage,
            dtype=dtype,
            activation_checkpointing=small,
            compile=options.worker == "kdhpc fast",
            head_tokens=256 if small else 4096,
        ),
        seed=0,
        stream="benchmark",
        device=device,
        watch=Watch(on_step=lambda facts: wait()),
    )


def _trainer(
    model: Any, ids: Any, dtype: str, options: argparse.Namespace, wait: Callable[[], None]
) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, training_args

    from kdhpc.models.devices import pick_device
    from kdhpc.training.engine import load_deepspeed

    # Load it without log lines, and without ops that are compiled in the background.
    load_deepspeed(pick_device("auto"))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 10000)
    # The Trainer requires a GPU for bfloat16; DeepSpeed itself does not.
    training_args.is_torch_bf16_gpu_available = lambda: True

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *words: Any, **more: Any) -> None:
            wait()

    class Data(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(ids)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": ids[index], "labels": ids[index]}

    arguments = TrainingArguments(
        output_dir=str(tables.RESULTS / "trainer"),  # nothing is written
        per_device_train_batch_size=options.sequences,
        gradient_accumulation_steps=options.parts,
        learning_rate=5e-4,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=dtype == "bfloat16",
        deepspeed={
            "zero_optimization": {"stage": options.zero_stage},
            "bf16": {"enabled": dtype == "bfloat16"},
            "gradient_clipping": 1.0,
            "train_micro_batch_size_per_gpu": options.sequences,
            "gradient_accumulation_steps": options.parts,
        },
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Data(), callbacks=[Turns()]).train()


if __name__ == "__main__":
    main()
