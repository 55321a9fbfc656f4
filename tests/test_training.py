"""Training on DeepSpeed equals a plain loop with torch's AdamW, and resumes exactly."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import need
from real_slurm import DEVCLUSTER, need_slurm
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import CPU, LONG, RECIPE, WIDTH, corpus, fresh, newest, one_process, run, saver
from transformers import AutoModelForCausalLM, get_wsd_schedule

from kdhpc import seeding
from kdhpc.cluster import failures
from kdhpc.config.model import Dtype, Shape, Training
from kdhpc.errors import ClusterError, DamagedError, InputError
from kdhpc.models import huggingface, sizes
from kdhpc.models.devices import DTYPES
from kdhpc.models.loading import load_model
from kdhpc.scoring.counting import Counting
from kdhpc.storage.token_shards import Samples, map_token_rows, write_samples
from kdhpc.training import checkpoints, ranks
from kdhpc.training.data import batch_of
from kdhpc.training.engine import Engine, State, Teacher
from kdhpc.training.loop import DivergedError, Trained, Watch, train
from kdhpc.training.schedule import Schedule
from kdhpc.training.scratch import copy_to_node

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
TOY = Path(__file__).with_name("toy_training.py")


@pytest.fixture(autouse=True, scope="module")
def alone() -> None:
    one_process()


def plain_loop(
    recipe: Training, loss_of: Callable[[Any, Tensor, Tensor], Tensor] | None = None
) -> tuple[list[float], Any]:
    """Train the same model with only torch's AdamW and transformers' schedule."""
    model, data = fresh(), corpus()
    ids, length = np.asarray(data.ids).astype(np.int64), data.length
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    total = 20
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(0.01 * total),
        num_decay_steps=round(0.2 * total),
        num_training_steps=total,
        decay_type="linear",
    )
    losses = []
    for step in range(total):
        epoch, batch = divmod(step, 8)
        order = seeding.permutation(0, "test", epoch, 256)
        rows = order[batch * 32 : (batch + 1) * 32]
        log_p = model(torch.from_numpy(ids[rows])).logits.log_softmax(-1)
        picked = [
            -log_p[i, position - 1, ids[row, position]]
            for i, row in enumerate(rows)
            for position in range(3, length[row])
        ]
        loss = loss_of(model, *data.read(rows)) if loss_of else torch.stack(picked).mean()
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model


def test_losses_and_weights_equal_a_plain_loop() -> None:
    trained = run()
    losses, model = plain_loop(RECIPE)
    assert np.allclose(trained.losses, losses, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained.weights[name], parameter, atol=1e-5), name


def assert_same_curve(losses: Sequence[float], others: Sequence[float]) -> None:
    assert len(losses) == len(others) == 50
    assert np.allclose(losses[:10], others[:10], rtol=1e-5, atol=0)
    assert np.allclose(losses, others, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def long() -> Trained:
    return run(LONG)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_train_the_same_model(long: Trained, stage: int) -> None:
    assert_same_curve(run(dataclasses.replace(LONG, zero_stage=stage)).losses, long.losses)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile itself reads it
@pytest.mark.parametrize(
    "layout",
    [
        {"activation_checkpointing": True},
        pytest.param({"compile": True}, marks=COMPILER),
        {"head_tokens": 100},
        {"micro_batch_sequences": 7},
    ],
)
def test_what_saves_memory_trains_the_same_model(long: Trained, layout: dict[str, Any]) -> None:
    assert_same_curve(run(dataclasses.replace(LONG, **layout)).losses, long.losses)


def test_bfloat16_learns_like_float32() -> None:
    whole, half = run(), run(dataclasses.replace(RECIPE, dtype="bfloat16"))
    assert np.allclose(whole.losses, half.losses, rtol=1e-2)
    assert {w.dtype for w in half.weights.values()} == {torch.bfloat16}


def two_steps(recipe: Training, state: State | None = None) -> list[State]:
    """Do two steps, the second one from a checkpoint if there is one; return both checkpoints."""
    schedule = Schedule.of(recipe, 256)
    with contextlib.closing(Engine(fresh(), recipe, schedule, CPU, WIDTH)) as engine:
        states = []
        for step in (0, 1):
            if step and state is not None:
                engine.restore(step, state)
            size = recipe.batch_sequences
            rows = np.arange(size * step, size * (step + 1))
            engine.step(batch_of(corpus(), rows, recipe, pin=False))
            states.append(engine.state(step + 1))
    return states


def test_gradients_in_bfloat16_are_summed_in_float32_and_go_on_bit_for_bit() -> None:
    """Sums in bfloat16 would be off by 0.72 %; rounding each gradient is off by 0.53 %."""
    whole = dataclasses.replace(RECIPE, batch_sequences=16)
    short = dataclasses.replace(whole, dtype="bfloat16", micro_batch_sequences=1)
    exact = two_steps(whole)[0].tensors
    names = [name for name in exact if name.startswith("exp_avg/")]
    for stage in (1, 2, 3):
        recipe = dataclasses.replace(short, zero_stage=stage)
        first, second = two_steps(recipe)
        errors = sum((first.tensors[name] - exact[name]).square().sum() for name in names)
        assert errors < 0.006**2 * sum(exact[name].square().sum() for name in names)
        assert_equal_weights(two_steps(recipe, first)[1].tensors, second.tensors)


@pytest.mark.parametrize("stop_at", [3, 11])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole = run()
    steps = iter(range(1, 100))
    watch = Watch(should_stop=lambda: next(steps) == stop_at, save=saver(tmp_path))
    first = run(watch=watch)
    assert not first.finished
    rest = run(state=newest(tmp_path))
    assert first.losses + rest.losses == whole.losses
    assert_equal_weights(rest.weights, whole.weights)


def assert_equal_weights(some: Mapping[str, torch.Tensor], others: Mapping[str, Any]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(some[name], others[name]) for name in some)


def toy(out: Path, *words: str, code: int = 0) -> None:
    """Run the toy training in a separate process, with a checkpoint every three steps."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, str(TOY), str(out), "--states", str(out), "--every", "3", *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == code, finished.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, seed: int) -> None:
    killed_at = int(np.random.default_rng(seed).integers(1, 20))
    toy(tmp_path, "--die-at", str(killed_at), code=-signal.SIGKILL)
    state = newest(tmp_path)
    newest_step = killed_at // 3 * 3  # it may still have been written, the one before may not
    assert (state.step if state else 0) in {newest_step, max(0, newest_step - 3)}
    rest, whole = run(state=state), run()
    assert rest.losses == whole.losses[20 - len(rest.losses) :]
    assert_equal_weights(rest.weights, whole.weights)


