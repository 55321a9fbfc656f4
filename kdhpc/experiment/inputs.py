"""Find and check the inputs of the language experiment before a run is submitted.

Files are found and fetched on the login node, so that compute nodes need no network.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from kdhpc.config.language import LanguageConfig, Truth, language_problems
from kdhpc.config.model import Model
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

    truth = dataclasses.replace(
        config.truth,
        corpus=_whole_path(config.truth.corpus),
        model=given.whole_path(config.truth.model),
    )
    config = dataclasses.replace(config, truth=truth)
    _check_prompt(config)
    if truth.model == "train":
        fingerprint = corpus_fingerprint(truth.corpus, truth.text_column)
        if fingerprint.startswith("hub:"):
            read_corpus(truth.corpus, truth.text_column)
        given.compare(truth.fingerprint, fingerprint, "truth")
    else:
        fingerprint = given.identify(
            "truth", truth.model, truth.revision, truth.fingerprint, length=config.length
        )
    truth = dataclasses.replace(truth, fingerprint=fingerprint, num_ids=_num_ids(truth))
    truth = _with_vocabulary(truth, config)
    students = {
        size: _identified(f"students.{size}", model, truth, config.length)
        for size, model in config.students.items()
    }
    teacher = _identified("teacher", config.teacher, truth, config.length)
    return dataclasses.replace(config, truth=truth, teacher=teacher, students=students)


def _num_ids(truth: Truth) -> int | None:
    """Return the number of ids of a truth if its tokenizer is in a folder here."""
    from kdhpc.models.tokenizer import read

    folder = None if truth.model == "train" else Path(given.resolve("truth", truth.model))
    if folder is None or not (folder / "tokenizer.json").is_file():
        return truth.num_ids
    return max(read(folder).get_vocab().values()) + 1


def _with_vocabulary(truth: Truth, config: LanguageConfig) -> Truth:
    """Check to what the truth's vocabulary is cut, as far as its files are here, and identify it.

    Raises:
        InputError: if the file of ids has changed or is not readable, or ids are missing.
    """
    from kdhpc.experiment import vocabulary
    from kdhpc.models.tokenizer import Tokenizer

    ids = None
    if truth.vocabulary_file is not None:
        ids = vocabulary.read_ids(truth.vocabulary_file)
        if truth.vocabulary not in {None, len(ids)}:
            raise InputError(
                f"truth.vocabulary={truth.vocabulary}: truth.vocabulary_file has {len(ids)} ids; "
                "expected the same number, or one of the two alone"
            )
        fingerprint = vocabulary.fingerprint_of(ids)
        if truth.vocabulary_fingerprint not in {"", fingerprint}:
            raise InputError(
                vocabulary.changed(truth.vocabulary_file, truth.vocabulary_fingerprint)
            )
        truth = dataclasses.replace(
            truth,
            vocabulary=len(ids),
            vocabulary_file=_whole_path(truth.vocabulary_file),
            vocabulary_fingerprint=fingerprint,
        )
    folder = Path(given.resolve("truth", truth.model))
    names = ("tokenizer.json", "tokenizer_config.json")
    if truth.vocabulary is not None and all((folder / name).is_file() for name in names):
        tokenizer = Tokenizer(folder)
        prompt = tokenizer.prompt_ids(config.prompt, config.begin)
        vocabulary.check(tokenizer, truth.vocabulary, ids, prompt)
    return truth


def _identified(key: str, model: Model, truth: Truth, length: int) -> Model:
    """Find the finished model that a teacher or student starts from, if it does.

    Raises:
        InputError: if it is missing, cannot be used, or has another tokenizer than the truth.
    """
    if model.model is None:
        return model
    place = given.whole_path(model.model)
    fingerprint = given.identify(
        key,
        place,
        model.revision,
        model.fingerprint,
        length=length,
        trained=model.training is not None,
    )
    if truth.model != "train":
        given.compare_tokenizers(key, place, truth)
    return dataclasses.replace(model, model=place, fingerprint=fingerprint)


def _whole_path(place: str) -> str:
    """Make the path of a local file absolute, because tasks run in another folder."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.is_file() else place


def _check_prompt(config: LanguageConfig) -> None:
    """Check the prompt against the tokenizer of a local model, without loading the model.

    Raises:
        InputError: if the prompt has no tokens or leaves no room for one more, or if
            `truth.tokenizer` differs from the model's.
    """
    if config.truth.model == "train":
        return
    own = Path(given.resolve("truth", config.truth.model)) / "tokenizer.json"
    if config.truth.tokenizer != "model":
        _compare_tokenizers(config.truth, own)
    if own.is_file():
        from kdhpc.models.tokenizer import Tokenizer, prompt_ids, read

        try:
            if (own.parent / "tokenizer_config.json").is_file():
                ids = Tokenizer(own.parent).prompt_ids(config.prompt, config.begin)
            else:
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
