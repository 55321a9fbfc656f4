"""The optional extension for CPUs, built by `make native`; `sampling.engine`, `scoring.engine`.

It does what is slow between the matrix products of a decoding step (`native.cpp`). It is built for
the processor of the node that builds it, into the virtual environment, under a name that tells its
source and torch's version. Where it is missing, or a node lacks one of that processor's features,
plain torch does the work and a warning says so.
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

from kdhpc.models.devices import Linear
from kdhpc.models.llama import Llama
from kdhpc.models.loading import LanguageModel
from kdhpc.sampling import draws
from kdhpc.sampling.decoding import LlamaDecoder
from kdhpc.sampling.draws import InverseCdf
from kdhpc.selection import Selection

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
VECTOR = 16
"""Head sizes and lengths of caches are multiples of it."""
HELP = "make native builds it"


def library() -> Path:
    """Where the built extension lies."""
    words = SOURCE.read_bytes() + f"{torch.__version__} {FLAGS}".encode()
    name = hashlib.sha256(words).hexdigest()[:12]
    return Path(sysconfig.get_paths()["platlib"]) / "kdhpc_native" / name / "kdhpc_native.so"


def build() -> Path:
    """Compile the extension for this machine's processor; needs a C++ compiler."""
    from torch.utils import cpp_extension

    path = library()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".features").write_text(" ".join(sorted(_features())))
    # ninja comes with kdhpc's dependencies, beside this python.
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
    """What this processor can do, in Linux's words; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split()[2:])


@functools.cache
def missing() -> str:
    """Why the extension cannot be used here; empty where it can, and then it is loaded."""
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
    """Why the extension cannot decode this model; empty where it can."""
    if model.device.type != "cpu":
        return f"it is for CPUs, and the model is on {model.device.type}"
    if not isinstance(model, Llama):
        return f"it is for Llama, and this is {model.kind}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16, and this is {model.dtype}"
    sizes = {
        "head size": (model.head_size, 2 * VECTOR),
        "hidden size": (model.hidden_size, VECTOR),
        "size of feed-forward layers": (model.ffn, VECTOR),
    }
    for name, (size, unit) in sizes.items():
        if size % unit:
            return f"the model's {name} is {size}, no multiple of {unit}"
    return ""


def usable(model: LanguageModel, setting: str) -> TypeGuard[Llama]:
    """Whether the extension can be used; where not, the log says why, naming the setting."""
    why = missing() or unfit(model)
    if why:
        log.warning("%s=native: %s; plain torch does the work", setting, why)
    return not why


@functools.cache
def has_head() -> bool:
    """Whether the extension is there, and oneDNN's small kernels multiply bfloat16 (AVX-512)."""
    if missing():
        return False
    try:
        packed = torch.ops.kdhpc.pack_head(torch.zeros((VECTOR, 2), dtype=torch.bfloat16))
        torch.ops.kdhpc.head(torch.zeros((1, 2), dtype=torch.bfloat16), packed, VECTOR)
    except RuntimeError:
        return False
    return True


def head_for(model: LanguageModel, setting: str) -> Linear | None:
    """The extension's head of a model; None where it cannot be used, and the log says why."""
    if not usable(model, setting):
        return None
    head = head_of(model)
    if head is None:
        log.warning("%s=native: gains nothing here without bfloat16 and AVX-512", setting)
    return head


def head_of(model: Llama) -> Linear | None:
    """Float32 logits of bfloat16 hidden states, where oneDNN's small kernels can make them."""
    weight, vocab_size = model.head_weight, model.vocab_size
    if weight.dtype != torch.bfloat16 or not has_head():
        return None
    packed = torch.ops.kdhpc.pack_head(weight.contiguous())
    return lambda x: cast(Tensor, torch.ops.kdhpc.head(x, packed, vocab_size))


class NativeDecoder(LlamaDecoder):
    """Llama on CPUs, with everything but the products of its layers in the extension."""

    name = "native"

    def __init__(self, model: Llama, rows: int, length: int) -> None:
        super().__init__(model, rows, -(-length // VECTOR) * VECTOR)

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        ops, model = torch.ops.kdhpc, self.model
        groups, scale = model.heads // model.kv_heads, self.head_size**-0.5
        x, delta = torch.nn.functional.embedding(ids, model.embedding), None
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            mixed = layer.qkv(ops.add_norm(x, delta, layer.norm, model.eps))
            seen = ops.attend(mixed, keys, values, self.cos, self.sin, position, groups, scale)
            delta = layer.out(seen)
            normed = ops.add_norm(x, delta, layer.mlp_norm, model.eps)
            delta = layer.down(ops.silu_mul(layer.gate_up(normed)))
        return self.head(ops.add_norm(x, delta, model.final_norm, model.eps))

    def _head(self) -> Linear:
        return head_of(self.model) or super()._head()


class NativeDraw(InverseCdf):
    """Inverse CDF in one pass over the logits, with the log-probability at temperature 1."""

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.selection != Selection(tau=self.selection.tau):
            return super().__call__(logits, position)
        uniform = self.uniform.index_select(0, position)[0]
        token, log_prob_tau, log_prob = torch.ops.kdhpc.draw(logits, uniform, self.selection.tau)
        return token, log_prob_tau, log_prob


DRAWS = draws.DRAWS | {"inverse_cdf": NativeDraw}


def main() -> int:
    """Build, and say where."""
    try:
        print(f"built {build()}")  # noqa: T201
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = " ".join(str(error).split())[:500]
        print(f"error: the extension cannot be built: {said}", file=sys.stderr)  # noqa: T201
        return 1
    if why := missing():
        print(f"but {why}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
