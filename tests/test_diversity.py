"""Diversity numbers agree with loops over tokens, and with texts whose answer is known."""

from collections import Counter

import numpy as np
import pytest

from kdhpc.science import diversity


@pytest.mark.parametrize("n", [1, 2, 4])
def test_ngrams_are_those_of_a_loop(n: int) -> None:
    noise = np.random.default_rng(0)
    ids = noise.integers(0, 3, (50, 12)).astype(np.uint16)
    length = noise.integers(2, 13, 50)
    rows = [row[:stop].tolist() for row, stop in zip(ids, length, strict=True)]
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    everything = Counter(gram for row in grams for gram in row)
    total = sum(everything.values())
    assert diversity.has_repeat(ids, length, n).tolist() == [len(r) > len({*r}) for r in grams]
    assert diversity.distinct_share(ids, length, n) == len(everything) / total
    once = sum(count == 1 for count in everything.values())
    assert diversity.missing_mass(ids, length, n) == once / total


def test_missing_mass_estimates_what_has_not_been_seen() -> None:
    """For many symbols of equal probability the truth is known: (1 - 1/m)^n."""
    ids = np.random.default_rng(0).integers(0, 5000, (200, 20))
    length = np.full(200, 20)
    unseen = (1 - 1 / 5000) ** ids.size
    assert diversity.missing_mass(ids, length, 1) == pytest.approx(unseen, abs=0.02)


def test_repetition_compresses_and_resembles_itself() -> None:
    words = [f"w{i}" for i in np.random.default_rng(0).integers(0, 1000, 4000)]
    varied = [" ".join(words[i : i + 20]) for i in range(0, 4000, 20)]
    alike = [" ".join(words[:20])] * 200
    assert diversity.compression_ratio(alike) > 5 * diversity.compression_ratio(varied)
    assert diversity.self_bleu(alike[:20]) == pytest.approx(100.0)
    assert diversity.self_bleu(varied[:20]) < 10.0
