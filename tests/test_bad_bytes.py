"""Flipped, cut and random bytes in every kind of file that is read.

Each damaged file is refused with its name or, where no digest can detect the damage, read as what
was written. Nothing else is raised, and the file is left as it was.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, launch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdhpc.cluster import runs
from kdhpc.cluster.ledger import Ledger
from kdhpc.cluster.runs import Run
from kdhpc.config import presets
from kdhpc.errors import DamagedError, InputError
from kdhpc.experiment.stages import merge
from kdhpc.pipeline import LANGUAGE
from kdhpc.storage.results import logical_digest
from kdhpc.storage.run_folder import read_record
from kdhpc.storage.score_shards import read_scores
from kdhpc.storage.token_shards import read_samples
from kdhpc.storage.work import Work
from kdhpc.training import checkpoints

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """Draw a way to damage bytes: flip a bit, cut the end off, overwrite some, append more."""
    kind = draw(st.sampled_from(["flip", "cut", "overwrite", "append", "empty"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    bit, noise = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=16))

    def spoil(data: bytes) -> bytes:
        at = int(where * len(data))
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        if kind == "overwrite":
            return data[:at] + noise + data[at + len(noise) :]
        return {"cut": data[:at], "append": data + noise, "empty": b""}[kind]

    return spoil


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished tiny run that may be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


def assert_refused(path: Path, spoil: Damage, read: Callable[[], object]) -> None:
    """Check that reading raises our own error with the file's name and leaves the file as it is."""
    good = path.read_bytes()
    bad = spoil(good)
    if bad == good:
        return
    path.write_bytes(bad)
    try:
        with pytest.raises((DamagedError, InputError)) as caught:
            read()
        assert path.name in str(caught.value)
        assert path.read_bytes() == bad
    finally:
        path.write_bytes(good)


def attempt(read: Callable[[], object]) -> tuple[object, str]:
    """Return what was read and, if it was refused, the message."""
    try:
        return read(), ""
    except (DamagedError, InputError) as error:
        return None, str(error)


def assert_refused_or_equal(path: Path, spoil: Damage, read: Callable[[], object]) -> None:
    """Check the same for files where damage outside the values has no effect."""
    good, before = path.read_bytes(), read()
    bad = spoil(good)
    path.write_bytes(bad)
    try:
        value, said = attempt(read)
        assert path.name in said if said else value == before
        assert path.read_bytes() == bad
    finally:
        path.write_bytes(good)


LEDGER: dict[str, tuple[str, Callable[[Ledger], object]]] = {
    "request": ("requests/0001.json", Ledger.requests),
    "submission": ("submissions/0002.json", Ledger.submissions),
    "job": ("submissions/0002.job.json", Ledger.jobs),
    "failure": ("failures/0001/a.json", Ledger.failures),
}


@pytest.mark.parametrize("kind", LEDGER)
@FEW
@given(spoil=damages())
def test_a_damaged_ledger_is_named(kind: str, run: Path, spoil: Damage) -> None:
    name, read = LEDGER[kind]
    ledger = Ledger(run)
    if kind == "failure" and not (run / name).exists():
        add_failure(run / name)
    assert_refused_or_equal(run / name, spoil, lambda: read(ledger))


def add_failure(path: Path) -> None:
    from kdhpc.storage.files import write_once

    write_once(
        path,
        {"key": "score/x/0", "kind": "LOST", "message": "killed", "submission": 1, "time": 1.5},
    )


@FEW
@given(spoil=damages())
def test_a_damaged_manifest_is_named(run: Path, spoil: Damage) -> None:
    assert_refused_or_equal(
        run / "run.json", spoil, lambda: (runs.open_run(run).identity, runs.open_run(run).pipeline)
    )


@FEW
@given(spoil=damages())
def test_a_damaged_record_is_named(run: Path, spoil: Damage) -> None:
    path = run / "2-sample-truth/train/00000.json"
    assert_refused_or_equal(path, spoil, lambda: read_record(path, "sample-truth/train/00000"))
    scan = Run(run, LANGUAGE).scan()
    assert scan.damaged == {}


DATA = {
    "token shard": "2-sample-truth/train/00000",
    "score shard": "7-score/truth-under-truth/00000",
    "merged file": "8-merge/results/*",
}


def work_of(run: Path) -> Work[Any]:
    """Return what a task of a run sees."""
    folder = Run(run, LANGUAGE)
    _, config, plan = runs.current(folder)
    return Work(folder, config, plan)


def data_of(run: Path, kind: str) -> tuple[Path, str]:
    """Return the data file of a shard of a kind, and the key of the shard."""
    wanted = {
        "token shard": "2-sample-truth/train",
        "score shard": "7-score/truth-under-teacher-s0",
    }
    folder = run / wanted.get(kind, "8-merge/results")
    record = sorted(folder.glob("*.json"))[0]
    data = folder / json.loads(record.read_text())["data"]
    return data, f"{folder.parent.name.partition('-')[2]}/{folder.name}/{record.stem}"


