"""Score sample sets: log p* over models' samples (precision), log p'' over truth's (recall).

reads   token shards and a model checkpoint
writes  score shards: log_prob_sum [N] float64 in nats, num_tokens [N] int32, and where asked
        token_log_prob [N, L] float32
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

from kdhpc import arms
from kdhpc.artifacts import Work, Written
from kdhpc.config import LanguageConfig, tokens_per_s
from kdhpc.shards import Arm, Plan, Shard, Stage, cut

log = logging.getLogger(__name__)


def pairs(config: LanguageConfig) -> Iterator[tuple[str, tuple[str, str], str, tuple[str, str]]]:
    """Every (sampler, its sample set, scorer, its model); sets and models as (stage, arm)."""
    truth_model, truth_set = (arms.TRUTH, "truth"), (arms.SAMPLE_TRUTH, "eval")
    for found in arms.sample_sets(config):
        if found.evaluation and found.stage == arms.SAMPLE_STUDENTS:
            yield found.arm, (found.stage, found.arm), "truth", truth_model
    for trainee in arms.trainees(config):
        yield "truth", truth_set, trainee.name, (trainee.stage, trainee.name)


def plan(config: LanguageConfig, before: Plan) -> list[Shard]:
    """Shards of every pair of sampler and scorer."""
    shards = []
    scoring = config.scoring
    for sampler, sample_set, scorer, model_arm in pairs(config):
        sources = before.arm(*sample_set)
        [model] = before.arm(*model_arm)
        arm = Arm(
            stage=arms.SCORE,
            name=f"{sampler}-under-{scorer}",
            fields={
                "eos": config.eos,
                "prompt": config.prompt,
                "dtype": scoring.dtype,
                "batch_rows": scoring.batch_rows,
                "head_tokens": scoring.head_tokens,
                "engine": scoring.engine,
                "per_token": scoring.per_token,
                "threads": config.threads,
            },
            inputs={"samples": sources[0].arm.recipe, "model": model.recipe},
        )
        num_rows = sum(shard.num_rows for shard in sources)
        for name, rows in cut(num_rows, scoring.shard_sequences):
            needed = [s for s in sources if s.rows and s.rows[0] < rows[1] and rows[0] < s.rows[1]]
            size = rows[1] - rows[0]
            shards.append(
                Shard(
                    arm=arm,
                    name=name,
                    rows=rows,
                    reads=(model.key, *(shard.key for shard in needed)),
                    work=size * config.length,
                    num_bytes=size * (12 + 4 * config.length * scoring.per_token) + 4096,
                )
            )
    return shards


def run(shard: Shard, work: Work) -> Written:
    """Score one shard, in batches that shards do not move."""
    import numpy as np
    import torch

    from kdhpc import devices, inference, likelihood, native, store

    config: LanguageConfig = work.config
    devices.set_threads(config.threads)
    devices.set_allocator(keep_freed=True)
    loaded = inference.load(work.local_input(shard.reads[0]), config.scoring.dtype, config.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    head = None
    if config.scoring.engine == "native" and native.usable(model, "scoring.engine"):
        head = native.head_of(model)
        if head is None:
            log.warning("scoring.engine=native: gains nothing here without bfloat16 and AVX-512")
    samples, offset = _rows(shard, work)
    first, stop = shard.rows or (0, 0)
    num_prompt = len(tokenizer.prompt_ids(config.prompt))
    found = []
    work.ready()
    for start in range(first, stop, config.scoring.batch_rows):
        rows = slice(start - offset, min(start + config.scoring.batch_rows, stop) - offset)
        ids = torch.from_numpy(samples.ids[rows].astype(np.int64)).to(model.device)
        length = torch.from_numpy(samples.length[rows].copy()).to(model.device)
        last = ids.gather(1, (length.long() - 1)[:, None]).squeeze(1)
        counts = likelihood.counted(
            length,
            ids.shape[1],
            num_prompt=num_prompt,
            ended=last == tokenizer.eos,
            count_eos=config.eos == "learn",
        )
        [log_probs] = likelihood.token_log_probs(
            model, ids, head_tokens=config.scoring.head_tokens, head=head
        )
        found.append(
            store.Scores(
                log_prob_sum=torch.where(counts, log_probs, 0.0).double().sum(1).cpu().numpy(),
                num_tokens=counts.sum(1, dtype=torch.int32).cpu().numpy(),
                token_log_prob=torch.where(counts, log_probs, torch.nan).cpu().numpy()
                if config.scoring.per_token
                else None,
            )
        )
        work.progress((start - first) / shard.num_rows)
    path = work.new_path(shard, ".h5")
    store.write_scores(path, store.join_scores(found))
    return Written(
        path=path,
        rows=shard.num_rows,
        stats={"device": model.device.type, "engine": "native" if head else "torch"},
    )


def _rows(shard: Shard, work: Work) -> tuple[Any, int]:
    """The sample shards that hold the shard's rows, and the index of their first row."""
    from kdhpc import store

    sources = [work.plan.shards[key] for key in shard.reads[1:]]
    first = sources[0].rows
    return store.read_samples([work.input(s.key) for s in sources]), first[0] if first else 0


SCORE = Stage(
    name=arms.SCORE,
    reads="evaluation sets; p*, teachers and students",
    writes="score shards: log_prob_sum [N] float64 in nats, num_tokens [N] int32",
    unit="tokens",
    plan=plan,
    run=run,
    modules=("kdhpc.likelihood",),
    rate=functools.partial(tokens_per_s, stage=arms.SCORE),
)
