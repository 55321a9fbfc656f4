"""Make the truth p*: train it on a corpus, or convert or copy a finished model.

A second judge, where the truth is a corpus, is made in the same way, and so are the components of a
truth that is a mixture.

reads   a corpus or a finished model
writes  a Hugging Face checkpoint folder: config.json, model.safetensors, tokenizer; a mixture has
        one for each component inside of it
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kdhpc.config.language import (
    SECOND_JUDGE_KEY,
    Component,
    Judge,
    LanguageConfig,
    Truth,
    num_ids,
)
from kdhpc.config.model import Model, Training
from kdhpc.errors import InputError
from kdhpc.experiment import arms, documents, given
from kdhpc.experiment.documents import Documents
from kdhpc.experiment.estimates import model_flops, seconds, sizes_of, training_seconds
from kdhpc.experiment.trainings import TrainSettings, join_ranks, progress, train_shard
from kdhpc.experiment.vocabulary import Cut
from kdhpc.models.sizes import num_parameters
from kdhpc.plan.shards import ADDED, Arm, Plan, Shard, fields_of, settings_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.work import Work, Written
from kdhpc.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdhpc.training.data import Corpus


BYTE_VOCAB_SIZE = 257
"""Vocabulary size of the byte tokenizer: 256 bytes and the end of a text."""
CORPUS_TOKENS = 5e5
"""Assumed size of a corpus, for estimates of time: that of the documentation inside Python."""
GIVEN_S = 30.0
"""Assumed seconds in which a given model is read, converted, and written into the run."""
CUT_TOKENS = 2e4
"""Tokens that are drawn and scored to cut a vocabulary, about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruthSettings:
    """Settings that determine p*; a trained p* has those of its training in addition."""

    kind: Literal["given", "trained"]
    fingerprint: str
    """Identity of the model or the corpus; where they are kept determines nothing."""
    text_column: str | None
    """Column of the corpus that holds the text; None for a given model."""
    dtype: str | None
    """In which a given model is stored; None for a trained one, whose training says it."""
    vocabulary: Cut | None = dataclasses.field(default=None, metadata=ADDED)
    """How the vocabulary of a given model is cut; None if it is kept whole."""
    documents: Documents | None = dataclasses.field(default=None, metadata=ADDED)
    """How a judge's documents are set apart; None if the model is p*, or is not trained."""
    half: Literal["first", "second"] | None = dataclasses.field(default=None, metadata=ADDED)
    """The half of the judges' documents that it learns from; None for all of them."""
    sequences: int | None = dataclasses.field(default=None, metadata=ADDED)
    """Number of rows that a component learns from; None for all of its corpus."""


