"""Load, make and save models: the only module that knows transformers, devices and dtypes."""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from kdhpc.config import Shape
from kdhpc.errors import DamagedError, InputError

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
END_OF_TEXT = "<|endoftext|>"


def pick_device(device: str) -> torch.device:
    """Where to run: `cpu`, `cuda`, or `auto` for a GPU if this process sees one.

    Raises:
        InputError: for `cuda` where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: no GPU is visible to this process; expected auto or cpu")
    if device == "cpu":
        return torch.device("cpu")
    # Where Slurm binds one GPU to each task, every process sees its own as number 0.
    index = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
    if index >= torch.cuda.device_count():
        raise InputError(
            f"local rank {index} sees {torch.cuda.device_count()} GPUs; expected one for each "
            "process of the node (slurm.gpus_per_node)"
        )
    return torch.device("cuda", index)


def set_threads(threads: int) -> None:
    """Threads of this process: a part of the result, so always the config's number.

    Intra-op threads may be set at any time, inter-op threads only once a process.
    """
    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)


def set_allocator(*, keep_freed: bool) -> None:
    """Tell glibc's allocator whether to keep what is freed, for processes that reuse large buffers.

    By default most large tensors are given back to the kernel and come again page by page: a fifth
    of the time of a training step on CPUs. Kept memory falls into pieces, though, so where memory
    is short everything large is given back at once. Without glibc nothing changes.
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


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Best measured rate of a matrix product on this device: what MFU is a share of."""
    size, seconds = (8192 if device.type == "cuda" else 1024), []
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def new_model(
    shape: Shape, *, vocab_size: int, length: int, eos: int, seed: int
) -> PreTrainedModel:
    """A Llama model with fresh float32 weights on the CPU, the same for every number of ranks."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        initializer_range=shape.init_std,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=None,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_model(path: Path, *, dtype: str, device: torch.device) -> PreTrainedModel:
    """A checkpoint folder (safetensors) as a model that only infers.

    Raises:
        DamagedError: if it is not one.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{path}: not a model checkpoint ({error})") from error
    return model.to(device).eval().requires_grad_(False)


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
_loaded: dict[tuple[Path, str, str], Loaded] = {}


def load_for_inference(path: Path, dtype: str, device: str) -> Loaded:
    """Model and tokenizer; the last stay in memory, so that a task loads them once."""
    wanted = (path, dtype, device)
    if wanted not in _loaded:
        forget_loaded()  # two large models may not fit
        model = load_model(path, dtype=dtype, device=pick_device(device))
        _loaded[wanted] = (model, load_tokenizer(path))
    return _loaded[wanted]


def forget_loaded() -> None:
    """Drop what `load_for_inference` keeps, and all that hangs on it."""
    _loaded.clear()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a checkpoint folder."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def save_model(model: PreTrainedModel, tokenizer_path: Path, path: Path) -> None:
    """Write a checkpoint folder with its tokenizer, as `from_pretrained` of transformers reads."""
    model.save_pretrained(path)
    load_tokenizer(tokenizer_path).save_pretrained(path)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 257 ids: end of text, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: 1 + i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def convert_gguf(path: Path, out: Path, *, dtype: str) -> None:
    """Dequantise a GGUF file into an ordinary checkpoint folder with its tokenizer."""
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=DTYPES[dtype],
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)


def copy_model(source: str, revision: str, out: Path, *, dtype: str) -> None:
    """Save a Hugging Face folder or (already fetched) hub id as a checkpoint folder of ours."""
    options: dict[str, Any] = {"revision": revision, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"truth.model={source}: not a model with a tokenizer ({error})") from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of the prompt, with nothing added.

    Raises:
        InputError: if the tokenizer makes no token of it.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"prompt={prompt!r}: the tokenizer makes no token of it")
    return ids


Linear = Callable[[Tensor], Tensor]


def frozen_linear(weight: Tensor, rows: int) -> Linear:
    """A product with a weight [O, I] that never changes, for inputs of about `rows` rows.

    On CPUs oneDNN lays the weight out once for the product, which is 1.2 to 2 times as fast for few
    rows as doing so each time. These operators are what torch's own compiler calls.
    """
    supported = torch.backends.mkldnn.is_available() and (  # type: ignore[no-untyped-call]
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    if weight.device.type != "cpu" or not supported:
        return lambda x: functional.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    apply = torch.ops.mkldnn._linear_pointwise
    return lambda x: cast(Tensor, apply(x, packed, None, "none", [], ""))


def frozen_head(weight: Tensor, rows: int) -> Linear:
    """Float32 logits from hidden states of the weight's dtype; nothing is rounded to 16 bits."""
    if weight.device.type == "cuda" and weight.dtype != torch.float32:
        return lambda x: torch.mm(x, weight.T, out_dtype=torch.float32)
    if weight.dtype != torch.bfloat16:
        wide = frozen_linear(weight.float(), rows)
        return lambda x: wide(x.float())
    # Products of bfloat16 numbers are exact in float32: matrix units may be used where there are.
    with bfloat16_products():
        wide = frozen_linear(weight.float(), rows)

    def head(x: Tensor) -> Tensor:
        with bfloat16_products():
            return wide(x.float())

    return head


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Float32 products on CPUs whose factors are rounded to bfloat16; sums stay float32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """Float32 products in float32 on every device, whatever the process was set to."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
