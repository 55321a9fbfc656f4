"""Sample sequences from a model.

reads   a model checkpoint
writes  token shards: ids [N, L] uint16, length [N] int32, log_prob_sum [N] float64 (nats, at
        temperature 1) and log_prob_tau_sum [N] float64 (nats, under what was drawn from)
"""

import functools

from kdhpc import arms
from kdhpc.artifacts import Work, Written
from kdhpc.config import LanguageConfig, tokens_per_s
from kdhpc.shards import Arm, Plan, Shard, Stage, cut

WRITES = "token shards: ids [N, L] uint16, length [N], log-probability sums [N] in nats"


def plan(stage: str, config: LanguageConfig, before: Plan) -> list[Shard]:
    """Shards of every sample set of one stage."""
    shards: list[Shard] = []
    sampling = config.sampling
    for wanted in arms.sample_sets(config):
        if wanted.stage != stage:
            continue
        [model] = before.arm(*wanted.model)
        arm = Arm(
            stage=stage,
            name=wanted.arm,
            fields={
                "seed": config.seed,
                "stream": wanted.stream,
                "prompt": config.prompt,
                "length": config.length,
                "eos": config.eos,
                "dtype": wanted.dtype,
                "batch_rows": sampling.batch_rows,
                "draw": sampling.draw,
                "engine": sampling.engine,
                "threads": config.threads,
                **wanted.selection.fields,
            },
            inputs={"model": model.recipe},
        )
        num_rows = sampling.eval_sequences if wanted.evaluation else sampling.train_sequences
        shards += [
            Shard(
                arm=arm,
                name=name,
                rows=rows,
                reads=(model.key,),
                work=(rows[1] - rows[0]) * config.length,
                num_bytes=(rows[1] - rows[0]) * (2.0 * config.length + 20),
            )
            for name, rows in cut(num_rows, sampling.shard_sequences)
        ]
    return shards


def run(shard: Shard, work: Work) -> Written:
    """Sample one shard."""
    from kdhpc import devices, draws, inference, sampling, store

    config: LanguageConfig = work.config
    fields = shard.arm.fields
    model_path = work.local_input(shard.reads[0])
    devices.set_threads(config.threads)
    devices.set_allocator(keep_freed=True)
    loaded = inference.load(model_path, str(fields["dtype"]), config.device)
    tokenizer = loaded.tokenizer
    first, stop = shard.rows or (0, 0)
    sampler = sampling.sampler_for(
        loaded,
        prompt_ids=tuple(tokenizer.prompt_ids(config.prompt)),
        length=config.length,
        batch_rows=config.sampling.batch_rows,
        selector=draws.Selector(tau=fields["tau"], top_k=fields["top_k"], top_p=fields["top_p"]),
        draw=config.sampling.draw,
        eos=tokenizer.eos,
        count_eos=config.eos == "learn",
        engine=config.sampling.engine,
    )
    work.ready()
    samples = sampling.sample(
        sampler,
        rows=range(first, stop),
        seed=config.seed,
        stream=str(fields["stream"]),
        on_batch=lambda done: work.progress(done / shard.num_rows),
    )
    path = work.new_path(shard, ".arrow")
    about = {"kdhpc.key": shard.key, "kdhpc.recipe": shard.recipe, "kdhpc.draw": fields["draw"]}
    store.write_samples(path, samples, about)
    return Written(
        path=path,
        rows=len(samples),
        stats={"device": sampler.device.type, "decoder": sampler.decoder.name},
    )


SAMPLE_TRUTH = Stage(
    name=arms.SAMPLE_TRUTH,
    reads="p*",
    writes=f"D and truth's evaluation set; {WRITES}",
    unit="tokens",
    plan=functools.partial(plan, arms.SAMPLE_TRUTH),
    run=run,
    modules=("kdhpc.sampling",),
    rate=functools.partial(tokens_per_s, stage=arms.SAMPLE_TRUTH),
)
SAMPLE_TEACHER = Stage(
    name=arms.SAMPLE_TEACHER,
    reads="teachers",
    writes=f"D'_tau for every tau; {WRITES}",
    unit="tokens",
    plan=functools.partial(plan, arms.SAMPLE_TEACHER),
    run=run,
    modules=("kdhpc.sampling",),
    rate=functools.partial(tokens_per_s, stage=arms.SAMPLE_TEACHER),
)
SAMPLE_STUDENTS = Stage(
    name=arms.SAMPLE_STUDENTS,
    reads="students and teachers",
    writes=f"evaluation sets, students at temperature 1, teachers at every tau; {WRITES}",
    unit="tokens",
    plan=functools.partial(plan, arms.SAMPLE_STUDENTS),
    run=run,
    modules=("kdhpc.sampling",),
    rate=functools.partial(tokens_per_s, stage=arms.SAMPLE_STUDENTS),
)