def test_a_kill_while_a_checkpoint_is_written_loses_one_interval(tmp_path: Path) -> None:
    """The training has gone on by two steps when the writer is killed."""
    toy(tmp_path, "--die-in-save-of", "9", code=-signal.SIGXFSZ)
    [half] = tmp_path.glob(".tmp*")
    state = newest(tmp_path)
    assert state is not None
    assert state.step == 6
    toy(tmp_path)
    assert not half.exists()
    whole = run()
    assert json.loads((tmp_path / "losses-1.json").read_text()) == whole.losses[6:]
    assert_equal_weights(load_file(tmp_path / "weights-1.safetensors"), whole.weights)


@pytest.mark.parametrize("step", [3, 20])
def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path, step: int) -> None:
    """After the next step, or at the end; the checkpoints before it stay."""
    recipe = dataclasses.replace(RECIPE, checkpoint_every_steps=3, keep_epochs=(2.5,))

    def save(state: State) -> None:
        if state.step == step:
            raise DamagedError("reads back differently")
        saver(tmp_path)(state)

    with pytest.raises(DamagedError, match="reads back differently"):
        run(recipe, watch=Watch(save=save))
    state = newest(tmp_path)
    assert (state.step if state else 0) == {3: 0, 20: 18}[step]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_zero_stage_goes_on_from_a_checkpoint(
    long: Trained, tmp_path: Path, stage: int
) -> None:
    steps = iter(range(1, 100))
    watch = Watch(should_stop=lambda: next(steps) == 20, save=saver(tmp_path))
    first = run(dataclasses.replace(LONG, zero_stage=(stage + 1) % 4), watch=watch)
    rest = run(dataclasses.replace(LONG, zero_stage=stage), state=newest(tmp_path))
    assert_same_curve(first.losses + rest.losses, long.losses)


