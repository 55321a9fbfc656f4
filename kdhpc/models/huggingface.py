"""Make, convert and save models with transformers, and infer with those of other families."""

import functools
import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from kdhpc.config.model import Architecture, Design, Shape
from kdhpc.errors import DamagedError, InputError
from kdhpc.models.architectures import NUM_IDS, config_of, without_dropout
from kdhpc.models.devices import DTYPES, Linear, frozen_head
from kdhpc.models.head import Logits
from kdhpc.models.tokenizer import (
    END_OF_TEXT,
    VOCABULARY,
    Tokenizer,
    read,
    read_ends,
    read_vocabulary,
    write_vocabulary,
)
from kdhpc.models.tokenizer import byte_tokenizer as bytes_alone

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

KNOWN_LOGITS = "a product with the head, and a bias, factor or soft cap"
"""What logits may be, in errors."""


def new_model(
    design: Design, *, vocab_size: int, length: int, eos: int, seed: int
) -> PreTrainedModel:
    """Make a model with fresh float32 weights on the CPU; they depend on the seed alone.

    Raises:
        InputError: if transformers does not have the architecture, or kdhpc cannot train it.
    """
    config = config_of(design, vocab_size=vocab_size, length=length, eos=eos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if not isinstance(design, Shape):
        _check_trainable(model)
    return model


def check_architecture(architecture: Architecture, *, length: int) -> None:
    """Check that a model of an architecture can be trained, with few ids.

    Raises:
        InputError: if it cannot.
    """
    try:
        new_model(architecture, vocab_size=NUM_IDS, length=length, eos=0, seed=0)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # each model raises what it wants
        text = " ".join(str(error).split())
        raise InputError(
            f"model type {architecture['model_type']}: does not run with these fields ({text})"
        ) from error


def model_to_train(path: Path) -> PreTrainedModel:
    """Load a checkpoint folder to train it further: in float32 on the CPU, and without dropout.

    Raises:
        InputError: if kdhpc cannot train it.
    """
    config = AutoConfig.from_pretrained(path)
    without_dropout(config.get_text_config())
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, local_files_only=True
    )
    _check_trainable(model)
    return model


