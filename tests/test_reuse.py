"""A run takes what another one has published, by reference, and makes the rest."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import launch, status

from kdhpc.storage.results import read_results

TRAINING = "{learning_rate: 3.0e-3, epochs: 1.0, batch_sequences: 32, micro_batch_sequences: 32}"
SIZE = (
    "students.wide={shape: {layers: 1, hidden: 32, heads: 2, kv_heads: 1, ffn: 32}, "
    f"training: {TRAINING}}}"
)


@pytest.fixture
def source(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a finished run that a test may damage."""
    return shutil.copytree(tiny_run, tmp_path / "tiny")


def words_of(source: Path, *more: str) -> list[str]:
    return ["tiny", "cluster=local", "name=more", f"runs_dir={source.parent}", *more]


def test_one_more_size_trains_that_size_only(source: Path) -> None:
    before = {p: p.read_bytes() for p in source.rglob("*.json") if "notes" not in p.parts}
    launch("sweep", *words_of(source, f"reuse={source}", SIZE))
    run = source.parent / "more"
    report = status(run, code=0)
    assert report["complete"]
    records = {p: json.loads(p.read_text()) for p in run.glob("[1-7]-*/*/*.json")}
    made = {p.parent.name for p, record in records.items() if "reused_from" not in record}
    assert made
    assert all("wide" in name for name in made)
    taken = [(p, record) for p, record in records.items() if "reused_from" in record]
    assert {record["reused_from"] for _, record in taken} == {str(source)}
    assert f"{len(taken)} shards were taken from {source} (reuse)" in report["notes"]
    for path, record in taken:
        here, there = (folder / record["data"] for folder in (path.parent, _twin(path, source)))
        files = [here] if here.is_file() else [p for p in here.rglob("*") if p.is_file()]
        assert files
        for file in files:
            assert file.samefile(there if here.is_file() else there / file.relative_to(here))
    old, new = (read_results(folder / "8-merge" / "results.h5") for folder in (source, run))
    assert new.complete
    for pair, scores in old.scores.items():
        assert np.array_equal(scores.log_prob_sum, new.scores[pair].log_prob_sum)
    assert {path: path.read_bytes() for path in before} == before
    assert launch("verify", str(run)).stdout.endswith("0 damaged\n")
    # The data belongs to both: without the other run, this one is whole, and cleaning leaves it.
    shutil.rmtree(source)
    assert launch("verify", str(run)).stdout.endswith("0 damaged\n")
    listed = launch("clean", str(run)).stdout.splitlines()
    assert not [line for line in listed if line[0].isdigit() and "entries" not in line]


def test_a_dry_run_plans_what_is_left(source: Path) -> None:
    shown = launch("sweep", *words_of(source, f"reuse={source}", SIZE, "--dry-run")).stdout
    plan = {
        line.split()[0]: line.split()[1:3] for line in shown.splitlines() if line[1:2].isdigit()
    }
    assert plan["2-sample-truth"] == ["0", "0"]
    assert plan["3-train-on-truth"] == ["1", "1"]
    assert plan["5-train-students"][0] == "2"
    [said] = [line for line in shown.splitlines() if "are taken from" in line]
    whole = launch("sweep", *words_of(source, SIZE, "--dry-run")).stdout
    total, left = (int(text.split()[1]) for text in (whole, shown))
    assert int(said.split()[4]) == total - left > 0
    assert not (source.parent / "more").exists()


def _twin(path: Path, source: Path) -> Path:
    """Return the folder of another run that belongs to that of a record."""
    return source / path.parent.relative_to(path.parents[2])


def test_a_shard_that_is_gone_is_named_before_anything_is_written(source: Path) -> None:
    [record] = (source / "3-train-on-truth" / "teacher-s0").glob("*.json")
    weights = record.parent / json.loads(record.read_text())["data"] / "model.safetensors"
    weights.unlink()
    refused = launch("sweep", *words_of(source, f"reuse={source}", SIZE), code=2)
    assert str(weights.parent) in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (source.parent / "more").exists()
    # What this plan does not share may be missing.
    launch("sweep", *words_of(source, f"reuse={source}", "first_seed=1", "--dry-run"))


def test_what_is_no_run_to_take_from_is_refused(source: Path, tmp_path: Path) -> None:
    for words, message in (
        ([f"reuse={tmp_path}/none"], "no such folder"),
        (["reuse=none"], "reuse=none: no run of this name"),
        (["reuse=tiny", "name=tiny"], "is this run itself"),
        ([f"reuse={source}", "seed=5"], "nothing with the settings of this run"),
    ):
        refused = launch("sweep", *words_of(source, *words), code=2)
        assert message in refused.stderr
    memory = Path("/dev/shm")  # noqa: S108  # another file system
    if memory.is_dir() and os.stat(memory).st_dev != os.stat(source).st_dev:
        words = words_of(source, f"reuse={source}")
        words[3] = f"runs_dir={memory}/kdhpc-test-{os.getpid()}"
        refused = launch("sweep", *words, code=2)
        assert "on another file system" in refused.stderr
        assert not Path(words[3].partition("=")[2]).exists()