def test_two_nodes_train_the_same_model_and_go_on_from_one(long: Trained, tmp_path: Path) -> None:
    """Every ZeRO stage is tried, on a real Slurm."""
    need_slurm()
    steps = iter(range(1, 100))
    states = tmp_path / "states"
    first = run(LONG, watch=Watch(should_stop=lambda: next(steps) == 20, save=saver(states)))
    fresh_out, resumed_out = tmp_path / "fresh", tmp_path / "resumed"
    for out in (fresh_out, resumed_out):
        out.mkdir()
    srun = f"srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 {sys.executable} {TOY}"
    stages = "--zero-stages 0 1 2 3"
    subprocess.run(
        [
            DEVCLUSTER, "run", "--nodes", "2", "--", "bash", "-ec",
            f"{srun} {fresh_out} {stages}; {srun} {resumed_out} {stages} --states {states}",
        ],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1"},
        check=True,
    )  # fmt: skip
    for stage in range(4):
        whole, rest = (
            json.loads((out / f"losses-{stage}.json").read_text())
            for out in (fresh_out, resumed_out)
        )
        assert_same_curve(whole, long.losses)
        assert_same_curve(first.losses + rest, long.losses)


def test_checkpoints_of_named_epochs_stay(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, checkpoint_every_steps=3, keep_epochs=(0.5, 2.5))
    kept = Schedule.of(recipe, 256).kept

    def save(state: Any) -> None:
        checkpoints.save(
            tmp_path, step=state.step, tensors=state.tensors, recipe="r", num_kept=2,
            for_good=state.step in kept,
        )  # fmt: skip

    run(recipe, watch=Watch(save=save))
    assert sorted(int(p.stem) for p in tmp_path.glob("*.json")) == [4, 15, 18, 20]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_an_exploding_training_stops_at_once_and_names_its_last_checkpoint(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, checkpoint_every_steps=2, max_gradient_norm=1e9)
    mild = run(
        recipe,
        watch=Watch(should_stop=iter([False, False, False, True]).__next__, save=saver(tmp_path)),
    )
    state = newest(tmp_path)
    assert (mild.step, state is not None) == (4, True)
    assert state is not None
    state.tensors["model.norm.weight"].fill_(float("nan"))
    with pytest.raises(
        DivergedError, match=r"step 5: loss nan.* checkpoint is that of step 4"
    ) as raised:
        run(recipe, state=state)
    assert failures.of_exception(raised.value)[0] == "DIVERGED"
    with pytest.raises(DivergedError, match=r"step 1: .*\(max_gradient_norm=1e-06\)"):
        run(dataclasses.replace(recipe, max_gradient_norm=1e-6))


def test_a_training_that_diverged_leaves_torch_as_it_was() -> None:
    linear = torch.nn.functional.linear  # ZeRO-3 replaces it in the whole process
    with pytest.raises(DivergedError):
        run(dataclasses.replace(RECIPE, zero_stage=3, max_gradient_norm=1e-6))
    assert torch.nn.functional.linear is linear


