"""Two files of results are compared bit by bit, and what differs is said in numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import launch

from kdhpc.storage import comparison
from kdhpc.storage.results import ScorePieces, read_results, write_results

SUMS = np.array([-3.0, -1.0, -2.0])
TABLE = np.array([1.0, math.nan, -math.inf])


def scored(
    path: Path,
    sums: Any = SUMS,
    tokens: Any = (4, 4, 4),
    table: Any = TABLE,
    parameters: int = 7,
    pair: str = "direct",
    config: str = "name: one\nseed: 0\n",
) -> Path:
    pieces = [("log_prob_sum", np.array(sums)), ("num_tokens", np.array(tokens, np.int32))]
    write_results(
        path,
        recipe="r",
        provenance={"config": config, "python": "3.11", "hosts": '["a"]', "versions": "{}"},
        scores=[ScorePieces(sampler=pair, scorer="truth", num_rows=len(sums), pieces=pieces)],
        tables=[("beta1", {"recall": np.array(table), "word": np.array([b"a", b"b", b"c"])})],
        models={"direct": {"kind": "student", "parameters": parameters}},
    )
    return path


def test_equal_results_are_equal_in_every_bit_and_the_exit_code_says_so(tmp_path: Path) -> None:
    one = scored(tmp_path / "one.h5")
    other = scored(tmp_path / "other.h5", config="name: two\nseed: 0\n")
    first, second = read_results(one), read_results(other)
    for pair in comparison.pairs(first, second):
        assert pair.is_equal
        assert pair.largest in {0.0, None}
    said = launch("runs", "compare", str(one), str(other)).stdout
    assert "config:\n  name: one -> two\n" in said
    assert said.endswith("the results are equal\n")


def test_what_differs_is_measured(tmp_path: Path) -> None:
    one = scored(tmp_path / "one.h5")
    other = scored(
        tmp_path / "other.h5", sums=[-3.0, -1.5, -1.0], parameters=8, table=[1.0, 2.0, -math.inf]
    )
    first, second = read_results(one), read_results(other)
    pairs = {pair.name: pair for pair in comparison.pairs(first, second)}
    scores = pairs["direct under truth"]
    assert not scores.is_equal
    assert scores.rows == (3, 3)
    assert [*scores.means] == pytest.approx([-2.0, -5.5 / 3])
    assert scores.difference == pytest.approx(1 / 6)
    assert scores.largest == 1.0
    table = pairs["beta1 recall"]
    assert not table.is_equal
    assert table.largest is not None
    assert math.isnan(table.largest)
    assert pairs["beta1 word"].is_equal
    assert pairs["beta1 word"].means == (None, None)
    assert comparison.models(first, second) == ["direct.parameters: 7 -> 8"]
    said = launch("runs", "compare", str(one), str(other), code=1).stdout
    assert said.endswith("the results differ\n")


def test_tokens_that_were_counted_otherwise_make_scores_unequal(tmp_path: Path) -> None:
    one, other = scored(tmp_path / "a.h5"), scored(tmp_path / "b.h5", tokens=[4, 4, 5])
    [scores, *_] = comparison.pairs(read_results(one), read_results(other))
    assert scores.largest == 0.0
    assert not scores.is_equal


def test_other_rows_and_scores_of_one_side_have_no_difference(tmp_path: Path) -> None:
    one = scored(tmp_path / "a.h5")
    more = scored(tmp_path / "b.h5", sums=[-1.0] * 5, tokens=[1] * 5)
    [scores, *_] = comparison.pairs(read_results(one), read_results(more))
    assert (scores.rows, scores.largest) == ((3, 5), None)
    other = scored(tmp_path / "c.h5", pair="tau1")
    pairs = {pair.name: pair for pair in comparison.pairs(read_results(one), read_results(other))}
    assert pairs["direct under truth"].rows == (3, None)
    assert pairs["tau1 under truth"].rows == (None, 3)
    assert pairs["tau1 under truth"].difference is None
    said = launch("runs", "compare", str(one), str(other), code=1).stdout
    assert "only in the first" in said
    assert "only in the second" in said


def test_large_arrays_are_compared_to_the_last_row() -> None:
    array = np.zeros((2 * comparison.PIECE_ROWS + 1, 2), np.float32)
    assert comparison.same_bits(array, array.copy())
    other = array.copy()
    other[-1, -1] = -0.0  # another bit, though an equal number
    assert not comparison.same_bits(array, other)
    assert not comparison.same_bits(array, array.astype(np.float64))
