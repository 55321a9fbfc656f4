"""Train teachers, direct students and distilled students.

reads   token shards
writes  Hugging Face checkpoint folders: config.json, model.safetensors, tokenizer
"""

import functools

from kdhpc.config.language import LanguageConfig, tokens_per_s
from kdhpc.experiment import arms
from kdhpc.experiment.trainings import TrainSettings, join_ranks, progress, train_shard
from kdhpc.models.sizes import num_parameters
from kdhpc.plan.shards import Arm, Plan, Shard
from kdhpc.plan.stages import Stage
from kdhpc.storage.work import Work, Written

WRITES = "Hugging Face checkpoint folders (safetensors, tokenizer)"


def plan(stage: str, config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan one shard for every model of this stage; work is in tokens of whole rows."""
    shards = []
    [truth] = before.arm(*arms.TRUTH_MODEL)
    for trainee in arms.trainees(config):
        if trainee.stage != stage:
            continue
        data = before.arm(*trainee.data)
        training = trainee.model.training
        sequences = config.sampling.train_sequences
        steps = (training.stop_after_epochs or training.epochs) * (
            sequences // training.batch_sequences
        )
        validation = before.arm(*arms.TRUTH_EVAL) if training.validate_every_steps else []
        stream = f"{trainee.kind}/s{trainee.seed}/{trainee.size}"
        settings = TrainSettings.of(
            trainee.model, config, stream=stream, prompt=config.prompt, eos=config.eos
        )
        arm = Arm(
            stage=stage,
            name=trainee.name,
            fields=settings.fields | {"train_sequences": sequences},
            inputs={"data": data[0].arm.recipe, "tokenizer": truth.recipe},
            nodes=training.nodes,
            ranks_per_node=training.ranks_per_node,
        )
        shards.append(
            Shard(
                arm=arm,
                name="00000",
                reads=(truth.key, *(shard.key for shard in (*data, *validation))),
                work=steps * training.batch_sequences * config.length / training.world_size,
                num_bytes=4.0 * num_parameters(trainee.model.shape, 49152),
            )
        )
    return shards


def run(shard: Shard, work: Work[LanguageConfig]) -> Written | None:
    """Train one model on token shards."""
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.token_shards import map_token_rows
    from kdhpc.training.data import Corpus

    trainee = next(t for t in arms.trainees(work.config) if t.name == shard.arm.name)
    join_ranks(trainee.model, work)
    [truth] = work.plan.arm(*arms.TRUTH_MODEL)
    tokenizer_path = work.input(truth.key)
    tokenizer = Tokenizer(tokenizer_path)
    fields = shard.arm.fields
    counting = Counting(
        num_prompt=len(tokenizer.prompt_ids(fields["prompt"])),
        eos=tokenizer.eos,
        count_eos=fields["eos"] == "learn",
    )

    def corpus(stage: str, arm: str) -> Corpus:
        rows = map_token_rows([work.input(s.key) for s in work.plan.arm(stage, arm)])
        return Corpus(ids=rows, length=rows.length, counting=counting)

    training = trainee.model.training
    validation = corpus(*arms.TRUTH_EVAL) if training.validate_every_steps else None
    data = corpus(*trainee.data)
    return train_shard(shard, work, training, data, tokenizer_path, validation=validation)


TRAIN_ON_TRUTH = Stage(
    name=arms.TRAIN_ON_TRUTH,
    reads="D",
    writes=f"teachers and direct students; {WRITES}",
    plan=functools.partial(plan, arms.TRAIN_ON_TRUTH),
    run=run,
    modules=("kdhpc.training.loop", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRAIN_ON_TRUTH),
    progress=progress,
)
TRAIN_STUDENTS = Stage(
    name=arms.TRAIN_STUDENTS,
    reads="D'_tau",
    writes=f"distilled students; {WRITES}",
    plan=functools.partial(plan, arms.TRAIN_STUDENTS),
    run=run,
    modules=("kdhpc.training.loop", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRAIN_STUDENTS),
    progress=progress,
)