def plan(config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan one shard for p* and one for a second judge, each a checkpoint folder.

    The work of a training is a guess in tokens.
    """
    truth, trained = config.truth, config.truth.trained
    if truth.components and trained:
        return _plan_mixture(config, trained)
    halved = documents.shared_by_judges(truth)
    settings = TruthSettings(
        kind="trained" if trained else "given",
        fingerprint=truth.fingerprint,
        text_column=truth.text_column if trained else None,
        dtype=None if trained else truth.dtype,
        vocabulary=Cut.of(config),
        documents=Documents.of(config) if trained else None,
        half="first" if trained and halved else None,
    )
    shards = [_shard(config, settings, trained, name=arms.TRUTH)]
    if (judge := truth.second_judge) is not None:
        trained = truth.trained_second_judge
        settings = TruthSettings(
            kind="trained" if trained else "given",
            fingerprint=judge.fingerprint,
            text_column=truth.text_column if trained else None,
            dtype=None if trained else judge.dtype,
            documents=Documents.of(config) if trained else None,
            half="second" if halved else None,
        )
        shards.append(_shard(config, settings, trained, name=arms.SECOND_JUDGE, truth=shards[0]))
    return shards


def _plan_mixture(config: LanguageConfig, trained: Model) -> list[Shard]:
    """Plan one shard for each component, and one for the mixture, which reads them."""
    components = [
        _shard(
            config,
            TruthSettings(
                kind="trained",
                fingerprint=component.fingerprint,
                text_column=component.text_column,
                dtype=None,
                sequences=config.truth.component_sequences,
            ),
            trained,
            name=f"{arms.COMPONENT}{name}",
        )
        for name, component in config.truth.components.items()
    ]
    arm = Arm(
        stage=arms.TRUTH,
        name=arms.TRUTH,
        # Pairs, because the order of the components is that of their indices.
        fields={"kind": "mixture", "weights": [*config.truth.weights.items()]},
        inputs={shard.arm.name: shard.recipe for shard in components},
    )
    mixture = Shard(
        arm=arm,
        name="00000",
        reads=tuple(shard.key for shard in components),
        num_bytes=sum(shard.num_bytes for shard in components),
    )
    return [*components, mixture]


def _given_seconds(config: LanguageConfig, name: str) -> float:
    """Estimate how long it takes to take a given model into the run, in seconds."""
    if name != arms.TRUTH or config.truth.vocabulary is None:
        return GIVEN_S
    # Drawing is as slow as in the stage that samples the truth.
    flops = model_flops(config)[arms.TRUTH]
    return GIVEN_S + seconds(config, arms.SAMPLE_TRUTH, CUT_TOKENS, flops)


def _shard(
    config: LanguageConfig,
    settings: TruthSettings,
    trained: Model | None,
    *,
    name: str,
    truth: Shard | None = None,
) -> Shard:
    """Plan the shard of one model.

    Args:
        config: config of the run.
        settings: what determines the model, besides its training.
        trained: its architecture and training; None if it is a given model.
        name: name of the arm.
        truth: shard of the truth, whose tokenizer a second judge that is trained has.
    """
    fields = fields_of(settings)
    if trained is None or trained.training is None:
        arm = Arm(stage=arms.TRUTH, name=name, fields=fields, inputs={})
        return Shard(arm=arm, name="00000", work=_given_seconds(config, name))
    training = trained.training
    # The tokenizer of bytes is the same in every run, and is not read from the truth.
    reads = truth if config.truth.model != "train" else None
    arm = Arm(
        stage=arms.TRUTH,
        name=name,
        # The end of a text is always learnt.
        fields=fields
        | TrainSettings.of(
            trained,
            training,
            config,
            stream=name,
            # Rows of a component start as those that are drawn from it.
            prompt=config.prompt if config.truth.components else "",
            begin=config.begin if config.truth.components else "tokenizer",
            eos="learn",
        ).fields,
        inputs={"tokenizer": reads.recipe} if reads else {},
        nodes=training.nodes,
        ranks_per_node=training.ranks_per_node,
    )
    num_steps = CORPUS_TOKENS * training.epochs / training.batch_sequences / config.length
    key = SECOND_JUDGE_KEY if name == arms.SECOND_JUDGE else "truth"
    sizes = sizes_of(config, key, trained.design)
    vocab_size = BYTE_VOCAB_SIZE if reads is None else num_ids(config.truth)
    return Shard(
        arm=arm,
        name="00000",
        reads=(reads.key,) if reads else (),
        work=training_seconds(config, arms.TRUTH, sizes, training, num_steps),
        num_bytes=4.0 * num_parameters(sizes, vocab_size) if sizes else 0.0,
    )


def run(shard: Shard, work: Work[LanguageConfig]) -> Written | None:
    """Train p* or a second judge on a corpus, or convert or copy a finished model into the run."""
    from kdhpc.models import devices, huggingface

    truth, judge = work.config.truth, work.config.truth.second_judge
    if truth.components and shard.arm.name == arms.TRUTH:
        return _mix(shard, work)
    is_second = shard.arm.name == arms.SECOND_JUDGE
    trained = truth.trained_second_judge if is_second else truth.trained
    training = trained.training if trained else None
    if training is None:
        devices.set_threads(work.config.threads)
        return _take_judge(shard, judge, work) if is_second and judge else _take(shard, work)
    join_ranks(training, work)
    with tempfile.TemporaryDirectory() as bytes_dir:
        tokenizer = huggingface.byte_tokenizer()
        tokenizer.save_pretrained(bytes_dir)
        tokenizer_path = work.input(shard.reads[0]) if shard.reads else Path(bytes_dir)
        if truth.source == "corpus":
            part: documents.Part = "second-judge" if is_second else "judge"
            corpus = _judge_corpus(part, work.config, training, tokenizer_path)
        elif truth.components:
            component = truth.components[shard.arm.name.removeprefix(arms.COMPONENT)]
            corpus = _component_corpus(component, work.config, training, tokenizer_path)
        else:
            corpus = _text_corpus(truth, work.config.length, tokenizer)
        return train_shard(shard, work, training, corpus, tokenizer_path)


def _mix(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Put the components of a mixture and their weights into one folder."""
    from kdhpc.models import mixture

    weights = work.config.truth.weights
    folders = {
        name: work.input(work.plan.arm(arms.TRUTH, f"{arms.COMPONENT}{name}")[0].key)
        for name in weights
    }
    path = work.new_path(shard)
    parameters = mixture.write(path, folders, weights)
    return Written(path=path, num_rows=1, stats={"parameters": parameters})


def _take_judge(shard: Shard, judge: Judge, work: Work[LanguageConfig]) -> Written:
    """Convert or copy a second judge into the run, with the tokenizer that it has."""
    from kdhpc.models import loading
    from kdhpc.models.devices import pick_device

    path = work.new_path(shard)
    given.take(
        SECOND_JUDGE_KEY, judge.model, judge.revision, judge.fingerprint, path, dtype=judge.dtype
    )
    model = loading.load_model(path, dtype=judge.dtype, device=pick_device(work.config.device))
    try:
        _ = model.head
    except InputError as error:
        raise InputError(f"{SECOND_JUDGE_KEY}.model={judge.model}: {error}") from error
    return Written(path=path, num_rows=1, stats={"parameters": loading.count_parameters(path)})


def _take(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Convert or copy a finished model into the run, and cut its vocabulary if that is asked."""
    from kdhpc.experiment import vocabulary
    from kdhpc.models import loading

    truth, path = work.config.truth, work.new_path(shard)
    settings = settings_of(shard.arm.fields, TruthSettings)
    dtype, name = truth.dtype, f"truth.model={truth.model}"
    stats: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) if settings.vocabulary else path
        given.take("truth", truth.model, truth.revision, truth.fingerprint, whole, dtype=dtype)
        given.check_taken(whole, work.config, dtype=dtype, name=name)
        if settings.vocabulary:
            stats |= vocabulary.cut(
                whole,
                path,
                settings.vocabulary,
                ids_file=truth.vocabulary_file,
                prompts_file=work.config.prompts,
                dtype=dtype,
                device=work.config.device,
            )
            given.check_taken(path, work.config, dtype=dtype, name=name)
    stats["parameters"] = loading.count_parameters(path)
    return Written(path=path, num_rows=1, stats=stats)


def _judge_corpus(
    part: documents.Part, config: LanguageConfig, training: Training, tokenizer_path: Path
) -> "Corpus":
    """Return the rows that a judge learns from: those of its own documents, cut as D's are.

    Args:
        part: the judge's part of the documents.
        config: config of the run.
        training: how it is trained.
        tokenizer_path: folder of its tokenizer.

    Raises:
        InputError: if there are too few.
    """
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.token_shards import padded
    from kdhpc.training.data import Corpus

    tokenizer = Tokenizer(tokenizer_path)
    rows = documents.rows_of(part, config, tokenizer)
    if len(rows) < training.batch_sequences:
        documents.check_sizes(config, tokenizer)
    samples = padded(rows, config.length, tokenizer.size)
    num_prompt = len(tokenizer.prompt_ids(config.prompt, config.begin))
    return Corpus(
        ids=samples.ids,
        length=samples.length,
        counting=Counting.with_tokenizer(tokenizer, num_prompt=num_prompt, count_eos=True),
    )


def _component_corpus(
    component: Component, config: LanguageConfig, training: Training, tokenizer_path: Path
) -> "Corpus":
    """Return the rows that a component learns from: the prompt, then a piece of a document each.

    Which rows are used, if not all, follows from digests of their ids.

    Raises:
        InputError: if the corpus is not the one that the run was submitted with, or too small.
    """
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.corpora import corpus_fingerprint, read_corpus
    from kdhpc.storage.token_shards import padded
    from kdhpc.training.data import Corpus

    fingerprint = corpus_fingerprint(component.corpus, component.text_column)
    if component.fingerprint not in {"", fingerprint}:
        raise InputError(
            f"truth.components: {component.corpus} has changed since the run was submitted; "
            f"expected the text with fingerprint {component.fingerprint[:12]}"
        )
    tokenizer = Tokenizer(tokenizer_path)
    prompt = tokenizer.prompt_ids(config.prompt, config.begin)
    texts = read_corpus(component.corpus, component.text_column)
    rows = documents.shuffled(documents.pieces(texts, tokenizer, prompt, config.length))
    rows = rows[: config.truth.component_sequences]
    if len(rows) < training.batch_sequences:
        raise InputError(
            f"truth.components: {component.corpus} makes {len(rows)} rows of {config.length} "
            f"tokens; expected at least truth.training.batch_sequences={training.batch_sequences}"
        )
    samples = padded(rows, config.length, tokenizer.size)
    return Corpus(
        ids=samples.ids,
        length=samples.length,
        counting=Counting.with_tokenizer(tokenizer, num_prompt=len(prompt), count_eos=True),
    )


def _text_corpus(truth: Truth, length: int, tokenizer: "PreTrainedTokenizerBase") -> "Corpus":
    """Cut documents into rows of `length` tokens; the last row of a document ends with EOS.

    Raises:
        InputError: if the corpus is not the one that the run was submitted with.
    """
    import numpy as np

    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.corpora import corpus_fingerprint, read_corpus
    from kdhpc.training.data import Corpus

    if truth.fingerprint not in {"", corpus_fingerprint(truth.corpus, truth.text_column)}:
        raise InputError(
            f"truth.corpus={truth.corpus}: has changed since the run was submitted; expected the "
            f"text with fingerprint {truth.fingerprint[:12]}"
        )
    rows = []
    for text in read_corpus(truth.corpus, truth.text_column):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rows += [ids[start : start + length] for start in range(0, len(ids), length)]
    batch = truth.training.batch_sequences if truth.training else 1
    if len(rows) < batch:
        raise InputError(
            f"truth.corpus={truth.corpus}: makes {len(rows)} rows of {length} tokens; expected at "
            f"least truth.training.batch_sequences={batch}"
        )
    padded = np.zeros((len(rows), length), np.uint16)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return Corpus(
        ids=padded,
        length=np.array([len(ids) for ids in rows], np.int32),
        counting=Counting(num_prompt=0, eos=tokenizer.eos_token_id, count_eos=True),
    )


TRUTH = Stage(
    name=arms.TRUTH,
    reads="a corpus, a GGUF file, a Hugging Face folder or hub id",
    writes="p*, and a second judge; Hugging Face checkpoint folders (safetensors, tokenizer)",
    plan=plan,
    run=run,
    modules=("kdhpc.training.loop", "deepspeed"),
    progress=progress,
    links=arms.MODELS,
    archived=lambda config, shard: "*.json",  # the tokenizer, by which texts can be read
)
