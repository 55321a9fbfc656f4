"""The stage that scores sample sets: of models under p* (precision), of p* under models (recall).

reads   token shards and a model checkpoint
writes  score shards: log_prob_sum [N] float64 in nats, num_tokens [N] int32, end_log_prob [N]
        float64 in nats, and with `scoring.per_token` also token_log_prob [N, L] float32; scores at
        temperatures other than 1 are in groups called T0.8. A second judge with another tokenizer
        than the truth's writes log_prob_sum, num_tokens, num_characters and num_replaced [N]
        int32; a truth that is a mixture writes component_log_prob and component_first_log_prob
        [N, K] float64 (nats) as well
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdhpc.config.language import SECOND_JUDGE_KEY, LanguageConfig, only_prompt
from kdhpc.experiment import arms
from kdhpc.experiment.estimates import model_flops, seconds
from kdhpc.experiment.given import num_positions
from kdhpc.plan.shards import ADDED, Arm, Plan, Shard, cut, fields_of, settings_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.work import Work, Written
from kdhpc.types import Corruption

if TYPE_CHECKING:
    from kdhpc.models.loading import Loaded
    from kdhpc.models.mixture import LanguageMixture
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.score_shards import Scores
    from kdhpc.storage.token_shards import Samples

OWN_MODEL = "own_model"
"""Role of the model that drew the samples, if scores are averaged over its next token."""
TOKENIZER = "tokenizer"
"""Role of the truth under a second judge, which may have another tokenizer than the samples."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Settings that determine the scores of an arm, together with the samples and the model."""

    eos: str
    prompt: str
    dtype: str
    batch_rows: int
    head_tokens: int
    engine: str
    per_token: bool
    threads: int
    begin: str = field(default="tokenizer", metadata=ADDED)
    temperatures: tuple[float, ...] = field(default=(1.0,), metadata=ADDED)
    corruption: Corruption | None = field(default=None, metadata=ADDED)
    seed: int | None = field(default=None, metadata=ADDED)
    """Seed of the run, if samples are corrupted."""