@torch.no_grad()
def _check_trainable(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not those of the loss, or that sees later tokens.

    For the time of the comparison the head is scaled to logits of up to about 100, because a cap or
    a bias does not show in those of new weights.

    Raises:
        InputError: if it is one.
    """
    model.eval()
    name, layer = f"model type {model.config.model_type}", model.get_output_embeddings()
    ids = torch.arange(8)[None] % layer.weight.shape[0]
    kept = layer.weight.clone()
    layer.weight.mul_(100.0 / model(ids, use_cache=False).logits.abs().max())
    own = model(ids, use_cache=False).logits
    states = model.base_model(ids, use_cache=False).last_hidden_state
    logits = _logits_of(model)(states[0])
    layer.weight.copy_(kept)
    if not (own - logits).abs().max() <= 1e-3 * own.abs().max():  # nor if they are NaN
        raise InputError(
            f"{name}: cannot be trained, because its logits are not what kdhpc computes from its "
            f"hidden states; expected {KNOWN_LOGITS}"
        )
    earlier, changed = (
        model.base_model(rows, use_cache=False).last_hidden_state[0, :-1]
        for rows in (ids, torch.cat((ids[:, :-1], ids[:, :1]), dim=1))
    )
    if not (earlier - changed).abs().max() <= 1e-3 * earlier.abs().max():
        raise InputError(f"{name}: sees later tokens; expected a causal language model")
    model.train()
    many = torch.arange(512).view(64, 8) % layer.weight.shape[0]
    once, again = (model.base_model(many, use_cache=False).last_hidden_state for _ in range(2))
    if not torch.equal(once, again):
        raise InputError(
            f"{name}: draws random numbers in training; expected a model that computes the same "
            "twice"
        )


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
            InputError: if the model computes its logits in a way that is not known here.
        """
        head = _logits_of(self.model)
        ids = torch.arange(8, device=self.device)[None] % self.vocab_size
        own = self.model(ids, use_cache=False).logits.float()
        largest = own.abs().max()
        if (own - head(self.hidden(ids)[0])).abs().max() > 0.02 * largest:
            raise InputError(
                f"model type {self.kind}: its logits are not what kdhpc computes from its hidden "
                f"states; expected {KNOWN_LOGITS}"
            )
        return head

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states [B, L, H] under causal attention over ids [B, L]."""
        states: Tensor = self.model.base_model(ids, use_cache=False).last_hidden_state
        return states


def _logits_of(model: PreTrainedModel) -> Linear:
    """Return the function from hidden states [N, H] to float32 logits [N, V]."""
    layer, form = model.get_output_embeddings(), Logits.of(model.config.get_text_config())
    product, bias = frozen_head(layer.weight), getattr(layer, "bias", None)
    return lambda x: form.from_products(product(x), bias)


def save_model(model: PreTrainedModel, tokenizer_path: Path, path: Path) -> None:
    """Write a checkpoint folder with its tokenizer, which `from_pretrained` can read."""
    model.save_pretrained(path)
    set_tokenizer(path, tokenizer_path)


def set_tokenizer(path: Path, tokenizer_path: Path) -> None:
    """Give a checkpoint the tokenizer, the vocabulary and the ends of sequences of another."""
    copy_tokenizer(tokenizer_path, path)
    if vocabulary := read_vocabulary(tokenizer_path):
        write_vocabulary(path, vocabulary)
    if (ends := read_ends(tokenizer_path)) != read_ends(path):
        set_ends(path, ends)


def set_ends(path: Path, ends: Sequence[int]) -> None:
    """Let the sequences of a checkpoint end at these ids, besides the tokenizer's own end.

    Raises:
        InputError: if the tokenizer has no end.
    """
    tokenizer, file = Tokenizer(path, ends), path / "generation_config.json"
    config = json.loads(file.read_bytes()) if file.exists() else {}
    config["eos_token_id"] = (
        [tokenizer.eos, *tokenizer.other_ends] if tokenizer.other_ends else tokenizer.eos
    )
    file.write_text(json.dumps(config, indent=2))


def copy_tokenizer(source: Path, out: Path) -> None:
    """Save the tokenizer of one folder in another, with all that transformers knows of it.

    tokenizer.json is copied as it is, because transformers makes that of some classes anew, with
    other rules of where words are split.
    """
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(out)
    _keep_tokenizer_file(source, out)


def chat_text(path: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """Put messages through the chat template of a folder, up to where an answer begins.

    Raises:
        InputError: if there is no chat template, or it refuses the messages.
    """
    try:
        if "strftime_now" in str(_whole_tokenizer(path).chat_template):
            raise ValueError("it writes the date into each prompt")
        text: str = _whole_tokenizer(path).apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except MemoryError:
        raise
    except Exception as error:  # the template raises what it wants
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"prompts: messages need a chat template, and that in {path} cannot be used ({cause}); "
            "expected text, or a model with a chat template"
        ) from error
    return text


@functools.lru_cache(maxsize=1)
def _whole_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _keep_tokenizer_file(source: Path, out: Path) -> None:
    file = source / "tokenizer.json"
    if file.is_file() and read(source).get_vocab() == read(out).get_vocab():
        shutil.copyfile(file, out / "tokenizer.json")


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Make the tokenizer of bytes as transformers has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone(), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def take_model(source: Path, out: Path, *, dtype: str, key: str) -> None:
    """Save a finished model and its tokenizer as an ordinary checkpoint folder.

    Rows of the embedding and of the head beyond the tokenizer's ids are cut off: no text has such
    an id, so it must have no probability.

    Args:
        source: a Hugging Face folder, or a GGUF file, which is dequantised.
        out: the new folder.
        dtype: dtype in which the weights are stored.
        key: key of the config that names the model, for errors.

    Raises:
        InputError: if it is not a model with a tokenizer, or not a whole one; names what is wrong.
    """
    options: dict[str, Any] = {"local_files_only": True}
    weights: dict[str, Any] = {"use_safetensors": True}
    name, place = f"{key}={source}", source
    if source.suffix == ".gguf":
        from transformers import GgufConfig

        place, options = source.parent, {"gguf_file": source.name}
        weights = {"quantization_config": GgufConfig(dequantize=True)}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **options,
            **weights,
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (
        OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError, struct.error,
    ) as error:  # fmt: skip
        message = " ".join(str(error).split())
        raise InputError(f"{name}: not a model with a tokenizer ({message})") from error
    _check_whole(name, dict(report))
    _check_tied(name, model)
    num_ids = max(tokenizer.get_vocab().values()) + 1
    vocabulary = read_vocabulary(source)
    if vocabulary:
        _check_map(name, model, vocabulary, num_ids)
    else:
        _cut_to_tokenizer(name, model, num_ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _keep_tokenizer_file(source, out)
    if vocabulary:
        write_vocabulary(out, vocabulary)


def _check_whole(name: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks tensors, which would be filled at random, or has others.

    Args:
        name: what names the model in the config.
        report: what transformers says about loading it.

    Raises:
        InputError: names the first tensor and how many there are.
    """
    for kind, what in {
        "missing_keys": "has no tensor",
        "unexpected_keys": "has a tensor that its architecture does not have:",
        "mismatched_keys": "has a tensor of another shape than its config.json says:",
    }.items():
        found = report.get(kind) or ()
        if names := sorted(name if isinstance(name, str) else name[0] for name in found):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{name}: {what} {names[0]}{more}; expected a whole checkpoint")


def _check_tied(name: str, model: PreTrainedModel) -> None:
    """Refuse a head that is tied to the embedding by config.json, and differs from it in the files.

    transformers would not tie the two, and other programs would.

    Raises:
        InputError: if it is so.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head.weight is not embedding.weight:
        raise InputError(
            f"{name}: its config.json says that the head is tied to the embedding, and its files "
            "have two different tensors; expected tie_word_embeddings=false, or one tensor"
        )


def _check_map(name: str, model: PreTrainedModel, vocabulary: list[int], num_ids: int) -> None:
    """Refuse a vocabulary.json that does not map the rows of a model to ids of its tokenizer.

    Raises:
        InputError: if it has another number of ids than the model, or ids that no token has.
    """
    num_rows = model.get_output_embeddings().weight.shape[0]
    if len(vocabulary) != num_rows or vocabulary[-1] >= num_ids:
        raise InputError(
            f"{name}: its {VOCABULARY} lists {len(vocabulary)} ids up to {vocabulary[-1]}; "
            f"expected as many as the model has rows, {num_rows}, and each below the {num_ids} ids "
            "of its tokenizer"
        )


def _cut_to_tokenizer(name: str, model: PreTrainedModel, num_ids: int) -> None:
    """Cut the rows of embedding and head that no id of the tokenizer has.

    Raises:
        InputError: if the tokenizer has ids without such a row.
    """
    num_rows = model.get_output_embeddings().weight.shape[0]
    if num_rows < num_ids:
        raise InputError(
            f"{name}: its tokenizer has {num_ids} ids, and the model {num_rows} rows of logits; "
            "expected a model with a row for every id"
        )
    if num_rows > num_ids:
        model.resize_token_embeddings(num_ids)


def cut_vocabulary(source: Path, ids: Sequence[int], out: Path) -> None:
    """Save a checkpoint with some of its ids only; the model is renormalised over them.

    Rows of the embedding and of the head, and entries of its bias, are kept for these ids. They are
    numbered from 0 in the same order, and `kdhpc.models.tokenizer` maps them back.

    Args:
        source: checkpoint folder of the whole model; it may have been cut before.
        ids: the ids of this model that are kept, increasing.
        out: the new folder.

    Raises:
        InputError: if the logits of the kept ids come out differently.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", local_files_only=True
    )
    kept = torch.tensor(ids)
    inputs = torch.arange(min(8, len(ids)))[None]
    with torch.no_grad():
        expected = model(kept[inputs], use_cache=False).logits[..., kept].float()
        head = model.get_output_embeddings()
        rows = [model.get_input_embeddings().weight[kept], head.weight[kept]]
        bias = None if getattr(head, "bias", None) is None else head.bias[kept]
        model.resize_token_embeddings(len(ids))
        head = model.get_output_embeddings()
        for layer, weight in zip((model.get_input_embeddings(), head), rows, strict=True):
            layer.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
        _renumber(model, ids)
        logits = model(inputs, use_cache=False).logits.float()
    if (logits - expected).abs().max() > 0.02 * expected.abs().max():
        raise InputError(
            f"model type {model.config.model_type}: its vocabulary cannot be cut, because its "
            "logits depend on more than the rows of embedding and head; expected another model"
        )
    model.save_pretrained(out)
    copy_tokenizer(source, out)
    before = read_vocabulary(source)
    write_vocabulary(out, [before[i] for i in ids] if before else ids)


def _renumber(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Renumber the special ids in the configs of a model; those that are cut are forgotten."""
    new_ids = {old: new for new, old in enumerate(ids)}
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    for config in {id(config): config for config in configs}.values():  # the first two may be one
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            old = getattr(config, name, None)
            if isinstance(old, list):
                setattr(config, name, [new_ids[i] for i in old if i in new_ids] or None)
            elif old is not None:
                setattr(config, name, new_ids.get(old))
