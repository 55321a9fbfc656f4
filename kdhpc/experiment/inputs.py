"""Find and check the inputs of the language experiment before a run is submitted.

Files are found and fetched on the login node, so that compute nodes need no network.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.config.language import (
    SECOND_JUDGE_KEY,
    LanguageConfig,
    MeasuredSpeed,
    Truth,
    language_problems,
    models,
)
from kdhpc.config.model import Architecture, Model
from kdhpc.errors import InputError
from kdhpc.experiment import arms, documents, given, prompts
from kdhpc.experiment.claims import check_claims, read_claims
from kdhpc.experiment.estimates import WORK, measured_sizes, uses_gpus

if TYPE_CHECKING:
    from kdhpc.models.tokenizer import Tokenizer


TRIED_PARAMETERS = 2e8
"""Number of parameters up to which a model with new weights is tried before a run is submitted; it
takes seconds and a gigabyte of memory. A larger one is tried when its training starts."""


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
    truth = _with_components(truth)
    if truth.components:
        fingerprint = ""
    elif truth.model == "train":
        fingerprint = corpus_fingerprint(truth.corpus, truth.text_column)
        if fingerprint.startswith("hub:"):
            read_corpus(truth.corpus, truth.text_column)
        given.compare(truth.fingerprint, fingerprint, "truth")
    else:
        fingerprint = given.identify(
            "truth", truth.model, truth.revision, truth.fingerprint, length=config.length
        )
    truth = dataclasses.replace(truth, fingerprint=fingerprint)
    if truth.source == "corpus" and truth.model != "train":
        corpus = corpus_fingerprint(truth.corpus, truth.text_column)
        given.compare(truth.corpus_fingerprint, corpus, "truth")
        truth = dataclasses.replace(truth, corpus_fingerprint=corpus)
    if truth.model != "train":
        folder = given.files_of("truth", truth.model, fingerprint)
        _compare_tokenizers(truth, folder)
        truth = _with_vocabulary(_identified_vocabulary(truth), folder, config)
    students = {
        size: _identified(f"students.{size}", model, truth, config.length)
        for size, model in config.students.items()
    }
    teacher = _identified("teacher", config.teacher, truth, config.length)
    if truth.source == "corpus":
        truth = _with_second_judge(truth, config)
        _check_judges(dataclasses.replace(config, truth=truth, teacher=teacher))
        _check_documents(dataclasses.replace(config, truth=truth))
    config = _with_sizes(config)
    with _known_tokenizer(truth) as tokenizer:
        identified = _with_speeds(_with_claims(_with_tasks(_with_prompts(config, tokenizer))))
    return dataclasses.replace(identified, truth=truth, teacher=teacher, students=students)


def _with_sizes(config: LanguageConfig) -> LanguageConfig:
    """Check every architecture that transformers builds, and add the sizes of its models.

    Raises:
        InputError: if one cannot be used; names the field.
    """
    sizes = {}
    for key, model in models(config).items():
        if architecture := model.architecture:
            sizes[key] = measured_sizes(config, key, architecture)
            if sizes[key].parameters <= TRIED_PARAMETERS:
                _check_architecture(key, architecture, config.length)
    return dataclasses.replace(config, sizes=sizes)


def _check_architecture(key: str, architecture: Architecture, length: int) -> None:
    """Check that a model of an architecture computes what the loss takes it to compute.

    Raises:
        InputError: if it does not.
    """
    from kdhpc.models import huggingface

    try:
        huggingface.check_architecture(architecture, length=length)
    except InputError as error:
        raise InputError(f"{key}.architecture: {error}") from error


def _with_components(truth: Truth) -> Truth:
    """Identify the corpora of the components of the truth, if it has any.

    Raises:
        InputError: if one is missing, or has changed.
    """
    from kdhpc.storage.corpora import corpus_fingerprint, read_corpus

    components = {}
    for name, component in truth.components.items():
        place, column = _whole_path(component.corpus), component.text_column
        try:
            fingerprint = corpus_fingerprint(place, column)
            if fingerprint.startswith("hub:"):
                read_corpus(place, column)
        except InputError as error:
            key = f"truth.components.{name}"
            raise InputError(str(error).replace("truth", key, 1)) from error
        given.compare(component.fingerprint, fingerprint, f"truth.components.{name}")
        components[name] = dataclasses.replace(component, corpus=place, fingerprint=fingerprint)
    return dataclasses.replace(truth, components=components)


def _with_second_judge(truth: Truth, config: LanguageConfig) -> Truth:
    """Find the second judge, if there is one, and put its identity into the config.

    Raises:
        InputError: if it is missing, or cannot be used.
    """
    from kdhpc.models.tokenizer import read_vocabulary

    judge = truth.second_judge
    if judge is None:
        return truth
    place = given.whole_path(judge.model)
    if place == "train":
        fingerprint = truth.corpus_fingerprint or truth.fingerprint
        given.compare(judge.fingerprint, fingerprint, SECOND_JUDGE_KEY)
    else:
        fingerprint = given.identify(
            # Its tokens are its own, so their number in a row is not known.
            SECOND_JUDGE_KEY, place, judge.revision, judge.fingerprint, length=1,
        )  # fmt: skip
        folder = given.files_of(SECOND_JUDGE_KEY, place, fingerprint)
        if (folder / "tokenizer.json").is_file():
            name = f"{SECOND_JUDGE_KEY}.model={judge.model}"
            given.tokenizer_of(folder, name).prompt_ids(config.prompt)
            if read_vocabulary(folder) is not None:
                raise InputError(f"{name}: its vocabulary is cut; expected a model with all ids")
    judge = dataclasses.replace(judge, model=place, fingerprint=fingerprint)
    return dataclasses.replace(truth, second_judge=judge)


def _check_judges(config: LanguageConfig) -> None:
    """Refuse a judge that is the teacher, a model of this very run, or the other judge.

    Raises:
        InputError: for the first that is.
    """
    truth, second, teacher = config.truth, config.truth.second_judge, config.teacher
    judges = {"truth": (truth.model, truth.fingerprint)}
    if second is not None:
        judges[SECOND_JUDGE_KEY] = (second.model, second.fingerprint)
    given_ones = {key: judge for key, judge in judges.items() if judge[0] != "train"}
    run = (Path(config.runs_dir).expanduser() / config.name).resolve()
    for key, (model, fingerprint) in given_ones.items():
        name = f"{key}.model={model}"
        if Path(model).resolve().is_relative_to(run):
            raise InputError(
                f"{name}: is a model of this very run, which judges itself then; expected one that "
                "has not learnt from D"
            )
        if teacher.training is None and fingerprint == teacher.fingerprint:
            raise InputError(
                f"{name}: is the teacher, teacher.model={teacher.model}, which judges its own "
                "students then; expected another model"
            )
    if len(given_ones) == 2 and len({fingerprint for _, fingerprint in judges.values()}) == 1:
        raise InputError(
            f"{SECOND_JUDGE_KEY}.model={judges[SECOND_JUDGE_KEY][0]}: has the files of the first "
            "judge, truth.model; expected another model"
        )


def _check_documents(config: LanguageConfig) -> None:
    """Check that the corpus is as large as D, the evaluation set and the judges' part together.

    Raises:
        InputError: if it is not.
    """
    with _known_tokenizer(config.truth) as tokenizer:
        if tokenizer is not None:  # otherwise the tasks that cut rows check it
            documents.check_sizes(config, tokenizer)


@contextlib.contextmanager
def _byte_tokenizer() -> Iterator["Tokenizer"]:
    """Provide the tokenizer of a truth that is trained in the run."""
    from kdhpc.models.tokenizer import Tokenizer, write_byte_tokenizer

    with tempfile.TemporaryDirectory() as folder_name:
        write_byte_tokenizer(Path(folder_name))
        yield Tokenizer(Path(folder_name))


@contextlib.contextmanager
def _known_tokenizer(truth: Truth) -> Iterator["Tokenizer | None"]:
    """Provide the tokenizer of the truth; None if it is inside a GGUF file."""
    if truth.model == "train":
        with _byte_tokenizer() as tokenizer:
            yield tokenizer
        return
    folder = given.files_of("truth", truth.model, truth.fingerprint)
    is_there = (folder / "tokenizer.json").is_file()
    yield given.tokenizer_of(folder, f"truth.model={truth.model}") if is_there else None


def _with_prompts(config: LanguageConfig, tokenizer: "Tokenizer | None") -> LanguageConfig:
    """Identify the prompts, if there are several, and count those of evaluation sets.

    Args:
        config: the config.
        tokenizer: the tokenizer of the truth, if it is known.

    Raises:
        InputError: if they are not readable, have changed, or do not fit.
    """
    if config.prompts is None:
        return config
    entries = prompts.read_prompts(config.prompts)
    fingerprint, texts = prompts.fingerprint_of(entries), ""
    if config.prompts_fingerprint not in {"", fingerprint}:
        raise InputError(prompts.changed(config.prompts, config.prompts_fingerprint))
    if tokenizer is not None:
        if config.truth.model == "train":  # those of given models are checked with the vocabulary
            given.check_prompt(tokenizer, config)
        texts = prompts.digest_of_texts(entries, tokenizer)
    if config.prompts_texts not in {"", texts}:
        raise InputError(prompts.other_texts(config.prompts))
    return dataclasses.replace(
        config,
        prompts=_whole_path(config.prompts),
        prompts_fingerprint=fingerprint,
        prompts_texts=texts,
        eval_prompts=prompts.num_prompts(config),
    )


def _with_speeds(config: LanguageConfig) -> LanguageConfig:
    """Read the speeds that were measured, if a file of them is given.

    Raises:
        InputError: if it is no file of `kdhpc.gpu_check`, or was measured on another kind of
            device.
    """
    if config.throughput_from is None:
        return config
    name = f"throughput_from={config.throughput_from}"
    expected = "expected the gpu_check.json that `python -m kdhpc.gpu_check` writes on such a node"
    try:
        report = json.loads(Path(config.throughput_from).expanduser().read_text())
        device = report["about"]["device"]
        speeds = {
            f"{row['model']} {row['what']}": MeasuredSpeed(
                work=row["what"],
                flops_per_token=float(row["flops_per_token"]),
                tokens_per_s=float(row["tokens_per_s"]),
            )
            for row in report["speeds"]
            if row["limit"] is not None  # the others are of peers
        }
    except OSError as error:
        raise InputError(f"{name}: not readable ({error.strerror}); {expected}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        cause = f"{type(error).__name__}: {error}"[:80]
        raise InputError(f"{name}: not a file of speeds ({cause}); {expected}") from error
    for row, speed in speeds.items():
        numbers = speed.flops_per_token, speed.tokens_per_s
        if speed.work not in WORK.values() or not all(0.0 < x < math.inf for x in numbers):
            raise InputError(
                f"{name}: {row}: {numbers[1]:g} tokens/s of {numbers[0]:g} operations; {expected}"
            )
    needed = "cuda" if uses_gpus(config) else "cpu"
    if device != needed:
        raise InputError(f"{name}: was measured on {device}, and tasks run on {needed}; {expected}")
    if not speeds:
        raise InputError(f"{name}: has no speed, so every measurement has failed; {expected}")
    return dataclasses.replace(config, speeds=speeds)


def _with_claims(config: LanguageConfig) -> LanguageConfig:
    """Identify the file of claims, if there is one.

    Raises:
        InputError: if it is not readable or has changed, or is about students that are not planned.
    """
    if config.claims is None:
        return config
    try:
        content = Path(config.claims).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"claims={config.claims}: not readable ({error.strerror})") from error
    fingerprint = hashlib.sha256(content).hexdigest()
    if config.claims_fingerprint not in {"", fingerprint}:
        raise InputError(
            f"claims={config.claims}: has changed since the run was submitted; expected the file "
            f"with sha256 {config.claims_fingerprint[:12]}"
        )
    check_claims(read_claims(Path(config.claims).expanduser()), config)
    return dataclasses.replace(
        config, claims=_whole_path(config.claims), claims_fingerprint=fingerprint
    )


def _with_tasks(config: LanguageConfig) -> LanguageConfig:
    """Check the tasks that finished models are evaluated on, and fetch their data.

    Raises:
        InputError: if a task is unknown or cannot be run, or the files in `include` have changed.
    """
    from kdhpc.experiment import harness

    downstream, include = config.downstream, None
    if not downstream.tasks:
        return config
    if downstream.include is not None:
        include = Path(downstream.include).expanduser().resolve()
        fingerprint = harness.fingerprint_of(include)
        if downstream.include_fingerprint not in {"", fingerprint}:
            raise InputError(
                f"downstream.include={include}: has changed since the run was submitted; expected "
                f"the files with fingerprint {downstream.include_fingerprint[:12]}"
            )
        downstream = dataclasses.replace(
            downstream, include=str(include), include_fingerprint=fingerprint
        )
    included = harness.check_tasks(downstream.tasks, include, config.length)
    downstream = dataclasses.replace(downstream, included=included)
    return dataclasses.replace(config, downstream=downstream)


def _identified_vocabulary(truth: Truth) -> Truth:
    """Identify the file of the ids to which the truth's vocabulary is cut, if there is one.

    Raises:
        InputError: if it is not readable or has changed, or has another number of ids.
    """
    from kdhpc.experiment import vocabulary

    if truth.vocabulary_file is None:
        return truth
    ids = vocabulary.read_ids(truth.vocabulary_file)
    if truth.vocabulary not in {None, len(ids)}:
        raise InputError(
            f"truth.vocabulary={truth.vocabulary}: truth.vocabulary_file has {len(ids)} ids; "
            "expected the same number, or one of the two alone"
        )
    fingerprint = vocabulary.fingerprint_of(ids)
    if truth.vocabulary_fingerprint not in {"", fingerprint}:
        raise InputError(vocabulary.changed(truth.vocabulary_file, truth.vocabulary_fingerprint))
    return dataclasses.replace(
        truth,
        vocabulary=len(ids),
        vocabulary_file=_whole_path(truth.vocabulary_file),
        vocabulary_fingerprint=fingerprint,
    )


def _with_vocabulary(truth: Truth, folder: Path, config: LanguageConfig) -> Truth:
    """Check the prompt and what the vocabulary is cut to, and add the number of ids.

    A tokenizer inside a GGUF file is not read here, but when the model is taken.

    Raises:
        InputError: if the tokenizer, the prompt or the ids cannot be used.
    """
    from kdhpc.experiment import vocabulary

    if not (folder / "tokenizer.json").is_file():
        return truth
    tokenizer = given.tokenizer_of(folder, f"truth.model={truth.model}")
    prompt = given.check_prompt(tokenizer, config)
    if truth.vocabulary is not None:
        ids = vocabulary.read_ids(truth.vocabulary_file) if truth.vocabulary_file else None
        vocabulary.check(tokenizer, truth.vocabulary, ids, prompt)
    return dataclasses.replace(truth, num_ids=tokenizer.size)


def _identified(key: str, model: Model, truth: Truth, length: int) -> Model:
    """Find the finished model that a teacher or student starts from, if it does.

    Raises:
        InputError: if it is missing, cannot be used, or has another tokenizer than the truth.
    """
    if model.model is None:
        return model
    place = given.whole_path(model.model)
    fingerprint = given.identify(key, place, model.revision, model.fingerprint, length=length)
    if truth.model != "train":
        given.compare_tokenizers(key, place, fingerprint, truth)
    return dataclasses.replace(model, model=place, fingerprint=fingerprint)


def _whole_path(place: str) -> str:
    """Make the path of a local file absolute, because tasks run in another folder."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.is_file() else place


def _compare_tokenizers(truth: Truth, folder: Path) -> None:
    """Check that the tokenizer of the config, if it is not the model's, is identical to it.

    Raises:
        InputError: if one of the two is missing, or they differ.
    """
    if truth.tokenizer == "model":
        return
    given, own = (
        place / "tokenizer.json" for place in (Path(truth.tokenizer).expanduser(), folder)
    )
    if not given.is_file():
        raise InputError(
            f"truth.tokenizer={truth.tokenizer}: no tokenizer.json there; expected a folder with "
            "one, or truth.tokenizer=model"
        )
    if not own.is_file():
        raise InputError(
            f"truth.tokenizer={truth.tokenizer}: can only be compared with a model folder or hub "
            f"id, not with {truth.model}; expected truth.tokenizer=model"
        )
    if given.read_bytes() != own.read_bytes():
        raise InputError(
            f"truth.tokenizer={truth.tokenizer}: differs from the tokenizer of {truth.model}, "
            "which all students share; expected truth.tokenizer=model"
        )
