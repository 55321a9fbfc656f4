"""Random numbers depend on seed, stream and sequence, and on nothing else."""

import numpy as np

from kdhpc import seeding


def test_a_row_is_the_same_whatever_is_drawn_with_it() -> None:
    together = seeding.uniforms(7, "truth/train", range(10), 5)
    alone = seeding.uniforms(7, "truth/train", range(4, 5), 5)
    assert np.array_equal(together[4], alone[0])


def test_longer_sequences_begin_like_shorter_ones() -> None:
    short, long = (seeding.uniforms(7, "a", range(2), n) for n in (5, 50))
    assert np.array_equal(short, long[:, :5])


def test_streams_seeds_and_sequences_share_no_number() -> None:
    drawn = [
        seeding.uniforms(seed, stream, range(50), 64)
        for seed in (0, 1)
        for stream in ("truth/train", "truth/eval", "teacher/s0/tau0.8/train")
    ]
    assert len(np.unique(np.stack(drawn))) == np.stack(drawn).size


def test_uniforms_have_53_bits_and_stay_below_one() -> None:
    drawn = seeding.uniforms(0, "bits", range(2000), 50)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    as_integers = (drawn * 2.0**53).astype(np.uint64)
    assert np.array_equal(as_integers.astype(np.float64) * 2.0**-53, drawn)
    assert 0.45 < (as_integers & 1).mean() < 0.55


def test_a_permutation_holds_every_row_once_and_differs_by_epoch() -> None:
    first, second = (seeding.permutation(0, "order", epoch, 1000) for epoch in (0, 1))
    assert sorted(first) == list(range(1000))
    assert not np.array_equal(first, second)


def test_the_stream_is_fixed_for_ever() -> None:
    drawn = seeding.uniforms(0, "truth/train", range(3, 4), 2)[0]
    assert drawn.tolist() == [0.7571630539942468, 0.1939822835435392]
