"""The stages that sample sequences from a model.

reads   a model checkpoint
writes  token shards: ids [N, L] uint16 (uint32 if the model has more than 65,536 of them),
        length [N] int32, log_prob_sum [N] float64 (nats, at temperature 1) and log_prob_tau_sum [N]
        float64 (nats, under the distribution that was drawn from), end_log_prob and
        end_log_prob_tau [N] float64 (nats, of the end token alone), and in evaluation sets with
        `scoring.per_token` also token_log_prob_tau [N, L] float32; num_prompt [N] int32, the tokens
        of each row's prompt, if there are several; in evaluation sets right [N] uint8, if they have
        answers, and rouge_l [N] float32, if they have references; component [N] uint8 if the truth
        is a mixture, and in its evaluation sets component_log_prob and component_first_log_prob
        [N, K] float64 (nats)
"""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdhpc.config.language import LanguageConfig, num_ids, only_prompt
from kdhpc.experiment import arms, documents
from kdhpc.experiment.documents import Documents
from kdhpc.experiment.estimates import model_flops, seconds
from kdhpc.experiment.prompts import Prompts, likeness, prompts_of, right_answers
from kdhpc.plan.shards import ADDED, Arm, Plan, Shard, cut, fields_of, settings_of
from kdhpc.plan.stages import Stage
from kdhpc.selection import Selection
from kdhpc.storage.work import Work, Written

if TYPE_CHECKING:
    from kdhpc.sampling.sampler import Sampler
    from kdhpc.storage.token_shards import Samples

WRITES = "token shards: ids [N, L] uint16 or uint32, length [N], log-probability sums [N] in nats"


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings that determine the sequences of an arm, together with the model."""

    seed: int
    stream: str
    prompt: str
    length: int
    eos: str
    dtype: str
    batch_rows: int
    draw: str
    engine: str
    threads: int
    selection: Selection
    begin: str = field(default="tokenizer", metadata=ADDED)
    prompts: Prompts | None = field(default=None, metadata=ADDED)
    """Which prompts sequences start with, if there are several."""
    score_rows: int | None = field(default=None, metadata=ADDED)
    score_head_tokens: int | None = field(default=None, metadata=ADDED)
    """How evaluation sets of a mixture are scored once they are drawn; None for others."""


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Settings that determine rows that are cut from a corpus, and what a judge says of them."""

    part: Literal["train", "eval"]
    documents: Documents
    seed: int
    length: int
    eos: str
    dtype: str
    batch_rows: int
    head_tokens: int
    threads: int


def _settings(
    config: LanguageConfig, sample_set: arms.SampleSet
) -> "SampleSettings | CorpusSettings":
    cut_from = Documents.of(config)
    if cut_from is not None and sample_set.stage == arms.SAMPLE_TRUTH:
        return CorpusSettings(
            part="eval" if sample_set.evaluation else "train",
            documents=cut_from,
            seed=config.seed,
            length=config.length,
            eos=config.eos,
            dtype=config.scoring.dtype,
            batch_rows=config.scoring.batch_rows,
            head_tokens=config.scoring.head_tokens,
            threads=config.threads,
        )
    is_truth = sample_set.model == arms.TRUTH_MODEL
    is_mixture = bool(config.truth.components) and is_truth
    is_scored = is_mixture and sample_set.evaluation
    return SampleSettings(
        seed=config.seed,
        stream=sample_set.stream,
        prompt=only_prompt(config),
        length=config.length,
        eos=config.eos,
        dtype=sample_set.dtype,
        batch_rows=config.sampling.rows_of(is_truth=is_truth),
        draw=config.sampling.draw,
        engine=config.sampling.engine,
        threads=config.threads,
        selection=sample_set.selection,
        begin=config.begin,
        prompts=Prompts.of(config, "eval" if sample_set.evaluation else "train"),
        score_rows=config.scoring.batch_rows if is_scored else None,
        score_head_tokens=config.scoring.head_tokens if is_scored else None,
    )


