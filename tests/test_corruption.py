"""One token of each sequence is damaged, the same in every shard."""

import numpy as np
import pytest

from kdhpc.scoring.corruption import corrupt
from kdhpc.scoring.counting import Counting
from kdhpc.storage.token_shards import Samples
from kdhpc.types import Corruption

COUNTING = Counting(num_prompt=2, eos=0, count_eos=True)


def some_samples() -> Samples:
    ids = np.random.default_rng(0).integers(1, 50, (60, 12)).astype(np.uint16)
    length = np.full(60, 12, np.int32)
    for row in range(30):  # half of them end, some at once
        length[row] = 3 + row % 9
        ids[row, length[row] - 1 :] = 0
    zeros = np.zeros(60)
    return Samples(ids=ids, length=length, log_prob_sum=zeros, log_prob_tau_sum=zeros)


@pytest.mark.parametrize("kind", ["swap", "drop", "repeat"])
def test_one_token_between_prompt_and_end_is_changed(kind: Corruption) -> None:
    samples = some_samples()
    changed = corrupt(samples, kind, seed=0, rows=range(60), counting=COUNTING)
    kept = corrupt(samples[20:], kind, seed=0, rows=range(20, 60), counting=COUNTING)
    assert np.array_equal(changed.ids[20:], kept.ids)
    places = set()
    for row in range(60):
        old = samples.ids[row, : samples.length[row]].tolist()
        new = changed.ids[row, : changed.length[row]].tolist()
        end = [0] if old[-1] == 0 else []
        old_text, new_text = old[2 : len(old) - len(end)], new[2 : len(new) - len(end)]
        assert new[:2] == old[:2]
        assert new[len(new) - len(end) :] == end
        if len(old_text) < 2:
            assert new == old
        elif kind == "swap":
            assert sorted(new_text) == sorted(old_text)
            assert sum(a != b for a, b in zip(old_text, new_text, strict=True)) in {0, 2}
        elif kind == "drop":
            assert new_text in [old_text[:i] + old_text[i + 1 :] for i in range(len(old_text))]
        else:
            full = [old_text[: i + 1] + old_text[i:] for i in range(len(old_text))]
            assert new_text in [text[: len(new_text)] for text in full]
        if len(old) == 12:
            places |= {i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b}
    assert len(places) >= 9
