"""Files say what was written, open without this project, and are refused when damaged."""

from pathlib import Path

import datasets
import numpy as np
import pytest

from kdhpc import store
from kdhpc.errors import DamagedError


def samples(num_rows: int = 7, width: int = 5) -> store.Samples:
    generator = np.random.default_rng(0)
    return store.Samples(
        ids=generator.integers(0, 65536, (num_rows, width)).astype(np.uint16),
        length=generator.integers(1, width + 1, num_rows).astype(np.int32),
        log_prob_sum=generator.normal(size=num_rows),
        log_prob_tau_sum=generator.normal(size=num_rows),
    )


def scores(num_rows: int = 7, per_token: bool = True) -> store.Scores:
    generator = np.random.default_rng(1)
    return store.Scores(
        log_prob_sum=generator.normal(size=num_rows),
        num_tokens=generator.integers(1, 9, num_rows).astype(np.int32),
        token_log_prob=generator.normal(size=(num_rows, 5)).astype(np.float32)
        if per_token
        else None,
    )


def test_token_shards_open_in_datasets_alone(tmp_path: Path) -> None:
    written = samples()
    store.write_samples(tmp_path / "00000.arrow", written, {"k": "v"})
    found = datasets.load_dataset(
        "arrow", data_files=f"{tmp_path}/*.arrow", split="train", cache_dir=f"{tmp_path}/cache"
    )
    assert np.array_equal(np.array(found["ids"]), written.ids)
    assert np.array_equal(found["length"], written.length)


def test_a_token_shard_is_mapped_not_copied(tmp_path: Path) -> None:
    store.write_samples(tmp_path / "a.arrow", samples(), {})
    ids = store.read_samples([tmp_path / "a.arrow"]).ids
    assert not ids.flags.owndata
    assert not ids.flags.writeable


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    for path, rows in zip(paths, (3, 4), strict=True):
        store.write_samples(path, samples(rows), {})
    assert np.array_equal(store.read_samples(paths).ids[3:], samples(4).ids)


@pytest.mark.parametrize("name", ["a.arrow", "a.h5"])
@pytest.mark.parametrize("keep", [0, 10, 100])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str, keep: int) -> None:
    path = tmp_path / name
    if name.endswith("arrow"):
        store.write_samples(path, samples(), {})
    else:
        store.write_scores(path, scores())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=name):
        store.read_samples([path]) if name.endswith("arrow") else store.read_scores(path)


def results(
    path: Path, *, provenance: str = "here", last: float = 1.0, complete: bool = True
) -> str:
    return store.write_results(
        path,
        iter([("truth", "student", scores()), ("student", "truth", scores(per_token=False))]),
        {"student": {"kind": "student", "tau": last, "steps": 3}},
        recipe="r",
        complete=complete,
        provenance={"hosts": provenance},
    )


def test_merged_results_read_back(tmp_path: Path) -> None:
    digest = results(tmp_path / "results.h5")
    found = store.read_results(tmp_path / "results.h5")
    assert np.array_equal(found.scores["truth", "student"].log_prob_sum, scores().log_prob_sum)
    assert found.models["student"] == {"kind": "student", "tau": 1.0, "steps": 3}
    assert (found.recipe, found.complete, found.provenance["hosts"]) == ("r", True, "here")
    assert store.logical_digest(tmp_path / "results.h5") == digest


def test_the_logical_digest_ignores_provenance_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    first = results(path)
    assert results(path, provenance="elsewhere") == first
    assert results(path, last=0.9) != first
    assert results(path, complete=False) != first


def test_a_flipped_bit_in_merged_scores_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    results(path)
    raw = bytearray(path.read_bytes())
    where = raw.find(scores().log_prob_sum.tobytes())
    raw[where + 3] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(DamagedError, match=r"results\.h5"):
        store.read_results(path)


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert [t.strip() for t in store.read_corpus(str(tmp_path / "a.txt"), "text")] == [
        "one\ntwo",
        "three",
    ]
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    assert store.read_corpus(str(tmp_path / "a.jsonl"), "body") == ["x", "y"]
