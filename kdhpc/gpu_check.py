"""Check what one GPU does with kdhpc, in about five minutes, before hours are spent on it.

    python -m kdhpc.gpu_check [--out gpu_check.json] [--device auto] [--quick] [--vllm PYTHON]

Every check says what it found, and one that fails names what kdhpc does instead. Then the speeds of
sampling, scoring and training are measured for the three models of the paper, with random weights,
beside the limit that follows from the bandwidth and the matrix rate measured here, and beside
`generate` of transformers. The table is printed, and written as JSON, which is what to send along
with a question. `--quick` takes toy models in their place, as a CPU does. `--vllm` names the Python
of an environment that has vLLM, which is then timed with the same weights; that takes minutes more.
"""

import argparse
import functools
import gc
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from kdhpc import vllm_speed
from kdhpc.config.model import Shape, Training
from kdhpc.errors import KdhpcError
from kdhpc.models import attention, devices, huggingface
from kdhpc.models.dense import Dense
from kdhpc.models.sizes import (
    NUM_BYTES,
    forward_flops,
    key_value_bytes,
    num_parameters,
    sizes_of_shape,
    training_flops,
)
from kdhpc.sampling.decoding import DenseDecoder
from kdhpc.sampling.draws import DRAWS
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.likelihood import token_log_probs
from kdhpc.selection import Selection
from kdhpc.training import ranks
from kdhpc.training.data import Corpus
from kdhpc.training.loop import Watch, train

TOY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, init_std=0.2)
NO_END = Counting(num_prompt=1, eos=-1, count_eos=True)
"""Every token counts and none ends a sequence, so that every row has its full length."""
VLLM_LIMIT_S = 1800.0
"""Seconds that vLLM gets to start, compile and sample two batches of one model."""
CHI_SQUARE_P = 1e-4
"""A draw from the right distribution fails its check once in this many machines."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the sizes with which it is timed."""

    name: str
    shape: Shape
    vocab_size: int
    length: int
    rows: int
    """Rows that are sampled together."""
    score_rows: int
    micro_batch: int
    dtype: str
    trains: bool = True


def paper_cases() -> list[Case]:
    """Return the paper's three models, with the sizes of preset `paper`."""
    size = {"vocab_size": 49152, "length": 512, "score_rows": 32, "micro_batch": 16}
    shapes = {
        "1.7B": Shape(layers=24, hidden=2048, heads=32, kv_heads=32, ffn=8192),
        "360M": Shape(layers=32, hidden=960, heads=15, kv_heads=5, ffn=2560),
        "135M": Shape(layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536),
    }
    return [
        Case(
            name=name,
            shape=shape,
            dtype="bfloat16",
            trains=name != "1.7B",
            rows=512 if name == "1.7B" else 2048,
            **size,
        )
        for name, shape in shapes.items()
    ]