def plan(stage: str, config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan the shards of every sample set of one stage."""
    shards: list[Shard] = []
    flops = model_flops(config)
    id_bytes = 2.0 if num_ids(config.truth) <= 2**16 else 4.0
    for sample_set in arms.sample_sets(config):
        if sample_set.stage != stage:
            continue
        [model] = before.arm(*sample_set.model)
        arm = Arm(
            stage=stage,
            name=sample_set.arm,
            fields=fields_of(_settings(config, sample_set)),
            inputs={"model": model.recipe},
        )
        sizes = config.sampling
        token_bytes = id_bytes + 4.0 * (sample_set.evaluation and config.scoring.per_token)
        row_bytes = token_bytes * config.length + 36 + 4 * (config.prompts is not None)
        num_rows = sizes.eval_sequences if sample_set.evaluation else sizes.train_sequences
        shards += [
            Shard(
                arm=arm,
                name=name,
                row_range=row_range,
                reads=(model.key,),
                work=seconds(
                    config,
                    stage,
                    (row_range[1] - row_range[0]) * config.length,
                    flops[sample_set.model[1]],
                ),
                num_bytes=(row_range[1] - row_range[0]) * row_bytes,
            )
            for name, row_range in cut(num_rows, sizes.shard_sequences)
        ]
    return shards


def run(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Sample one shard, or cut it from a corpus."""
    if "part" in shard.arm.fields:
        return _cut(shard, work)
    from kdhpc.models import devices, loading
    from kdhpc.models.mixture import is_mixture
    from kdhpc.sampling.sampler import sample, sampler_for
    from kdhpc.scoring.counting import Counting

    settings = settings_of(shard.arm.fields, SampleSettings)
    model_path = work.local_input(shard.reads[0])
    devices.set_threads(settings.threads)
    devices.set_allocator(keep_freed=True)
    if is_mixture(model_path):
        return _from_mixture(shard, work, settings, model_path)
    loaded = loading.load(model_path, settings.dtype, work.config.device)
    prompts = prompts_of(
        loaded.tokenizer,
        prompt=settings.prompt,
        begin=settings.begin,
        prompts=settings.prompts,
        source=work.config.prompts,
        seed=settings.seed,
    )
    sampler = sampler_for(
        loaded,
        prompts=prompts,
        length=settings.length,
        batch_rows=settings.batch_rows,
        selection=settings.selection,
        draw=settings.draw,
        counting=Counting.with_tokenizer(
            loaded.tokenizer, num_prompt=len(prompts[0].ids), count_eos=settings.eos == "learn"
        ),
        engine=settings.engine,
        # This changes no sequence, so it is not part of the recipe.
        per_token=work.config.scoring.per_token and _is_evaluation(shard),
    )
    work.ready()
    samples = sample(
        sampler,
        rows=range(*(shard.row_range or (0, 0))),
        seed=settings.seed,
        stream=settings.stream,
        on_batch=lambda done: work.progress(done / shard.num_rows),
    )
    if _is_evaluation(shard):
        texts = samples, prompts, (shard.row_range or (0, 0))[0], loaded.tokenizer
        samples = replace(samples, right=right_answers(*texts), rouge_l=likeness(*texts))
    return _written(shard, work, samples, sampler)


def _written(
    shard: Shard, work: Work[LanguageConfig], samples: "Samples", sampler: "Sampler"
) -> Written:
    """Write sequences that a sampler, or one of several, has drawn."""
    from kdhpc.storage.token_shards import write_samples

    path = work.new_path(shard, ".arrow")
    draw = settings_of(shard.arm.fields, SampleSettings).draw
    metadata = {"kdhpc.key": shard.key, "kdhpc.recipe": shard.recipe, "kdhpc.draw": draw}
    write_samples(path, samples, metadata)
    return Written(
        path=path,
        num_rows=len(samples),
        stats={
            "device": sampler.device.type,
            "decoder": sampler.decoder.name,
            "arrays": sorted(samples.arrays()),
        },
    )


def _from_mixture(
    shard: Shard, work: Work[LanguageConfig], settings: SampleSettings, model_path: Path
) -> Written:
    """Sample one shard from a mixture of models; evaluation sets are scored under all of them.

    Log-probabilities of training sets are those under the component that a sequence comes from.
    """
    from kdhpc.models import mixture as mixtures
    from kdhpc.sampling.mixture import draw_components, sample_mixture
    from kdhpc.sampling.sampler import sampler_for
    from kdhpc.scoring.counting import Counting
    from kdhpc.scoring.mixture import score_mixture

    mixture = mixtures.load(model_path, settings.dtype, work.config.device)
    [prompt] = prompts_of(mixture.tokenizer, prompt=settings.prompt, begin=settings.begin)
    counting = Counting.with_tokenizer(
        mixture.tokenizer, num_prompt=len(prompt.ids), count_eos=settings.eos == "learn"
    )
    samplers = [
        sampler_for(
            loaded,
            prompts=[prompt],
            length=settings.length,
            batch_rows=settings.batch_rows,
            selection=Selection(),
            draw=settings.draw,
            counting=counting,
            engine=settings.engine,
            per_token=False,
        )
        for loaded in mixture.components
    ]
    rows = range(*(shard.row_range or (0, 0)))
    stream: dict[str, Any] = {"rows": rows, "seed": settings.seed, "stream": settings.stream}
    work.ready()
    component = draw_components(mixture.sharpened(settings.selection.beta), **stream)
    samples = sample_mixture(
        samplers,
        component,
        **stream,
        on_batch=lambda done: work.progress(0.5 * done / shard.num_rows),
    )
    drawn = replace(samples, component=component)
    if _is_evaluation(shard):
        beta = settings.selection.beta
        whole, own = score_mixture(
            mixture,
            samples,
            counting=counting,
            batch_rows=settings.score_rows or settings.batch_rows,
            head_tokens=settings.score_head_tokens or settings.batch_rows,
            per_token=work.config.scoring.per_token,
            betas=(1.0, beta),
            on_batch=lambda done: work.progress(0.5 + 0.5 * done / shard.num_rows),
        )
        drawn = replace(
            drawn,
            log_prob_sum=whole.log_prob_sum,
            log_prob_tau_sum=own.log_prob_sum,
            end_log_prob=whole.end_log_prob,
            end_log_prob_tau=own.end_log_prob,
            token_log_prob_tau=own.token_log_prob,
            component_log_prob=whole.component_log_prob,
            component_first_log_prob=whole.component_first_log_prob,
        )
    return _written(shard, work, drawn, samplers[0])


def _cut(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Cut one shard from a corpus, and let the judge score it in place of the p* that drew it."""
    from kdhpc.models import devices, loading
    from kdhpc.scoring import scorer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.token_shards import padded, write_samples

    settings = settings_of(shard.arm.fields, CorpusSettings)
    devices.set_threads(settings.threads)
    loaded = loading.load(work.local_input(shard.reads[0]), settings.dtype, work.config.device)
    tokenizer, prompt = loaded.tokenizer, settings.documents
    start, stop = shard.row_range or (0, 0)
    rows = documents.rows_of(settings.part, work.config, tokenizer)[start:stop]
    if len(rows) < stop - start:
        documents.check_sizes(work.config, tokenizer)
    samples = padded(rows, settings.length, tokenizer.size)
    work.ready()
    scores = scorer.score(
        loaded.model,
        samples,
        counting=Counting.with_tokenizer(
            tokenizer,
            num_prompt=len(tokenizer.prompt_ids(prompt.prompt, prompt.begin)),
            count_eos=settings.eos == "learn",
        ),
        batch_rows=settings.batch_rows,
        head_tokens=settings.head_tokens,
        per_token=work.config.scoring.per_token and settings.part == "eval",
        on_batch=lambda done: work.progress(done / shard.num_rows),
    )[1.0]
    judged = replace(
        samples,
        log_prob_sum=scores.log_prob_sum,
        log_prob_tau_sum=scores.log_prob_sum,
        end_log_prob=scores.end_log_prob,
        end_log_prob_tau=scores.end_log_prob,
        token_log_prob_tau=scores.token_log_prob,
    )
    path = work.new_path(shard, ".arrow")
    write_samples(path, judged, {"kdhpc.key": shard.key, "kdhpc.recipe": shard.recipe})
    return Written(
        path=path,
        num_rows=len(judged),
        stats={"device": loaded.model.device.type, "arrays": sorted(judged.arrays())},
    )


def _is_evaluation(shard: Shard) -> bool:
    """Return whether a shard is part of an evaluation set."""
    return shard.stage == arms.SAMPLE_STUDENTS or shard.arm.name == arms.TRUTH_EVAL[1]


def _archived(config: LanguageConfig, shard: Shard) -> str:
    """Keep truth's evaluation set and as many rows of D, which analysis compares with it."""
    first_row = shard.row_range[0] if shard.row_range else 0
    is_read = shard.arm.name == arms.TRUTH_EVAL[1] or first_row < config.sampling.eval_sequences
    return "*" if is_read else ""


SAMPLE_TRUTH = Stage(
    name=arms.SAMPLE_TRUTH,
    reads="p*",
    writes=f"D and truth's evaluation set; {WRITES}",
    plan=functools.partial(plan, arms.SAMPLE_TRUTH),
    run=run,
    modules=("kdhpc.sampling.sampler",),
    archived=_archived,
)
SAMPLE_TEACHER = Stage(
    name=arms.SAMPLE_TEACHER,
    reads="teachers",
    writes=f"D'_tau for every tau; {WRITES}",
    plan=functools.partial(plan, arms.SAMPLE_TEACHER),
    run=run,
    modules=("kdhpc.sampling.sampler",),
)
SAMPLE_STUDENTS = Stage(
    name=arms.SAMPLE_STUDENTS,
    reads="students and teachers",
    writes="evaluation sets of students at temperature 1 and at decode_temperatures, of teachers "
    f"at every tau; {WRITES}",
    plan=functools.partial(plan, arms.SAMPLE_STUDENTS),
    run=run,
    modules=("kdhpc.sampling.sampler",),
    archived=lambda config, shard: "*",
)
