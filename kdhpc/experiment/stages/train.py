"""Train teachers, direct students and distilled students.

reads   token shards
writes  Hugging Face checkpoint folders: config.json, model.safetensors, tokenizer
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from kdhpc.config.language import LanguageConfig, num_ids, only_prompt
from kdhpc.config.model import Model
from kdhpc.experiment import arms, given
from kdhpc.experiment.estimates import sizes_of, training_seconds
from kdhpc.experiment.trainings import TrainSettings, join_ranks, progress, train_shard
from kdhpc.models.sizes import num_parameters
from kdhpc.plan.shards import Arm, Plan, Shard, fields_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.work import Work, Written

START = "start"
"""Role of the direct student from whose weights a fine-tuning starts."""
TEACHER = "teacher"
"""Role of the teacher whose distributions are learnt."""
WRITES = "Hugging Face checkpoint folders (safetensors, tokenizer)"


def plan(stage: str, config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan one shard for every model of this stage."""
    shards = []
    [truth] = before.arm(*arms.TRUTH_MODEL)
    for trainee in arms.trainees(config):
        if trainee.stage != stage:
            continue
        training = trainee.training
        if training is None:
            shards.append(_taken(trainee, truth))
            continue
        sequences = trainee.model.train_sequences or config.sampling.train_sequences
        data = [
            shard
            for shard in before.arm(*trainee.data)
            if shard.row_range and shard.row_range[0] < sequences
        ]
        steps = (training.stop_after_epochs or training.epochs) * (
            sequences // training.batch_sequences
        )
        validation = before.arm(*arms.TRUTH_EVAL) if training.validate_every_steps else []
        start = before.arm(*trainee.start) if trainee.start else []
        teacher = before.arm(*trainee.teacher) if trainee.teacher else []
        stream = f"{trainee.kind}/s{trainee.seed}/{trainee.size}"
        settings = TrainSettings.of(
            trainee.model,
            training,
            config,
            stream=stream,
            prompt=only_prompt(config),
            begin=config.begin,
            eos=config.eos,
        )
        if start:
            # The weights are those of an input, so that no architecture determines them here.
            settings = dataclasses.replace(settings, shape=None, architecture=None, start="")
        if teacher:
            settings = dataclasses.replace(settings, soft_tau=trainee.tau)
        arm = Arm(
            stage=stage,
            name=trainee.name,
            fields=settings.fields | {"train_sequences": sequences},
            inputs={"data": data[0].arm.recipe, "tokenizer": truth.recipe}
            | ({START: start[0].recipe} if start else {})
            | ({TEACHER: teacher[0].recipe} if teacher else {}),
            nodes=training.nodes,
            ranks_per_node=training.ranks_per_node,
        )
        sizes = sizes_of(config, trainee.key, trainee.model.design)
        shards.append(
            Shard(
                arm=arm,
                name="00000",
                reads=(truth.key, *(shard.key for shard in (*data, *validation, *start, *teacher))),
                work=training_seconds(config, stage, sizes, training, steps),
                num_bytes=4.0 * num_parameters(sizes, num_ids(config.truth)) if sizes else 0.0,
            )
        )
    return shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class TakenSettings:
    """Settings that determine a teacher that is taken as it is."""

    kind: Literal["given"]
    fingerprint: str
    """Identity of the model; where it is kept determines nothing."""
    dtype: str


def _taken(trainee: arms.Trainee, truth: Shard) -> Shard:
    """Plan the shard of a teacher that is taken as it is."""
    model = trainee.model
    settings = TakenSettings(kind="given", fingerprint=model.fingerprint, dtype=model.dtype)
    arm = Arm(
        stage=trainee.stage,
        name=trainee.name,
        fields=fields_of(settings),
        inputs={"tokenizer": truth.recipe},
    )
    return Shard(arm=arm, name="00000", reads=(truth.key,))


