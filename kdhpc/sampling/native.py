"""The optional CPU extension that `sampling.engine=native` and `scoring.engine=native` use.

It implements what is slow between the matrix products of a decoding step (`native.cpp`).
`make native` builds it for the processor of the node that it runs on, and puts it into the virtual
environment under a name that depends on its source and on torch's version. If it is missing, or a
node lacks a feature of that processor, plain torch does the work and a warning says why.
"""

import functools
import hashlib
import logging
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TypeGuard, cast

import torch
from torch import Tensor

from kdhpc.models.dense import Dense
from kdhpc.models.devices import Linear
from kdhpc.models.loading import LanguageModel
from kdhpc.sampling import draws
from kdhpc.sampling.decoding import DenseDecoder
from kdhpc.sampling.draws import InverseCdf
from kdhpc.selection import Selection

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
VECTOR = 16
"""Numbers in a vector of the extension; cache lengths and the sizes of a model are multiples."""
HELP = "make native builds it"


def library() -> Path:
    """Return the path of the extension, whether it is built or not."""
    words = SOURCE.read_bytes() + f"{torch.__version__} {FLAGS}".encode()
    name = hashlib.sha256(words).hexdigest()[:12]
    return Path(sysconfig.get_paths()["platlib"]) / "kdhpc_native" / name / "kdhpc_native.so"


def build() -> Path:
    """Compile the extension for this machine's processor, which needs a C++ compiler."""
    from torch.utils import cpp_extension

    path = library()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".features").write_text(" ".join(sorted(_features())))
    # ninja is installed with kdhpc's dependencies, in the folder of this Python.
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    cpp_extension.load(
        name=path.stem,
        sources=[str(SOURCE)],
        extra_cflags=FLAGS,
        build_directory=str(path.parent),
        is_python_module=False,
        with_cuda=False,
    )
    return path


def _features() -> frozenset[str]:
    """Return the processor's feature flags as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split()[2:])


@functools.cache
def missing() -> str:
    """Load the extension; return why it cannot be used here, or an empty string."""
    path = library()
    features = path.with_suffix(".features")
    if not path.exists() or not features.exists():
        return f"it is not built ({HELP})"
    lacks = set(features.read_text().split()) - _features()
    if lacks:
        return f"it was built for a processor with {', '.join(sorted(lacks)[:3])} ({HELP})"
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    return ""


def unfit(model: LanguageModel) -> str:
    """Return why the extension cannot decode this model, or an empty string."""
    if model.device.type != "cpu":
        return f"it is for CPUs, and the model is on {model.device.type}"
    if not isinstance(model, Dense):
        return f"it is for models on kdhpc's own code, and this is {model.kind} on transformers"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16, and this is {model.dtype}"
    if model.family.wide_rotary and model.dtype != torch.float32:
        return f"it is for float32 if the model is {model.kind}, and this is {model.dtype}"
    sizes = {
        "head size": (model.head_size, 2 * VECTOR),
        "hidden size": (model.hidden_size, VECTOR),
        "size of feed-forward layers": (model.ffn, VECTOR),
    }
    for name, (size, unit) in sizes.items():
        if size % unit:
            return f"the model's {name} is {size}, which is not a multiple of {unit}"
    return ""


def usable(model: LanguageModel, setting: str) -> TypeGuard[Dense]:
    """Return whether the extension can decode this model; if not, log why and name the setting."""
    reason = missing() or unfit(model)
    if reason:
        log.warning("%s=native: %s; plain torch does the work", setting, reason)
    return not reason


@functools.cache
def has_head() -> bool:
    """Return whether the extension can compute logits, which takes oneDNN's AVX-512 kernels."""
    if missing():
        return False
    try:
        packed = torch.ops.kdhpc.pack_head(torch.zeros((VECTOR, 2), dtype=torch.bfloat16))
        torch.ops.kdhpc.head(torch.zeros((1, 2), dtype=torch.bfloat16), packed, VECTOR)
    except RuntimeError:
        return False
    return True


def head_for(model: LanguageModel, setting: str) -> Linear | None:
    """Return the extension's head of a model; if it cannot be used, log why and return None."""
    if not usable(model, setting):
        return None
    head = head_of(model)
    if head is None:
        log.warning(
            "%s=native: the extension needs a bfloat16 model and AVX-512 here; plain torch does "
            "the work",
            setting,
        )
    return head


def head_of(model: Dense) -> Linear | None:
    """Return the function from bfloat16 hidden states to float32 logits; None if it needs torch."""
    weight, vocab_size = model.head_weight, model.vocab_size
    if weight.dtype != torch.bfloat16 or not has_head():
        return None
    packed = torch.ops.kdhpc.pack_head(weight.contiguous())
    return model.capped(lambda x: cast(Tensor, torch.ops.kdhpc.head(x, packed, vocab_size)))


class NativeDecoder(DenseDecoder):
    """A dense transformer on CPUs; all but the products of its layers is in the extension."""

    name = "native"

    def __init__(self, model: Dense, rows: int, length: int) -> None:
        self.length = -(-length // VECTOR) * VECTOR
        super().__init__(model, rows, self.length)

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        ops, model, eps = torch.ops.kdhpc, self.model, self.model.eps
        groups, cap = model.heads // model.kv_heads, model.score_cap or 0.0
        together, gelu = model.family.query_norm == "whole", model.activation != "silu"
        x, delta, delta_norm = model.embed(ids), None, None
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            mixed = layer.qkv(ops.add_norm(x, delta, delta_norm, layer.norm, eps))
            if layer.query_norm is not None:
                ops.norm_queries_and_keys(mixed, layer.query_norm, model.heads, together, eps)
            window = model.windows[layer.kind] or self.length
            seen = ops.attend(
                mixed, keys, values, *self.rotary[layer.kind], position, groups, model.scale,
                window, cap,
            )  # fmt: skip
            normed = ops.add_norm(x, layer.out(seen), layer.out_norm, layer.mlp_norm, eps)
            delta = layer.down(ops.activate(layer.gate_up(normed), gelu))
            delta_norm = layer.down_norm
        return self.head(ops.add_norm(x, delta, delta_norm, model.final_norm, eps))

    def _head(self) -> Linear:
        return head_of(self.model) or super()._head()


class NativeDraw(InverseCdf):
    """Inverts the CDF in one pass over the logits that also gives log-probabilities at tau = 1."""

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.selection != Selection(tau=self.selection.tau):
            return super().__call__(logits, position)
        uniform = self.uniform.index_select(0, position)[0]
        token, log_prob_tau, log_prob = torch.ops.kdhpc.draw(logits, uniform, self.selection.tau)
        return token, log_prob_tau, log_prob


DRAWS = draws.DRAWS | {"inverse_cdf": NativeDraw}


def main() -> int:
    """Build the extension and print its path; return the exit code."""
    try:
        print(f"built {build()}")  # noqa: T201
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        message = " ".join(str(error).split())[:500]
        print(f"error: the extension cannot be built: {message}", file=sys.stderr)  # noqa: T201
        return 1
    if reason := missing():
        print(f"error: the extension cannot be used: {reason}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