def plan(config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan the shards of every pair of sampler and scorer."""
    shards = []
    flops = model_flops(config)
    scoring = config.scoring
    row_bytes = 20 + 4 * config.length * scoring.per_token
    settings = ScoreSettings(
        eos=config.eos,
        prompt=only_prompt(config),
        dtype=scoring.dtype,
        batch_rows=scoring.batch_rows,
        head_tokens=scoring.head_tokens,
        engine=scoring.engine,
        per_token=scoring.per_token,
        threads=config.threads,
        begin=config.begin,
    )
    for pair in arms.pairs(config):
        sources = before.arm(*pair.samples)
        [model] = before.arm(*pair.model)
        inputs, model_keys = {"samples": sources[0].arm.recipe, "model": model.recipe}, [model.key]
        if pair.own_model:
            [own_model] = before.arm(*pair.own_model)
            inputs[OWN_MODEL] = own_model.recipe
            model_keys.append(own_model.key)
        if pair.model == arms.SECOND_JUDGE_MODEL:
            [truth] = before.arm(*arms.TRUTH_MODEL)
            inputs[TOKENIZER] = truth.recipe
            model_keys.append(truth.key)
        is_mixture = bool(config.truth.components) and pair.scorer == arms.TRUTH
        arm = Arm(
            stage=arms.SCORE,
            name=pair.arm,
            fields=fields_of(
                dataclasses.replace(
                    settings,
                    dtype=_dtype(config, pair),
                    # The extension has no head for a mixture.
                    engine="torch" if is_mixture else scoring.engine,
                    temperatures=pair.temperatures,
                    corruption=pair.corruption,
                    seed=config.seed if pair.corruption else None,
                )
            ),
            inputs=inputs,
        )
        num_rows = sum(shard.num_rows for shard in sources)
        for name, row_range in cut(num_rows, scoring.shard_sequences):
            start, stop = row_range
            needed = [
                source
                for source in sources
                if source.row_range and source.row_range[0] < stop and start < source.row_range[1]
            ]
            size = stop - start
            shards.append(
                Shard(
                    arm=arm,
                    name=name,
                    row_range=row_range,
                    reads=(*model_keys, *(shard.key for shard in needed)),
                    work=seconds(config, arms.SCORE, size * config.length, flops[pair.model[1]]),
                    num_bytes=size * row_bytes * len(pair.temperatures) + 4096,
                )
            )
    return shards


def _dtype(config: LanguageConfig, pair: arms.Pair) -> str:
    """Return the dtype of the scorer's body: a second judge that is given has its own."""
    judge = config.truth.second_judge
    if judge is None or judge.model == "train" or pair.scorer != arms.SECOND_JUDGE:
        return config.scoring.dtype
    return judge.dtype


def run(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Score one shard."""
    from kdhpc.models import devices, loading
    from kdhpc.models import mixture as mixtures
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.storage.score_shards import write_scores

    settings = settings_of(shard.arm.fields, ScoreSettings)
    devices.set_threads(settings.threads)
    devices.set_allocator(keep_freed=True)
    model_path = work.local_input(shard.reads[0])
    samples = _samples(shard, work)
    if mixtures.is_mixture(model_path):
        mixture = mixtures.load(model_path, settings.dtype, work.config.device)
        samples, counting = _counted(shard, samples, mixture.tokenizer)
        scores, engine = _score_mixture(shard, work, mixture, samples, counting), "torch"
        device = mixture.device
    else:
        loaded = loading.load(model_path, settings.dtype, work.config.device)
        tokenizer, device = loaded.tokenizer, loaded.model.device
        if TOKENIZER in shard.arm.inputs:
            tokenizer = Tokenizer(work.input(shard.reads[1]))
            if not loaded.tokenizer.has_ids_of(tokenizer):
                return _score_texts(shard, work, loaded, samples, tokenizer)
        samples, counting = _counted(shard, samples, tokenizer)
        score = _score_expected if OWN_MODEL in shard.arm.inputs else _score
        scores, engine = score(shard, work, loaded, samples, counting)
    path = work.new_path(shard, ".h5")
    write_scores(path, scores)
    return Written(
        path=path,
        num_rows=shard.num_rows,
        stats={
            "device": device.type,
            "engine": engine,
            "arrays": sorted(scores[settings.temperatures[0]].arrays()),
        },
    )


def _counted(
    shard: Shard, samples: "Samples", tokenizer: "Tokenizer"
) -> "tuple[Samples, Counting]":
    """Return the sequences as they are scored, perhaps damaged, and which of their tokens count."""
    from kdhpc.scoring.corruption import corrupt
    from kdhpc.scoring.counting import Counting

    settings = settings_of(shard.arm.fields, ScoreSettings)
    counting = Counting.with_tokenizer(
        tokenizer,
        num_prompt=tokenizer.num_prompt(settings.prompt, settings.begin),
        count_eos=settings.eos == "learn",
    )
    if settings.corruption:
        rows = range(*(shard.row_range or (0, 0)))
        samples = corrupt(
            samples, settings.corruption, seed=settings.seed or 0, rows=rows, counting=counting
        )
    return samples, counting


def _score_mixture(
    shard: Shard,
    work: Work[LanguageConfig],
    mixture: "LanguageMixture",
    samples: "Samples",
    counting: "Counting",
) -> dict[float, "Scores"]:
    """Return scores under a truth that is a mixture of models, at temperature 1."""
    from kdhpc.scoring.mixture import score_mixture

    settings = settings_of(shard.arm.fields, ScoreSettings)
    work.ready()
    [scores] = score_mixture(
        mixture,
        samples,
        counting=counting,
        batch_rows=settings.batch_rows,
        head_tokens=settings.head_tokens,
        per_token=settings.per_token,
        on_batch=lambda done: work.progress(done / shard.num_rows),
    )
    return {1.0: scores}


def _score_texts(
    shard: Shard,
    work: Work[LanguageConfig],
    loaded: "Loaded",
    samples: "Samples",
    tokenizer: "Tokenizer",
) -> Written:
    """Let a judge with a tokenizer of its own score the texts of sequences.

    Args:
        shard: the shard.
        work: config, plan and paths.
        loaded: the judge.
        samples: the sequences.
        tokenizer: tokenizer of the sequences.
    """
    from kdhpc.errors import InputError
    from kdhpc.sampling import native
    from kdhpc.scoring import characters
    from kdhpc.storage.score_shards import write_scores

    settings = settings_of(shard.arm.fields, ScoreSettings)
    head = native.head_for(loaded.model, "scoring.engine") if settings.engine == "native" else None
    prompt_ids = tokenizer.prompt_ids(settings.prompt, settings.begin)
    texts = characters.texts_of(samples, tokenizer, prompt_ids)
    work.ready()
    try:
        scores, left_out = characters.score_texts(
            loaded.model,
            loaded.tokenizer,
            texts,
            prompt=settings.prompt,
            num_positions=num_positions(work.input(shard.reads[0])),
            batch_rows=settings.batch_rows,
            head_tokens=settings.head_tokens,
            head=head,
            on_batch=lambda done: work.progress(done / shard.num_rows),
        )
    except InputError as error:
        judge = work.config.truth.second_judge
        name = f"{SECOND_JUDGE_KEY}.model={judge.model if judge else None}"
        raise InputError(f"{name}: {error}") from error
    path = work.new_path(shard, ".h5")
    write_scores(path, {1.0: scores})
    return Written(
        path=path,
        num_rows=shard.num_rows,
        stats={
            "device": loaded.model.device.type,
            "engine": "native" if head else "torch",
            "arrays": sorted(scores.arrays()),
            "texts_left_out": left_out,
        },
    )


def _score(
    shard: Shard,
    work: Work[LanguageConfig],
    loaded: "Loaded",
    samples: "Samples",
    counting: "Counting",
) -> tuple[dict[float, "Scores"], str]:
    """Return scores by temperature, and the engine that computed them."""
    from kdhpc.sampling import native
    from kdhpc.scoring import scorer

    settings = settings_of(shard.arm.fields, ScoreSettings)
    head = native.head_for(loaded.model, "scoring.engine") if settings.engine == "native" else None
    work.ready()
    scores = scorer.score(
        loaded.model,
        samples,
        counting=counting,
        batch_rows=settings.batch_rows,
        head_tokens=settings.head_tokens,
        per_token=settings.per_token,
        head=head,
        temperatures=tuple(settings.temperatures),
        on_batch=lambda done: work.progress(done / shard.num_rows),
    )
    return scores, "native" if head else "torch"


def _score_expected(
    shard: Shard,
    work: Work[LanguageConfig],
    loaded: "Loaded",
    samples: "Samples",
    counting: "Counting",
) -> tuple[dict[float, "Scores"], str]:
    """Return scores averaged over the next token of the model that drew the samples."""
    from kdhpc.models import loading
    from kdhpc.scoring.expected import score_expected

    settings = settings_of(shard.arm.fields, ScoreSettings)
    own = loading.load_model(
        work.local_input(shard.reads[1]), dtype=settings.dtype, device=loaded.model.device
    )
    work.ready()
    scores = score_expected(
        own,
        loaded.model,
        samples,
        counting=counting,
        batch_rows=settings.batch_rows,
        head_tokens=settings.head_tokens,
        per_token=settings.per_token,
        on_batch=lambda done: work.progress(done / shard.num_rows),
    )
    return {1.0: scores}, "torch"


def _samples(shard: Shard, work: Work[LanguageConfig]) -> "Samples":
    """Read the sequences of the shard from the sample shards that hold them."""
    from kdhpc.storage.token_shards import read_samples

    read = [work.plan.shards[key] for key in shard.reads]
    sources = [source for source in read if source.row_range]  # models have no rows
    first = sources[0].row_range[0] if sources[0].row_range else 0
    start, stop = shard.row_range or (0, 0)
    return read_samples([work.input(s.key) for s in sources])[start - first : stop - first]


SCORE = Stage(
    name=arms.SCORE,
    reads="evaluation sets; p* or judges, teachers and students",
    writes="score shards: log_prob_sum and end_log_prob [N] float64 in nats, num_tokens [N] int32",
    plan=plan,
    run=run,
    modules=("kdhpc.scoring.scorer",),
)