def toy_cases() -> list[Case]:
    """Return one small model, which a CPU finishes in seconds."""
    return [
        Case(
            name="toy", shape=TOY, vocab_size=257, length=48, rows=16, score_rows=16,
            micro_batch=16, dtype="float32",
        )
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found."""

    name: str
    passed: bool
    found: str
    otherwise: str
    """What kdhpc does where the check fails."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A measured speed."""

    model: str
    what: str
    tokens_per_s: float
    limit: float | None
    """Tokens per second at the bandwidth and matrix rate that were measured; None for a peer."""
    flops_per_token: float
    """Operations of the model for each token."""

    @property
    def share(self) -> float | None:
        return self.tokens_per_s / self.limit if self.limit else None


def main(arguments: list[str]) -> int:
    """Run the checks, print tables, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="toy models only")
    parser.add_argument("--vllm", metavar="PYTHON", help="time vLLM too, with this Python")
    parser.add_argument("--rank", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = devices.pick_device(options.device)
    if options.rank:
        return _one_of_two(device, *options.rank)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    ranks.join(rank=0, world_size=1, address="", port=0, device=device)
    about = describe(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    checks = []
    for name, (check, otherwise) in CHECKS.items():
        checks.append(_checked(name, check, otherwise, device))
        verdict = "ok  " if checks[-1].passed else "FAIL"
        print(f"{verdict} {name}: {checks[-1].found}", flush=True)
        if not checks[-1].passed:
            print(f"     otherwise: {otherwise}", flush=True)
    speeds = []
    cases = toy_cases() if options.quick or device.type == "cpu" else paper_cases()
    for case in cases:
        for speed in measured(case, device, about, options.vllm):
            speeds.append(speed)
            share = f", {speed.share:.2f} of the limit" if speed.share else ""
            print(
                f"{case.name} {speed.what}: {speed.tokens_per_s:,.0f} tokens/s{share}", flush=True
            )
    report = {
        "about": about,
        "checks": [asdict(check) for check in checks],
        "speeds": [asdict(speed) | {"share": speed.share} for speed in speeds],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = sum(not check.passed for check in checks)
    print(f"{options.out}: {len(checks)} checks, {failed} failed")
    return 1 if failed else 0


def describe(device: torch.device) -> dict[str, Any]:
    """Return what there is, and its measured limits."""
    about: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "num_gpus": devices.num_gpus(),
            "cuda": torch.version.cuda or "",
            "hip": torch.version.hip or "",
        }
    about |= {
        "gb_per_s": round(bandwidth(device) / 1e9, 1),
        "tflop_per_s_float32": round(devices.matmul_flops_per_s(device, torch.float32) / 1e12, 3),
        "tflop_per_s_bfloat16": round(devices.matmul_flops_per_s(device, torch.bfloat16) / 1e12, 3),
    }
    return about


def bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that are read and written when a large buffer is copied."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device, 5)


def _seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Return the median seconds of some work, after it has been done once to warm up."""
    seconds = []
    for _ in range(times + 1):
        devices.synchronize(device)
        began = time.perf_counter()
        work()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _checked(
    name: str, check: Callable[[torch.device], str], otherwise: str, device: torch.device
) -> Check:
    """Run one check; whatever it raises is a failure with one line."""
    try:
        return Check(name=name, passed=True, found=check(device), otherwise=otherwise)
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Check(name=name, passed=False, found=found, otherwise=otherwise)


class CheckError(Exception):
    """A check found something else than it should."""


def require(condition: bool, otherwise: str) -> None:
    """Fail a check, with what was found, unless a condition holds."""
    if not condition:
        raise CheckError(otherwise)


def check_products(device: torch.device) -> str:
    """Logits of a 16-bit model are sums in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 256, generator=generator).to(torch.bfloat16)
    hidden = torch.randn(64, 256, generator=generator).to(torch.bfloat16)
    exact = hidden.double() @ weight.double().T
    logits = devices.frozen_head(weight.to(device))(hidden.to(device)).cpu()
    error = float((logits.double() - exact).abs().max() / exact.abs().max())
    require(logits.dtype == torch.float32, f"logits are {logits.dtype}")
    require(error < 1e-5, f"logits differ by {error:.1e} of the largest")
    return f"logits differ from float64 by {error:.1e} of the largest"


def check_attention(device: torch.device) -> str:
    """A fused kernel takes the heads of the three models, with and without gradients."""
    taken = []
    for dtype in (torch.float32, torch.bfloat16):
        for groups in (1, 3):
            q = torch.randn(2, 2 * groups, 32, 64, device=device, dtype=dtype, requires_grad=True)
            k, v = (torch.randn(2, 2, 32, 64, device=device, dtype=dtype) for _ in range(2))
            out = attention.causal(q, k, v)
            out.float().sum().backward()  # type: ignore[no-untyped-call]
            wide = [
                x.detach().repeat_interleave(n, 1).double() for x, n in ((k, groups), (v, groups))
            ]
            later = torch.full((32, 32), -torch.inf, device=device).triu_(1)
            scores = q.detach().double() @ wide[0].transpose(2, 3) / 8 + later
            error = float((out.detach().double() - scores.softmax(-1) @ wide[1]).abs().max())
            require(error < (1e-4 if dtype == torch.float32 else 0.05), f"{dtype}: {error:.1e}")
            taken.append(f"{str(dtype)[6:]} {groups} queries a key: {error:.1e}")
    return "largest errors " + "; ".join(taken)


def toy(device: torch.device, dtype: torch.dtype = torch.float32) -> Dense:
    """Return a small Llama whose distributions are far from uniform."""
    model = huggingface.new_model(TOY, vocab_size=257, length=64, eos=0, seed=0)
    weights = model.state_dict()
    return Dense(model.config.to_dict(), weights.__getitem__, dtype=dtype, device=device)


def sampler_of(model: Dense, *, rows: int, length: int, draw: str = "inverse_cdf") -> Sampler:
    """Return a sampler whose rows all start with one token and never end."""
    return Sampler(
        model, prompts=[Prompt(ids=(1,))], length=length, batch_rows=rows,
        selection=Selection(), draw=draw, counting=NO_END,
    )  # fmt: skip


def check_kernels(device: torch.device) -> str:
    """Compiled steps that read the used length only give the logits of plain ones with a mask."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, rows, length = toy(device, dtype), 8, 64
    plain, fast = (DenseDecoder(model, rows, length, settles=settles) for settles in (False, True))
    plain.attend_by("fused")
    ids = torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    position, errors = torch.zeros(1, dtype=torch.int64, device=device), []
    with torch.inference_mode():
        for index in range(length):
            one, other = (
                decoder.step(ids[:, index], position, decoder.num_keys(index)).log_softmax(1)
                for decoder in (plain, fast)
            )
            errors.append(float((one - other).abs().mean()))
            position += 1
    worst = max(errors)
    require(worst < (0.05 if device.type == "cuda" else 1e-4), f"they differ by {worst:.1e} nats")
    if device.type != "cuda":
        return f"nothing is compiled on a CPU; products and a mask differ by {worst:.1e} nats"
    require(fast.attends == "used", "attention over the used length: the warning above says why")
    require(fast.is_compiled, "nothing is compiled: the warning above says why")
    return f"they differ by {worst:.1e} nats"


def check_capture(device: torch.device) -> str:
    """A step is captured as a CUDA graph, and replays draw what eager steps draw."""
    drawn = []
    for capture in (False, True):
        sampler = sampler_of(toy(device), rows=16, length=64)
        sampler.capture = sampler.capture and capture
        drawn.append(sample(sampler, rows=range(32), seed=0, stream="check").ids)
    different = float(np.mean(drawn[0] != drawn[1]))
    require(not different, f"{different:.1%} of the ids differ")
    if device.type == "cuda":
        require(bool(sampler.graphs), "no step was captured; the warning above says why")
        return f"{len(sampler.graphs)} graphs; replays draw the same ids as eager steps"
    return "no graphs on a CPU; two samplers draw the same ids"


def check_draws(device: torch.device) -> str:
    """Tokens are drawn with their probabilities: a chi-square test of both ways to draw."""
    from scipy.stats import chi2

    model, rows = toy(device), 4096
    said = []
    for draw in DRAWS:
        samples = sample(
            sampler_of(model, rows=rows, length=2, draw=draw), rows=range(4 * rows), seed=1,
            stream="check",
        )  # fmt: skip
        ids = torch.tensor([[1, 0]], device=device)
        hidden = model.hidden(ids)[:, 0]
        p = model.head(hidden).double().softmax(1)[0].cpu().numpy()
        count = np.bincount(samples.ids[:, 1].astype(np.int64), minlength=len(p))
        large = p * count.sum() >= 5
        observed = np.append(count[large], count[~large].sum())
        expected = np.append(p[large], p[~large].sum()) * count.sum()
        statistic = float(((observed - expected) ** 2 / expected).sum())
        p_value = float(chi2.sf(statistic, len(observed) - 1))
        require(p_value > CHI_SQUARE_P, f"{draw}: p = {p_value:.1e}")
        said.append(f"{draw} p = {p_value:.2g}")
    return "chi-square " + ", ".join(said)


def check_scores(device: torch.device) -> str:
    """Scores are those of this machine's CPU."""
    ids = torch.randint(0, 257, (8, 64), generator=torch.Generator().manual_seed(0))
    here, there = (
        token_log_probs(toy(place), ids.to(place), head_tokens=64)[0, :, 1:].cpu()
        for place in (device, torch.device("cpu"))
    )
    error = float((here - there).abs().max())
    require(error < 1e-3, f"log-probabilities differ by {error:.1e} nats")
    return f"log-probabilities differ from the CPU's by at most {error:.1e} nats"


def random_corpus(num_rows: int, length: int, vocab_size: int) -> Corpus:
    """Return random ids, from which a model can learn their range and nothing else."""
    ids = np.random.default_rng(0).integers(0, vocab_size // 2, (num_rows, length))
    return Corpus(
        ids=ids.astype(np.uint16), length=np.full(num_rows, length, np.int32), counting=NO_END
    )


def losses_of(device: torch.device, *, compiled: bool = False) -> list[float]:
    """Train a toy for eight steps, with layers compiled or not, and return the losses."""
    losses: list[float] = []
    settings = Training(
        learning_rate=3e-3, epochs=2.0, batch_sequences=32, micro_batch_sequences=16,
        compile=compiled,
    )  # fmt: skip
    train(
        huggingface.new_model(TOY, vocab_size=257, length=64, eos=0, seed=0),
        random_corpus(128, 64, 257), settings, seed=0, stream="check", device=device,
        watch=Watch(on_step=lambda facts: losses.append(float(facts["loss"]))),
    )  # fmt: skip
    return losses


def check_training(device: torch.device) -> str:
    """Eight steps with DeepSpeed lower the loss."""
    losses = losses_of(device)
    require(bool(np.isfinite(losses).all()), f"losses {losses}")
    require(losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    return f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"


def check_compiled(device: torch.device) -> str:
    """A training with compiled layers has the losses of one without."""
    if device.type == "cpu":
        return "on a CPU: not tried, because it takes long"
    plain, compiled = (np.array(losses_of(device, compiled=c)) for c in (False, True))
    error = float(np.abs(compiled / plain - 1).max())
    require(error < 1e-3, f"losses differ by {error:.1e} of their values")
    return f"losses differ by at most {error:.1e} of their values"


def check_two_ranks(device: torch.device) -> str:
    """Two processes, with a GPU each where there are two, sum their values."""
    if device.type == "cuda" and devices.num_gpus() < 2:
        return "one GPU: not tried"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kdhpc.gpu_check", "--device", device.type, "--rank"]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=os.environ | {"LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    require(not any(process.returncode for process in both), said[0][-300:])
    return said[0].strip().splitlines()[-1]


def _one_of_two(device: torch.device, rank: int, port: int) -> int:
    """Be one of two ranks that sum a large tensor."""
    ranks.join(rank=rank, world_size=2, address="127.0.0.1", port=port, device=device)
    tensor = torch.full((2**24,), float(rank + 1), device=device)

    def total() -> None:
        tensor.fill_(rank + 1)
        distributed.all_reduce(tensor)

    seconds = _seconds(total, device, 3)
    require(bool((tensor == 3).all()), "two ranks have another sum")
    print(f"sums of 64 MB over two ranks at {2**26 / seconds / 1e9:.1f} GB/s", flush=True)
    return 0


CHECKS: dict[str, tuple[Callable[[torch.device], str], str]] = {
    "products": (
        check_products,
        "factors are widened to float32 first, with the head's weights in memory twice",
    ),
    "attention": (check_attention, "nothing: it is refused; use device=cpu"),
    "kernels": (
        check_kernels,
        "attention with a mask, or a kernel for each operation: slower, and as exact",
    ),
    "capture": (check_capture, "steps run one by one without graphs, several times as slow"),
    "draws": (check_draws, "nothing: samples cannot be trusted; use device=cpu and report it"),
    "scores": (check_scores, "nothing: scores cannot be trusted; use device=cpu and report it"),
    "training": (check_training, "nothing: trainings fail; use device=cpu and report it"),
    "compiled training": (check_compiled, "nothing: leave compile=false, the default"),
    "two ranks": (check_two_ranks, "nothing: set ranks_per_node=1, nodes=1 and report it"),
}
"""By name: what is checked, and what kdhpc does where it fails."""


PEERS = {"generate": "transformers' generate", "vllm": "vLLM"}


def measured(
    case: Case, device: torch.device, about: dict[str, Any], vllm: str | None = None
) -> Iterator[Speed]:
    """Yield the speeds of sampling, scoring and training of one model, as far as it fits.

    Args:
        case: the model and its sizes.
        device: where to measure.
        about: limits from `describe`; gains vLLM's version.
        vllm: a Python that has vLLM, to time that too.
    """
    works = {"sampling": _sampling, "scoring": _scoring, "generate": _generating}
    if vllm:
        works["vllm"] = functools.partial(_vllm, vllm, about)
    if case.trains:
        works["training"] = _training
    for what, work in works.items():
        try:
            tokens, seconds = work(case, device)
        except Exception as error:  # the other speeds are still worth knowing
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"{case.name} {PEERS.get(what, what)}: not measured: {found}", flush=True)
            continue
        finally:
            gc.collect()  # samplers are in cycles of references
            if device.type == "cuda":
                torch.cuda.empty_cache()
        yield Speed(
            model=case.name, what=PEERS.get(what, what), tokens_per_s=tokens / seconds,
            limit=None if what in PEERS else limit(case, what, about),
            flops_per_token=(training_flops if what == "training" else forward_flops)(
                sizes_of_shape(case.shape), case.vocab_size, case.length
            ),
        )  # fmt: skip


def limit(case: Case, what: str, about: dict[str, Any]) -> float:
    """Return the tokens per second that the measured bandwidth and matrix rate allow."""
    sizes, vocab, length = sizes_of_shape(case.shape), case.vocab_size, case.length
    flop_per_s = 1e12 * about[f"tflop_per_s_{case.dtype}"]
    if what == "training":
        return float(flop_per_s / training_flops(sizes, vocab, length))
    if what == "scoring":
        return float(flop_per_s / forward_flops(sizes, vocab, length))
    # A step reads all weights once, and on average half of the keys and values.
    keys = case.rows * length / 2
    num_bytes: float = NUM_BYTES[case.dtype] * num_parameters(sizes, vocab)
    num_bytes += key_value_bytes(sizes, case.dtype) * keys
    flops = 2.0 * num_parameters(sizes, vocab) * case.rows + 4 * sizes.layers * sizes.hidden * keys
    return float(case.rows / (num_bytes / (1e9 * about["gb_per_s"]) + flops / flop_per_s))


def _model(case: Case, device: torch.device) -> Dense:
    model = huggingface.new_model(
        case.shape, vocab_size=case.vocab_size, length=case.length, eos=0, seed=0
    )
    weights = model.state_dict()
    dtype = devices.DTYPES[case.dtype]
    return Dense(model.config.to_dict(), weights.__getitem__, dtype=dtype, device=device)


def _sampling(case: Case, device: torch.device) -> tuple[float, float]:
    sampler = sampler_of(_model(case, device), rows=case.rows, length=case.length)
    seconds = _seconds(lambda: sampler.batch(0, "speed", range(case.rows)), device, 1)
    return case.rows * (case.length - 1), seconds


def _scoring(case: Case, device: torch.device) -> tuple[float, float]:
    model = _model(case, device)
    ids = torch.randint(0, case.vocab_size, (case.score_rows, case.length), device=device)
    seconds = _seconds(lambda: token_log_probs(model, ids, head_tokens=8192), device, 3)
    return case.score_rows * case.length, seconds


def _generating(case: Case, device: torch.device) -> tuple[float, float]:
    """Time the peer: `generate` with the same weights, from the whole vocabulary."""
    model = huggingface.new_model(
        case.shape, vocab_size=case.vocab_size, length=case.length, eos=0, seed=0
    )
    model = model.to(device, devices.DTYPES[case.dtype]).eval()
    ids = torch.ones((case.rows, 1), dtype=torch.int64, device=device)

    def generate() -> Tensor:
        drawn: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, use_cache=True,
            min_new_tokens=case.length - 1, max_new_tokens=case.length - 1, pad_token_id=0,
        )  # fmt: skip
        return drawn

    return case.rows * (case.length - 1), _seconds(generate, device, 1)


def _vllm(
    python: str, about: dict[str, Any], case: Case, device: torch.device
) -> tuple[float, float]:
    """Time vLLM in a process of its own, with the same weights and as many rows.

    Its version is added to `about`.
    """
    model = huggingface.new_model(
        case.shape, vocab_size=case.vocab_size, length=case.length, eos=0, seed=0
    )
    # What this process says of its rank is not for vLLM.
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a vLLM for GPUs would take one
    with tempfile.TemporaryDirectory() as folder:
        model.to(devices.DTYPES[case.dtype]).save_pretrained(folder)
        words = (folder, case.dtype, str(case.rows), str(case.length))
        finished = subprocess.run(
            [python, "-I", str(Path(vllm_speed.__file__)), *words], capture_output=True, text=True,
            env=environment, timeout=VLLM_LIMIT_S,
        )  # fmt: skip
    if finished.returncode:
        raise CheckError(finished.stderr.strip()[-200:])
    answer = json.loads(finished.stdout.splitlines()[-1])
    about["vllm"] = answer["version"]
    return answer["tokens"], answer["seconds"]


def _training(case: Case, device: torch.device) -> tuple[float, float]:
    """Time steps of one rank; the first ones warm up."""
    seconds: list[float] = []
    settings = Training(
        batch_sequences=case.micro_batch, micro_batch_sequences=case.micro_batch, epochs=1.0,
        dtype="bfloat16" if case.dtype == "bfloat16" else "float32",
    )  # fmt: skip
    num_steps = 10
    train(
        huggingface.new_model(
            case.shape, vocab_size=case.vocab_size, length=case.length, eos=0, seed=0
        ),
        random_corpus(num_steps * case.micro_batch, case.length, case.vocab_size), settings,
        seed=0, stream="speed", device=device,
        watch=Watch(on_step=lambda facts: seconds.append(float(facts["step_s"]))),
    )  # fmt: skip
    return case.micro_batch * case.length, statistics.median(seconds[3:])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # DeepSpeed looks for compiled operators
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", cache)
        try:
            sys.exit(main(sys.argv[1:]))
        except KdhpcError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