def test_validation_is_right_and_changes_nothing() -> None:
    recipe = dataclasses.replace(
        RECIPE, stop_after_epochs=0.25, validate_every_steps=1, validation_sequences=50
    )
    told: list[Mapping[str, Any]] = []
    watched = run(recipe, watch=Watch(on_step=told.append, validation=corpus()))
    assert_equal_weights(watched.weights, run(recipe).weights)
    ids, targets = corpus().read(np.arange(50))
    model = fresh().requires_grad_(False)
    model.load_state_dict(dict(watched.weights), strict=False)
    expected = cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    assert told[-1]["validation_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert [facts["step"] for facts in told] == [1, 2]
    assert all(facts["gradient_norm"] > 0 for facts in told)


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a model with a training of its own, so that its distributions are not flat."""
    model = fresh()
    weights = run(dataclasses.replace(RECIPE, learning_rate=2e-2)).weights
    model.load_state_dict(dict(weights), strict=False)
    path = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(path)
    return path


def soft_teacher(path: Path, dtype: str = "float32") -> Teacher:
    return Teacher(model=load_model(path, dtype=dtype, device=CPU), tau=0.7, left_out=(5,))


def test_soft_labels_are_learnt_as_in_a_plain_loop(teacher_path: Path) -> None:
    """The validation loss is that of tokens."""
    told: list[Mapping[str, Any]] = []
    teacher = soft_teacher(teacher_path)
    recipe = dataclasses.replace(RECIPE, validate_every_steps=4, validation_sequences=50)
    watch = Watch(on_step=told.append, validation=corpus())
    trained = run(recipe, teacher=teacher, watch=watch)
    whole = AutoModelForCausalLM.from_pretrained(teacher_path)

    def loss_of(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            logits = whole(ids).logits / 0.7
            logits[..., 5] = -torch.inf
        per_position = -(logits.softmax(-1) * model(ids).logits.log_softmax(-1)).sum(-1)
        mean: Tensor = per_position[targets >= 0].mean()
        return mean

    losses, model = plain_loop(RECIPE, loss_of)
    assert np.allclose(trained.losses, losses, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained.weights[name], parameter, atol=2e-5), name
    ids, targets = corpus().read(np.arange(50))
    with torch.no_grad():
        expected = cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    assert told[-1]["validation_loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    "layout", [{"zero_stage": 3}, {"head_tokens": 100}, {"activation_checkpointing": True}]
)
def test_soft_labels_do_not_depend_on_the_layout(
    layout: dict[str, Any], teacher_path: Path
) -> None:
    plain = run(teacher=soft_teacher(teacher_path))
    other = run(dataclasses.replace(RECIPE, **layout), teacher=soft_teacher(teacher_path))
    assert np.allclose(plain.losses, other.losses, rtol=1e-4)
    for name, weight in plain.weights.items():
        assert torch.allclose(weight, other.weights[name], atol=1e-4), name


def test_a_teacher_in_bfloat16_is_learnt_as_it_is_sampled(teacher_path: Path) -> None:
    """Its logits are not rounded to 16 bits, so the most likely tokens are not tied."""
    ids = torch.from_numpy(np.asarray(corpus().ids)[:8].astype(np.int64))
    teacher = soft_teacher(teacher_path, "bfloat16")
    learnt = teacher.soft(ids).probabilities(0, 500)
    log_p = teacher.model.head(teacher.model.hidden(ids).flatten(0, 1)[:500])
    log_p[:, 5] = -torch.inf
    assert torch.allclose(learnt, (log_p / 0.7).softmax(1), atol=1e-6)
    two = log_p.topk(2).values
    assert (two[:, 0] > two[:, 1]).all()


def test_end_of_sequence_tokens_count_only_where_they_are_learnt() -> None:
    ids = np.array([[7, 3, 5, 0], [7, 3, 0, 9], [7, 3, 5, 6]], np.uint16)
    length = np.array([4, 3, 4], np.int32)
    for count_eos, expected in ((True, [2, 1, 2]), (False, [1, 0, 2])):
        counting = Counting(num_prompt=2, eos=0, count_eos=count_eos)
        data = dataclasses.replace(corpus(), ids=ids, length=length, counting=counting)
        targets = data.read(np.array([0, 1, 2, -1]))[1]
        assert (targets >= 0).sum(1).tolist() == [*expected, 0]
    assert targets[2].tolist() == [-100, 5, 6, -100]


def test_shards_are_mapped_and_read_by_row(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    parts = []
    for index, rows in enumerate((5, 1, 7)):
        zeros = np.zeros(rows)
        part = Samples(
            ids=generator.integers(0, 999, (rows, 6)).astype(np.uint16),
            length=np.full(rows, index + 1, np.int32),
            log_prob_sum=zeros,
            log_prob_tau_sum=zeros,
        )
        write_samples(tmp_path / f"{index}.arrow", part, {})
        parts.append(part)
    mapped = map_token_rows([tmp_path / f"{index}.arrow" for index in range(3)])
    whole = np.concatenate([part.ids for part in parts])
    order = generator.permutation(13)
    assert np.array_equal(mapped[order], whole[order])
    assert mapped.length.tolist() == 5 * [1] + [2] + 7 * [3]
    assert not any(part.flags.owndata or part.flags.writeable for part in mapped.parts)


def shards_of_ids(folder: Path) -> list[Path]:
    zeros = np.zeros(4)
    for index in range(2):
        ids = np.arange(24).reshape(4, 6).astype(np.uint16) + 100 * index
        part = Samples(
            ids=ids, length=np.full(4, 6, np.int32), log_prob_sum=zeros, log_prob_tau_sum=zeros
        )
        write_samples(folder / f"{index}.arrow", part, {})
    return [folder / f"{index}.arrow" for index in range(2)]


MEMORY = Path("/dev/shm")  # noqa: S108


def test_a_corpus_is_copied_to_the_node_and_the_copy_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(MEMORY.exists(), "the copy needs a disk beside that of temporary files")
    monkeypatch.setenv("KDHPC_SCRATCH", str(MEMORY))
    paths = shards_of_ids(tmp_path)
    rows = map_token_rows(paths)
    left, held = (MEMORY / f"kdhpc-{socket.gethostname()}-{name}.ids" for name in ("left", "held"))
    left.touch()  # by a rank that was killed
    with held.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        copy = copy_to_node(rows, paths[0], CPU)
        held.unlink()
    assert not list(MEMORY.glob("kdhpc-*.ids"))
    assert [part.shape for part in copy.parts] == [(8, 6)]
    order = np.array([7, 0, 3, 4])
    assert np.array_equal(copy[order], rows[order])


def test_a_corpus_that_does_not_fit_on_the_node_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need(MEMORY.exists(), "the copy needs a disk beside that of temporary files")
    paths = shards_of_ids(tmp_path)
    rows = map_token_rows(paths)
    monkeypatch.setenv("KDHPC_SCRATCH", str(MEMORY))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert copy_to_node(rows, paths[0], CPU) is rows
    monkeypatch.setenv("KDHPC_SCRATCH", str(tmp_path / "none"))
    assert copy_to_node(rows, paths[0], CPU) is rows
    one, other = capsys.readouterr().out.splitlines()
    assert "at most 0 GB of memory may be used" in one
    assert "No such file" in other
    monkeypatch.setenv("KDHPC_SCRATCH", str(tmp_path))  # the same disk
    assert copy_to_node(rows, paths[0], CPU) is rows
    assert not capsys.readouterr().out


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.syncs: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.syncs += name in {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
        return func(*args, **(kwargs or {}))


def test_accumulation_waits_for_nothing() -> None:
    """A step reads its loss and norm once, however many micro-batches it has."""

    def syncs(micro: int) -> int:
        steps = iter(range(1, 100))
        recipe = dataclasses.replace(RECIPE, micro_batch_sequences=micro)
        watcher = Watcher()
        with watcher:
            run(recipe, watch=Watch(should_stop=lambda: next(steps) == 2))
        return int(watcher.syncs)

    assert syncs(4) == syncs(16)


@pytest.mark.parametrize(
    ("batch", "limit", "nodes", "expected"),
    [(256, 16, 8, (16, 2)), (256, 24, 8, (16, 2)), (64, 64, 2, (32, 1)), (96, 7, 3, (4, 8))],
)
def test_the_global_batch_is_what_was_asked_for(
    batch: int, limit: int, nodes: int, expected: tuple[int, int]
) -> None:
    recipe = Training(batch_sequences=batch, micro_batch_sequences=limit, nodes=nodes)
    assert (recipe.micro_batch, recipe.accumulation) == expected
    assert recipe.micro_batch * recipe.accumulation * recipe.world_size == batch


def test_float16_is_refused_on_cpus() -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        run(dataclasses.replace(RECIPE, dtype="float16"))


def test_missing_ranks_are_named_before_any_model_is_built() -> None:
    code = """
import torch
from kdhpc.training import ranks
cpu = torch.device("cpu")
ranks.join(rank=0, world_size=3, address="127.0.0.1", port=PORT, device=cpu, limit_s=1)
"""
    port = str(20000 + os.getpid() % 10000)
    command = [sys.executable, "-c", code.replace("PORT", port)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "ranks [1, 2] of 3 did not start in 1 s" in finished.stderr


def test_a_process_keeps_its_number_of_ranks() -> None:
    with pytest.raises(ClusterError, match="expected 2 ranks"):
        ranks.join(rank=0, world_size=2, address="", port=0, device=CPU)


@pytest.mark.parametrize("shape", [Shape(layers=3, hidden=48, heads=6, kv_heads=2, ffn=80)])
def test_sizes_are_those_of_the_model(shape: Shape) -> None:
    model = huggingface.new_model(shape, vocab_size=257, length=16, eos=0, seed=0)
    assert sizes.num_parameters(sizes.sizes_of_shape(shape), 257) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoints.save(
            tmp_path, step=step, tensors={"w": torch.full((4,), step)}, recipe="r", num_kept=2
        )
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    [newest] = tmp_path.glob("000000030.*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-3])
    checkpoint = checkpoints.newest(tmp_path, "r")
    assert checkpoint is not None
    assert checkpoint[0] == 20
    assert checkpoints.newest(tmp_path, "another recipe") is None


def test_two_live_trainings_leave_each_other_what_they_are_writing(tmp_path: Path) -> None:
    """An unreachable node may go on while its task is started elsewhere."""

    def save(step: int) -> None:
        checkpoints.save(tmp_path, step=step, tensors={"w": torch.ones(1)}, recipe="r", num_kept=2)

    save(10)
    save(20)
    half = tmp_path / "000000030.1badcafe.safetensors"
    half.write_bytes(b"half")
    save(15)
    assert half.exists()
    for step in range(30, 130, 10):
        save(step)
    assert not half.exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_checkpoints_of_other_settings_are_kept_apart(tmp_path: Path) -> None:
    """Each recipe has its own folder; see `kdhpc/experiment/trainings.py`."""
    for recipe, step in (("old", 50), ("new", 10)):
        weights = {"w": torch.ones(1)}
        checkpoints.save(tmp_path / recipe, step=step, tensors=weights, recipe=recipe, num_kept=2)
    checkpoint = checkpoints.newest(tmp_path / "new", "new")
    assert checkpoint is not None
    assert checkpoint[0] == 10


def test_students_stop_inside_a_longer_schedule() -> None:
    recipe = Training(epochs=5.0, stop_after_epochs=1.0, batch_sequences=256)
    schedule = Schedule.of(recipe, 10_000_000)
    assert (schedule.total, schedule.last) == (195_310, 39_062)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_a_saved_model_gives_the_logits_of_training_in_transformers(
    tmp_path: Path, dtype: Dtype, limit: float
) -> None:
    trainee, hidden = fresh(), []
    trainee.model.norm.register_forward_hook(lambda norm, ins, out: hidden.append(out.detach()))
    rows = dataclasses.replace(corpus(), length=np.full(256, WIDTH, np.int32))
    recipe = dataclasses.replace(
        RECIPE, dtype=dtype, stop_after_epochs=0.25, validate_every_steps=2, validation_sequences=8
    )
    trained = train(
        trainee, corpus(), recipe, seed=0, stream="test", device=CPU, watch=Watch(validation=rows)
    )
    model = fresh().to(DTYPES[dtype])
    model.load_state_dict(dict(trained.weights), strict=False)
    huggingface.byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    huggingface.save_model(model, tmp_path / "tokenizer", tmp_path / "model")
    assert list((tmp_path / "model").glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").requires_grad_(False)
    assert loaded.dtype == DTYPES[dtype]
    logits = loaded(rows.read(np.arange(8))[0]).logits
    # The last four passes are the parts of the validation batch; the first of them has these rows.
    trained_logits = hidden[-4] @ trained.weights["model.embed_tokens.weight"].T
    assert (trained_logits - logits).abs().max() < limit * logits.abs().max()


def test_rotary_frequencies_stay_exact_in_bfloat16() -> None:
    model = fresh()
    recipe = dataclasses.replace(RECIPE, dtype="bfloat16", stop_after_epochs=0.125)
    train(model, corpus(), recipe, seed=0, stream="test", device=CPU)
    assert model.model.norm.weight.dtype == torch.bfloat16
    trained, exact = dict(model.named_buffers()), dict(fresh().named_buffers())
    assert trained.keys() == exact.keys()
    assert all(torch.equal(trained[name], exact[name]) for name in exact)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = fresh().state_dict()
    torch.manual_seed(6)
    second = fresh().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_compiles_nothing(tmp_path: Path) -> None:
    """Training works when the first compiler on PATH fails and no op is built yet."""
    for name in ("c++", "g++", "ninja", "nvcc"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\nexit 1\n")
        program.chmod(0o755)
    code = """
import numpy as np, torch
from kdhpc.models import huggingface
from kdhpc.models.devices import DTYPES
from kdhpc.config.model import Dtype, Shape, Training
from kdhpc.scoring.counting import Counting
from kdhpc.training.ranks import join
from kdhpc.training.data import Corpus
from kdhpc.training.loop import train
torch.set_num_threads(1)
cpu = torch.device("cpu")
join(rank=0, world_size=1, address="", port=0, device=cpu)
shape = Shape(layers=1, hidden=16, heads=2, kv_heads=1, ffn=16)
model = huggingface.new_model(shape, vocab_size=257, length=8, eos=0, seed=0)
counting = Counting(num_prompt=1, eos=0, count_eos=True)
corpus = Corpus(ids=np.ones((8, 8), np.uint16), length=np.full(8, 8, np.int32), counting=counting)
recipe = Training(epochs=2.0, batch_sequences=4, micro_batch_sequences=4)
assert train(model, corpus, recipe, seed=0, stream="s", device=cpu).finished
"""
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops"),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not (tmp_path / "ops").exists()
    assert not (tmp_path / "called").exists()