def _take(shard: Shard, model: Model, tokenizer_path: Path, work: Work[LanguageConfig]) -> Written:
    """Take a teacher into the run as it is."""
    from kdhpc.models import devices, loading

    devices.set_threads(work.config.threads)
    path, dtype = work.new_path(shard), shard.arm.fields["dtype"]
    place, name = model.model or "", f"teacher.model={model.model}"
    given.take(
        "teacher",
        place,
        model.revision,
        model.fingerprint,
        path,
        dtype=dtype,
        tokenizer_path=tokenizer_path,
    )
    given.check_taken(path, work.config, dtype=dtype, name=name)
    return Written(path=path, num_rows=1, stats={"parameters": loading.count_parameters(path)})


def run(shard: Shard, work: Work[LanguageConfig]) -> Written | None:
    """Train one model on token shards, or take a teacher as it is."""
    from kdhpc.models import devices
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.token_shards import map_token_rows
    from kdhpc.training.data import Corpus
    from kdhpc.training.scratch import copy_to_node

    trainee = next(t for t in arms.trainees(work.config) if t.name == shard.arm.name)
    [truth] = work.plan.arm(*arms.TRUTH_MODEL)
    training = trainee.training
    if training is None:
        return _take(shard, trainee.model, work.input(truth.key), work)
    join_ranks(training, work)
    tokenizer_path = work.input(truth.key)
    tokenizer = Tokenizer(tokenizer_path)
    fields = shard.arm.fields
    begin = fields.get("begin", TrainSettings.begin)
    counting = Counting.with_tokenizer(
        tokenizer,
        num_prompt=tokenizer.num_prompt(fields["prompt"], begin),
        count_eos=fields["eos"] == "learn",
    )

    def corpus(stage: str, arm: str, num_rows: int | None = None) -> Corpus:
        """Map an arm's sequences; the first `num_rows` to train on are copied to the node."""
        keys = [s.key for s in work.plan.arm(stage, arm) if s.key in shard.reads]
        paths = [work.input(key) for key in keys]
        rows = map_token_rows(paths)
        if num_rows is not None:
            rows = copy_to_node(rows, paths[0], devices.pick_device(work.config.device))
        return Corpus(
            ids=rows,
            length=rows.length[:num_rows],
            counting=counting,
            num_prompt=None if rows.num_prompt is None else rows.num_prompt[:num_rows],
        )

    validation = corpus(*arms.TRUTH_EVAL) if training.validate_every_steps else None
    data = corpus(*trainee.data, fields["train_sequences"])
    with _start(trainee, tokenizer_path, work) as start_path:
        return train_shard(
            shard,
            work,
            training,
            data,
            tokenizer_path,
            start_path=start_path,
            teacher_path=work.input(work.plan.arm(*trainee.teacher)[0].key)
            if trainee.teacher
            else None,
            validation=validation,
        )


@contextlib.contextmanager
def _start(
    trainee: arms.Trainee, tokenizer_path: Path, work: Work[LanguageConfig]
) -> Iterator[Path | None]:
    """Provide a folder with the weights that a training starts from; None for new weights."""
    model = trainee.model
    if trainee.start:
        [direct] = work.plan.arm(*trainee.start)
        yield work.input(direct.key)
        return
    if model.model is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        given.take(
            trainee.key,
            model.model,
            model.revision,
            model.fingerprint,
            Path(folder),
            dtype="float32",
            tokenizer_path=tokenizer_path,
        )
        yield Path(folder)


TRAIN_ON_TRUTH = Stage(
    name=arms.TRAIN_ON_TRUTH,
    reads="D",
    writes=f"teachers and direct students; {WRITES}",
    plan=functools.partial(plan, arms.TRAIN_ON_TRUTH),
    run=run,
    modules=("kdhpc.training.loop", "deepspeed"),
    progress=progress,
    links=arms.MODELS,
)
TRAIN_STUDENTS = Stage(
    name=arms.TRAIN_STUDENTS,
    reads="D'_tau",
    writes=f"distilled students; {WRITES}",
    plan=functools.partial(plan, arms.TRAIN_STUDENTS),
    run=run,
    modules=("kdhpc.training.loop", "deepspeed"),
    progress=progress,
    links=arms.MODELS,
)
