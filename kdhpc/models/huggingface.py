"""Make, convert and save models with transformers, and infer with models other than Llama."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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

from kdhpc.config.model import Shape
from kdhpc.errors import DamagedError, InputError
from kdhpc.models.devices import DTYPES, Linear, frozen_head

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

END_OF_TEXT = "<|endoftext|>"


def new_model(
    shape: Shape, *, vocab_size: int, length: int, eos: int, seed: int
) -> PreTrainedModel:
    """Make a Llama model with fresh float32 weights on the CPU; they depend on the seed alone."""
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


MORE_THAN_A_PRODUCT = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields of transformers' configs by which some architectures cap or scale their logits."""


class TransformersModel:
    """Adapts any causal language model of transformers to `kdhpc.models.loading.LanguageModel`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.kind = str(model.config.model_type)
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])

    @classmethod
    def load(cls, path: Path, *, dtype: str, device: torch.device) -> "TransformersModel":
        """Load a checkpoint folder.

        Raises:
            DamagedError: if the folder is not a checkpoint.
        """
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: not a model checkpoint ({error})") from error
        return cls(model.to(device))

    @functools.cached_property
    def head(self) -> Linear:
        """Function from hidden states [N, H] to float32 logits [N, V].

        Raises:
            InputError: if the model adds a bias to its logits, or caps or scales them.
        """
        weight = self.model.get_output_embeddings().weight
        config = self.model.config
        extras = [
            name for name in MORE_THAN_A_PRODUCT if getattr(config, name, None) not in (None, 1.0)
        ]
        ids = torch.arange(8, device=self.device)[None] % config.vocab_size
        products = self.hidden(ids).double() @ weight.double().T
        logits = self.model(ids, use_cache=False).logits.double()
        if extras or (logits - products).abs().max() > 0.02 * products.abs().max():
            raise InputError(
                f"model type {self.kind}: its logits are not the product of its hidden states and "
                "its head; expected an architecture without logit bias, cap or scale"
            )
        return frozen_head(weight)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states [B, L, H] under causal attention over ids [B, L]."""
        states: Tensor = self.model.base_model(ids, use_cache=False).last_hidden_state
        return states


def save_model(model: PreTrainedModel, tokenizer_path: Path, path: Path) -> None:
    """Write a checkpoint folder with its tokenizer, which `from_pretrained` can read."""
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True).save_pretrained(path)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer of 257 ids: end of text, then the 256 bytes."""
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
    """Dequantise a GGUF file and save it as an ordinary checkpoint folder with its tokenizer."""
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
    """Save a model from a Hugging Face folder or an already fetched hub id as a checkpoint folder.

    Raises:
        InputError: if the source is not a model with a tokenizer.
    """
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