@pytest.mark.parametrize("kind", DATA)
@FEW
@given(spoil=damages())
def test_damaged_data_is_named_before_it_is_used(kind: str, run: Path, spoil: Damage) -> None:
    data, key = data_of(run, kind)
    record = data.parent / f"{key.rpartition('/')[2]}.json"
    published = record.read_bytes()

    def read() -> Path:
        return work_of(run).input(key)

    assert read() == data
    assert_refused(data, spoil, read)
    for aside in record.parent.glob("*.damaged-*"):
        aside.unlink()
    record.write_bytes(published)


@FEW
@given(spoil=damages())
def test_the_merge_names_a_damaged_score_shard_and_publishes_nothing(
    run: Path, spoil: Damage
) -> None:
    """The merge copies while it checks; whatever the damage, the record is put aside."""
    work = work_of(run)
    [shard] = work.plan.stage("merge")
    data, key = data_of(run, "score shard")
    record, good = data.parent / f"{key.rpartition('/')[2]}.json", data.read_bytes()
    published, bad = record.read_bytes(), spoil(good)
    if bad == good:
        return
    data.write_bytes(bad)
    try:
        with pytest.raises(DamagedError) as caught:
            merge.run(shard, work)
        assert data.name in str(caught.value)
        assert not record.exists()
        [aside] = record.parent.glob("*.damaged-*")
        assert aside.read_bytes() == published
    finally:
        work.discard()
        for aside in record.parent.glob("*.damaged-*"):
            aside.unlink()
        record.write_bytes(published)
        data.write_bytes(good)


@FEW
@given(spoil=damages())
def test_readers_of_a_damaged_token_shard_say_so(run: Path, spoil: Damage) -> None:
    """Without its record a damaged shard may be read as other ids, but no other error is raised."""
    data, _ = data_of(run, "token shard")
    good = data.read_bytes()
    data.write_bytes(spoil(good))
    try:
        _, said = attempt(lambda: read_samples([data]))
        assert not said or data.name in said
    finally:
        data.write_bytes(good)


READERS: dict[str, Callable[[Path], object]] = {
    "score shard": lambda path: read_scores(path).log_prob_sum.tobytes(),
    "merged file": logical_digest,
}


@pytest.mark.parametrize("kind", READERS)
@FEW
@given(spoil=damages())
def test_readers_of_damaged_hdf5_say_so(kind: str, run: Path, spoil: Damage) -> None:
    """The files are read as the analysis reads them, without the record."""
    data, _ = data_of(run, kind)
    assert_refused_or_equal(data, spoil, lambda: READERS[kind](data))


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@FEW
@given(spoil=damages())
def test_a_damaged_checkpoint_is_passed_over(suffix: str, tmp_path: Path, spoil: Damage) -> None:
    import torch

    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2):
        checkpoints.save(
            folder, step=step, tensors={"w": torch.full((4,), step)}, recipe="r", num_kept=2
        )
    [path] = folder.glob(f"000000002*.{suffix}")
    good = path.read_bytes()
    bad = spoil(good)
    if bad == good:
        return
    path.write_bytes(bad)
    checkpoint = checkpoints.newest(folder, "r")
    assert checkpoint is not None
    assert checkpoint[0] == 1
    assert checkpoint[1]["w"].tolist() == [1, 1, 1, 1]
    kept = [other.read_bytes() for other in folder.iterdir() if other.name.startswith("000000002")]
    assert bad in kept


@FEW
@given(spoil=damages())
def test_a_damaged_preset_is_refused_or_is_another_preset(tmp_path: Path, spoil: Damage) -> None:
    path = tmp_path / "spoilt.yaml"
    path.write_bytes(spoil((ROOT / "configs" / "tiny.yaml").read_bytes()))
    # Presets are looked up in the project's own folder, which a test must not change.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "CONFIGS_DIR", tmp_path)
        _, said = attempt(lambda: runs.from_words(["spoilt", "executor=local", "cluster=auto"]))
        assert "\n" not in said


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "requests/0001.json",
        "submissions/0002.json",
        "submissions/0002.job.json",
        "2-sample-truth/train/00000.json",
    ],
)
def test_commands_name_a_damaged_file_in_one_line(run: Path, name: str) -> None:
    path = run / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 2
    path.write_bytes(raw)
    before = path.read_bytes()
    finished = launch("status", str(run), code=None)
    assert finished.returncode in {1, 2}
    assert Path(name).name in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    assert path.read_bytes() == before


def test_analysis_names_damaged_results(run: Path) -> None:
    """The name that users open is a link to the published file."""
    path = run / "8-merge" / "results.h5"
    raw = bytearray(path.read_bytes())
    for spot in range(len(raw) // 4, len(raw), 97):
        raw[spot] ^= 4
    path.write_bytes(raw)
    finished = subprocess.run(
        [sys.executable, str(ROOT / "analysis/precision_recall.py"), str(run)],
        capture_output=True,
        text=True,
    )
    assert finished.returncode in {1, 2}
    assert "results.h5" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_seal_covers_lists_and_tuples_alike(tmp_path: Path) -> None:
    from kdhpc.storage.files import read_once, write_once

    value = {"a": (1, 2), "b": {"c": 0.1}, "d": np.float64(0.5).item(), "time": time.time()}
    write_once(tmp_path / "x.json", value)
    assert read_once(tmp_path / "x.json") == {**value, "a": [1, 2]}
