"""Training is DeepSpeed around torch's AdamW, exact against a plain loop, and resumes exactly."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, get_wsd_schedule

from kdhpc import checkpoints, models, seeding
from kdhpc.config import Shape, Training
from kdhpc.ranks import join
from kdhpc.training import Corpus, Schedule, State, Trained, Watch, train

CPU = torch.device("cpu")
SHAPE = Shape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
RECIPE = Training(
    learning_rate=3e-3, epochs=2.5, batch_sequences=32, micro_batch_sequences=16, eps=1e-6
)


@pytest.fixture(autouse=True, scope="module")
def one_process() -> None:
    torch.set_num_threads(1)
    join(rank=0, world_size=1, address="", port=0, device=CPU)


@pytest.fixture
def corpus() -> Corpus:
    generator = np.random.default_rng(0)
    return Corpus(
        ids=generator.integers(0, 257, (256, 24)).astype(np.uint16),
        length=generator.integers(4, 25, 256).astype(np.int32),
        num_prompt=3,
    )


def fresh() -> Any:
    return models.new_model(SHAPE, vocab_size=257, length=24, eos=0, seed=1)


def run(corpus: Corpus, recipe: Training = RECIPE, **options: Any) -> Trained:
    return train(fresh(), corpus, recipe, seed=0, stream="test", device=CPU, **options)


def saver(folder: Path) -> Callable[[State], None]:
    return lambda state: checkpoints.save(
        folder, step=state.step, tensors=state.tensors, recipe="r", num_kept=2
    )


def plain_loop(corpus: Corpus, recipe: Training) -> tuple[list[float], Any]:
    """The same training with torch's AdamW and transformers' schedule, and nothing else."""
    model = fresh()
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
        log_p = model(torch.from_numpy(corpus.ids[rows].astype(np.int64))).logits.log_softmax(-1)
        picked = [
            -log_p[i, position - 1, int(corpus.ids[row, position])]
            for i, row in enumerate(rows)
            for position in range(3, corpus.length[row])
        ]
        loss = torch.stack(picked).mean()
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model


def test_losses_and_weights_equal_a_plain_loop(corpus: Corpus) -> None:
    trained = run(corpus)
    losses, model = plain_loop(corpus, RECIPE)
    assert np.allclose(trained.losses, losses, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained.weights[name], parameter, atol=1e-5), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_train_the_same_model(corpus: Corpus, stage: int) -> None:
    one = run(corpus)
    other = run(corpus, dataclasses.replace(RECIPE, zero_stage=stage))
    assert np.allclose(one.losses, other.losses, rtol=1e-5)


def test_bfloat16_learns_like_float32(corpus: Corpus) -> None:
    whole, half = run(corpus), run(corpus, dataclasses.replace(RECIPE, dtype="bfloat16"))
    assert np.allclose(whole.losses, half.losses, rtol=1e-2)
    assert {w.dtype for w in half.weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("stop_at", [3, 11])
def test_a_stopped_training_goes_on_bit_for_bit(
    corpus: Corpus, tmp_path: Path, stop_at: int
) -> None:
    whole = run(corpus)
    steps = iter(range(1, 100))
    first = run(
        corpus,
        watch=Watch(should_stop=lambda: next(steps) == stop_at, save=saver(tmp_path)),
    )
    assert not first.finished
    found = checkpoints.newest(tmp_path, "r")
    assert found is not None
    rest = run(corpus, state=State(step=found[0], tensors=found[1]))
    assert first.losses + rest.losses == whole.losses
    assert all(torch.equal(rest.weights[name], w) for name, w in whole.weights.items())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, step=step, tensors={"w": torch.full((4,), step)}, recipe="r", num_kept=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    [newest] = tmp_path.glob("000000030.*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-3])
    found = checkpoints.newest(tmp_path, "r")
    assert found is not None
    assert found[0] == 20
    assert checkpoints.newest(tmp_path, "another recipe") is None


def test_checkpoints_of_other_settings_do_not_meet(tmp_path: Path) -> None:
    """Each recipe has a folder of its own; see `stages/train.py`."""
    for recipe, step in (("old", 50), ("new", 10)):
        weights = {"w": torch.ones(1)}
        checkpoints.save(tmp_path / recipe, step=step, tensors=weights, recipe=recipe, num_kept=2)
    found = checkpoints.newest(tmp_path / "new", "new")
    assert found is not None
    assert found[0] == 10


def test_students_stop_inside_a_longer_schedule() -> None:
    recipe = Training(epochs=5.0, stop_after_epochs=1.0, batch_sequences=256)
    schedule = Schedule.of(recipe, 10_000_000)
    assert (schedule.total, schedule.last) == (195_310, 39_062)


def test_a_saved_model_loads_in_transformers_with_the_logits_of_training(
    corpus: Corpus, tmp_path: Path
) -> None:
    trained = run(corpus)
    model = fresh()
    model.load_state_dict(dict(trained.weights), strict=False)
    models.byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    models.save_model(model, tmp_path / "tokenizer", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.from_numpy(corpus.ids[:4].astype(np.int64))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert list((tmp_path / "model").glob("*.safetensors"))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = fresh().state_dict()
    torch.manual_seed(6)
    second = fresh().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_compiles_nothing(tmp_path: Path) -> None:
    """With a compiler that fails first on PATH and an empty cache of built ops, training works."""
    for name in ("c++", "g++", "ninja", "nvcc"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\nexit 1\n")
        program.chmod(0o755)
    code = """
import numpy as np, torch
from kdhpc import models
from kdhpc.config import Shape, Training
from kdhpc.ranks import join
from kdhpc.training import Corpus, train
torch.set_num_threads(1)
cpu = torch.device("cpu")
join(rank=0, world_size=1, address="", port=0, device=cpu)
shape = Shape(layers=1, hidden=16, heads=2, kv_heads=1, ffn=16)
model = models.new_model(shape, vocab_size=257, length=8, eos=0, seed=0)
corpus = Corpus(ids=np.ones((8, 8), np.uint16), length=np.full(8, 8, np.int32), num_prompt=1)
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
