"""Devices, dtypes, threads, and matrix products with weights that never change."""

import contextlib
import ctypes
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc.errors import ClusterError, InputError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """Return the device to run on: `cpu`, `cuda`, or for `auto` a GPU if this process sees one.

    The environment's LOCAL_RANK is the index of this process among those of its node (see
    `kdhpc.cluster.task.find_rank`). If this process sees several GPUs, it takes the one with that
    ordinal. Where Slurm or a wrapper shows each process a GPU of its own, that is always number 0.

    Raises:
        InputError: if `cuda` is asked for and this process sees no GPU, or too few for its rank.
        ClusterError: if Slurm gave this process a GPU and torch does not see it.
    """
    given = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS")
    if given and device != "cpu" and not torch.cuda.is_available():
        raise ClusterError(
            f"No CUDA GPUs are available, although Slurm gave this task GPU {given}; check the "
            "driver of the node and the build of torch, or use device=cpu"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: no GPU is visible to this process; expected auto or cpu")
    if device == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
    if index >= torch.cuda.device_count():
        raise InputError(
            f"local rank {index} sees {torch.cuda.device_count()} GPUs; expected one for each "
            "process of the node (slurm.gpus_per_node), or exactly one that is its own"
        )
    return torch.device("cuda", index)


CPU_FLAGS_OF_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What Linux calls instructions for bfloat16 on x86 and ARM."""


@functools.cache
def note_slow_dtype(dtype: str, device: str) -> None:
    """Print, once in a process, that 16-bit numbers are slow on this CPU, if they are.

    Without instructions for them each product is made from float32 numbers: on a Zen 3 a training
    step takes seven times as long as in float32.

    Args:
        dtype: dtype of the weights.
        device: type of the device.
    """
    if device != "cpu" or dtype == "float32":
        return
    with contextlib.suppress(OSError):
        if CPU_FLAGS_OF_BFLOAT16.isdisjoint(Path("/proc/cpuinfo").read_text().split()):
            sys.stdout.write(
                f"note: this CPU has no instructions for bfloat16, so {dtype} takes several times "
                "as long as float32\n"
            )


def set_threads(threads: int) -> None:
    """Set the number of threads of this process.

    It must be the config's number, because it changes how sums are rounded.
    """
    torch.set_num_threads(threads)
    # Unlike intra-op threads, inter-op threads can be set only once per process.
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)


def set_allocator(*, keep_freed: bool) -> None:
    """Tell glibc's allocator whether to keep freed memory or to return it to the kernel at once.

    By default glibc returns most large tensors to the kernel and gets them back page by page, which
    takes a fifth of a training step on CPUs. Kept memory becomes fragmented, though, so if memory
    is short, large blocks are returned at once. Without glibc this function does nothing.
    """
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    if keep_freed:
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
    else:
        libc.mallopt(m_mmap_threshold, 2**20)


def num_gpus() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count()


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that models of this process can have at most.

    That is a GPU's memory, and on CPUs the memory of the machine or what cgroups, such as those of
    Slurm, leave of it.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top, name = Path("/sys/fs/cgroup"), "memory.max"  # cgroups of version 2, then 1
            if controllers:
                top, name = top / controllers, "memory.limit_in_bytes"
            folder = top / place.lstrip("/")
            for each in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):  # no file, or no limit
                    limits.append(int((each / name).read_text()))
    return min(limits)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work that was submitted to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best rate of a large matrix product on this device; MFU is relative to it."""
    size, seconds = (8192 if device.type == "cuda" else 1024), []
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def try_or_undo(
    trial: Callable[[], None], undo: Callable[[], None], *, what: str, instead: str
) -> None:
    """Try what may not work on this GPU; if it fails, undo it and log what takes its place.

    Modes are those of inference, because a compiled function is compiled again in others.

    Args:
        trial: what is tried; it may raise anything.
        undo: called if it fails.
        what: what is tried, for the log.
        instead: what takes its place.

    Raises:
        torch.OutOfMemoryError: if memory is short, which is no reason to do without.
    """
    try:
        with torch.inference_mode(), exact_matmuls():
            trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # kernels and compilers raise what they want
        undo()
        reason = " ".join(str(error).split())[:200]
        log.warning("%s does not work here; kdhpc uses %s: %s", what, instead, reason)


Linear = Callable[[Tensor], Tensor]


def frozen_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return the matrix product with a weight [O, I], and a bias [O], that never change.

    On CPUs oneDNN reorders the weight once, which makes products 1.1 to 2 times as fast as
    reordering it each time; the original weight is not kept. torch's own compiler calls the same
    operators.
    """
    supported = torch.backends.mkldnn.is_available() and (  # type: ignore[no-untyped-call]
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    if weight.device.type != "cpu" or not supported:
        return lambda x: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    apply = torch.ops.mkldnn._linear_pointwise
    return lambda x: cast(Tensor, apply(x, packed, bias, "none", [], ""))


def frozen_head(weight: Tensor) -> Linear:
    """Return a function from hidden states to logits that are never rounded to 16 bits.

    Args:
        weight: [V, H].

    Returns:
        A function from [N, H] in the dtype of `weight` to [N, V] float32.
    """
    if weight.device.type == "cuda" and weight.dtype != torch.float32:
        return widening_head(weight)
    if weight.dtype != torch.bfloat16:
        wide = frozen_linear(weight.float())
        return lambda x: wide(x.float())
    # Products of bfloat16 numbers are exact in float32, so bfloat16 matrix units may be used.
    with bfloat16_products():
        wide = frozen_linear(weight.float())

    def head(x: Tensor) -> Tensor:
        with bfloat16_products():
            return wide(x.float())

    return head


def widening_head(weight: Tensor) -> Linear:
    """Return a product with a 16-bit weight [V, H] whose sums and results are float32.

    Where torch cannot widen in the product itself, the factors are widened before it. The results
    are as exact, since products of 16-bit numbers are exact in float32 and in TF32, but the weight
    is kept a second time.
    """
    if _products_widen(weight.device.type, weight.dtype):
        return lambda x: torch.mm(x, weight.T, out_dtype=torch.float32)
    wide = weight.float()
    return lambda x: functional.linear(x.float(), wide)


@functools.cache
def _products_widen(device: str, dtype: torch.dtype) -> bool:
    """Try once whether torch multiplies 16-bit matrices into float32; some ROCm builds do not."""
    factor = torch.ones((16, 16), dtype=dtype, device=device)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Round the factors of float32 products on CPUs to bfloat16; sums stay float32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """Compute float32 products in full float32 on every device, whatever the process was set to."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
