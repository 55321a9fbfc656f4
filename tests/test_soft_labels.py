"""Students that learn the teacher's distributions, through a whole run."""

import json
from pathlib import Path

import pytest
import torch
from commands import launch, status
from transformers import AutoModelForCausalLM

from kdhpc import seeding
from kdhpc.cluster import runs
from kdhpc.config.model import Shape
from kdhpc.errors import InputError
from kdhpc.models import huggingface
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.storage.results import read_results
from kdhpc.storage.token_shards import read_samples

SHAPE = Shape(layers=1, hidden=16, heads=2, kv_heads=1, ffn=32)
NUM_ROWS, BATCH = 256, 32


@pytest.fixture(scope="module", params=["learn", "mask"])
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("soft")
    launch(
        "sweep", "tiny", "objective", "cluster=local", f"runs_dir={folder}", f"eos={request.param}",
        "truth.training.epochs=1.0",
    )  # fmt: skip
    assert status(folder / "tiny-objective", code=0)["complete"]
    return folder / "tiny-objective"


def model_of(run: Path, stage: str, name: str) -> Path:
    record = json.loads((run / stage / name / "00000.json").read_text())
    return run / stage / name / str(record["data"])


def test_the_first_loss_is_the_cross_entropy_with_the_teacher(run: Path) -> None:
    """Ends that are not learnt are no targets, so the teacher's distribution is without them."""
    config = json.loads((run / "requests" / "0001.json").read_text())["config"]
    tokenizer = Tokenizer(model_of(run, "1-truth", "truth"))
    records = sorted((run / "4-sample-teacher" / "s0-tau0.6").glob("*.json"))
    folder = run / "4-sample-teacher" / "s0-tau0.6"
    samples = read_samples([folder / json.loads(r.read_text())["data"] for r in records])
    rows = seeding.permutation(0, "student/s0/soft/order", 0, NUM_ROWS)[:BATCH]
    ids = torch.from_numpy(samples.ids[rows].astype("int64"))
    teacher = AutoModelForCausalLM.from_pretrained(model_of(run, "3-train-on-truth", "teacher-s0"))
    seed = seeding.integer_seed(0, "student/s0/soft/init")
    student = huggingface.new_model(
        SHAPE, vocab_size=tokenizer.size, length=24, eos=tokenizer.eos, seed=seed
    )
    with torch.no_grad():
        logits = teacher(ids).logits.double() / 0.6
        if config["eos"] == "mask":
            logits[..., tokenizer.eos] = -torch.inf
        losses = -(logits.softmax(-1) * student(ids).logits.double().log_softmax(-1)).sum(-1)
    length, first = samples.length[rows], len(tokenizer.prompt_ids("The"))
    counted = []
    for row in range(BATCH):
        for place in range(first, length[row]):
            if config["eos"] == "learn" or ids[row, place] != tokenizer.eos:
                counted.append(losses[row, place - 1])
    log = run / "5-train-students" / "student-s0-soft-tau0.6" / "00000.checkpoints" / "train.jsonl"
    first_step = json.loads(log.read_text().splitlines()[0])
    assert first_step["loss"] == pytest.approx(float(torch.stack(counted).mean()), rel=1e-5)


def test_soft_and_hard_students_are_scored_alike(run: Path) -> None:
    scores = read_results(run / "8-merge" / "results.h5").scores
    for size in ("small", "soft"):
        for arm in ("direct", "tau1", "tau0.6"):
            assert (f"student-s0-{size}-{arm}", "truth") in scores
            assert ("truth", f"student-s0-{size}-{arm}") in scores


def test_only_distilled_soft_students_ask_the_teacher() -> None:
    pipeline, config = runs.from_words(["tiny", "objective"])
    plan = pipeline.plan(config)
    asks = {s.arm.name for s in plan.shards.values() if "soft_tau" in s.arm.fields}
    assert asks == {"student-s0-soft-tau1", "student-s0-soft-tau0.6"}
    for shard in plan.stage("train-students"):
        assert ("train-on-truth/teacher-s0/00000" in shard.reads) == (shard.arm.name in asks)
        assert ("teacher" in shard.arm.inputs) == (shard.arm.name in asks)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sampling.truncations=[top_k=5]", "the distribution of a truncated teacher is not learnt"),
        ("teacher.labels=soft", "teacher.labels=soft: expected hard; only students have a teacher"),
        (
            "teacher={labels: soft, model: /there, training: null, shape: null}",
            "teacher.labels=soft: expected hard; only students have a teacher",
        ),
    ],
)
def test_teachers_that_cannot_be_asked_are_named(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs.from_words(["tiny", "objective", word])
