"""Verdicts say what the numbers carry and no more."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT
from test_more_scores import PROMPT, model_of, oracle

from kdhpc.storage.results import ScorePieces, read_results, write_results
from kdhpc.storage.token_shards import read_samples

NUM_ROWS, TOKENS = 400, 10


@pytest.fixture(scope="module")
def study_module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield importlib.import_module("study")


@pytest.fixture(scope="module")
def verdicts_module(study_module: ModuleType) -> ModuleType:
    return importlib.import_module("verdicts")


def results_of(
    path: Path,
    precision: Mapping[str, float],
    recall: Mapping[str, float],
    *,
    seeds: int = 4,
    entropy: Mapping[str, float] | None = None,
    seed_error: float = 0.02,
    decode: Mapping[str, Mapping[float, tuple[float, float]]] | None = None,
) -> Path:
    """Write results whose means are given, with errors of seeds and of sequences.

    Args:
        path: the file.
        precision: by label, nats per token.
        recall: by label, nats per token.
        seeds: number of seeds.
        entropy: by label, nats per token; 1 each if not given.
        seed_error: standard deviation over seeds.
        decode: by label and temperature, precision and recall.
    """
    noise = np.random.default_rng(0)
    scores: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    truth_rows = noise.normal(0.0, 0.3, NUM_ROWS)
    scores["truth", "self"] = -2.0 + truth_rows

    def rows(mean: float, shared: np.ndarray[Any, Any] | float = 0.0) -> np.ndarray[Any, Any]:
        return mean + shared + noise.normal(0.0, 0.1, NUM_ROWS)

    for seed in range(seeds):
        for label in precision:
            name = f"student-s{seed}-small-{label if label == 'direct' else f'tau{label}'}"
            arm, tau = (label, 1.0) if label == "direct" else (f"tau{label}", float(label))
            models[name] = {
                "kind": "student", "seed": seed, "size": "small", "arm": arm, "tau": tau,
            }  # fmt: skip
            off = noise.normal(0.0, seed_error, 2)
            points = {1.0: (precision[label], recall[label]), **(decode or {}).get(label, {})}
            for temperature, (p, r) in points.items():
                sampler = name if temperature == 1.0 else f"{name}-T{temperature:g}"
                scores[sampler, "truth"] = rows(p + off[0])
                scores[sampler, "self"] = rows(-(entropy or {}).get(label, 1.0))
                scores["truth", sampler] = rows(r + off[1], truth_rows)
    counts = np.full(NUM_ROWS, TOKENS, np.int32)
    pieces = [
        ScorePieces(
            sampler=sampler,
            scorer=scorer,
            num_rows=NUM_ROWS,
            pieces=[("log_prob_sum", TOKENS * values), ("num_tokens", counts)],
        )
        for (sampler, scorer), values in scores.items()
    ]
    write_results(path, recipe="r", provenance={}, scores=pieces, models=models)
    return path


def found_in(path: Path, study_module: ModuleType, verdicts_module: ModuleType) -> dict[str, Any]:
    study = study_module.Study(read_results(path))
    return {verdict.name: verdict for verdict in verdicts_module.verdicts(study)}


Change = Callable[[tuple[str, str], dict[str, Any]], Any]


def changed(old: Path, new: Path, change: Change, config: str = "") -> Path:
    """Copy results, each array of which may be changed in place or replaced; return the copy."""
    results = read_results(old)
    pieces = []
    for pair, scores in results.scores.items():
        arrays = {name: np.array(array) for name, array in scores.arrays().items()}
        change(pair, arrays)
        pieces.append(
            ScorePieces(
                sampler=pair[0], scorer=pair[1], num_rows=len(arrays["num_tokens"]),
                pieces=[*arrays.items()],
            )
        )  # fmt: skip
    provenance = {"config": config}
    write_results(new, recipe="r", provenance=provenance, scores=pieces, models=results.models)
    return new


PRECISION = {"direct": -3.0, "1": -3.0, "0.8": -2.5, "0.6": -2.0}


def test_each_step_is_decided_for_itself_and_all_of_them_together(
    tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    recall = {"direct": -2.5, "1": -2.5, "0.8": -2.502, "0.6": -2.9}
    path = results_of(tmp_path / "r.h5", PRECISION, recall)
    found = found_in(path, study_module, verdicts_module)
    assert found["precision-rises"].decision == "holds"
    assert found["recall-falls"].decision == "undecided"
    assert "recall falls from tau 0.8 to 0.6: -0.3" in found["recall-falls"].sentence
    assert "Recall is undecided from tau 1 to 0.8" in found["recall-falls"].sentence
    assert found["trade-off-0.6"].decision == "holds"
    rising = results_of(tmp_path / "s.h5", PRECISION, {**recall, "0.6": -2.2})
    assert found_in(rising, study_module, verdicts_module)["recall-falls"].decision == "fails"


def test_one_training_decides_nothing(
    tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    recall = {"direct": -2.5, "1": -2.5, "0.8": -2.7, "0.6": -2.9}
    path = results_of(tmp_path / "r.h5", PRECISION, recall, seeds=1)
    found = found_in(path, study_module, verdicts_module)
    assert len(found) >= 5
    assert "would have been decided" not in found["cost-of-a-teacher"].sentence
    assert {verdict.decision for verdict in found.values()} == {"undecided"}


def test_a_gain_is_split_into_entropy_and_divergence(
    tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    entropy = {"direct": 2.0, "1": 2.0, "0.8": 1.52, "0.6": 1.5}
    path = results_of(tmp_path / "r.h5", PRECISION, PRECISION, entropy=entropy)
    found = found_in(path, study_module, verdicts_module)
    sharp, sharper = found["gain-is-entropy-0.8"], found["gain-is-entropy-0.6"]
    for verdict in (sharp, sharper):
        parts = {name: mean.estimate for name, mean in verdict.means.items()}
        assert parts["precision"] == pytest.approx(parts["entropy"] + parts["divergence"])
    assert (sharp.decision, sharper.decision) == ("holds", "fails")
    assert sharper.means["divergence"].estimate == pytest.approx(0.5, abs=0.05)


def test_recall_at_equal_precision_is_interpolated_and_never_extrapolated(
    tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    recall = {"direct": -2.5, "1": -2.5, "0.8": -2.8, "0.6": -3.0}
    decode = {"direct": {0.8: (-2.6, -2.6), 0.6: (-2.1, -2.9)}}
    path = results_of(tmp_path / "r.h5", PRECISION, recall, decode=decode)
    found = found_in(path, study_module, verdicts_module)
    kept = found["beats-temperature-0.8-direct"].means["recall kept"]
    # Precision -2.5 is a fifth of the way from -2.6 to -2.1, so recall is -2.66 against -2.8.
    assert kept.estimate == pytest.approx(0.14, abs=0.05)
    assert found["beats-temperature-0.8-direct"].decision == "fails"
    study = study_module.Study(read_results(path))
    [base], [student] = ([*study.of("small", label).values()][:1] for label in ("direct", "0.8"))
    statistic = study_module.at_equal_precision(study, base, student)
    plain = study.recall(base, 0.8) - study.recall(student)
    own = statistic.influence[student.name]
    slope = (study.recall(base, 0.6).value - study.recall(base, 0.8).value) / (
        study.precision(base, 0.6).value - study.precision(base, 0.8).value
    )
    assert np.allclose(own, slope * study.precision(student).influence[student.name])
    assert set(statistic.influence) > set(plain.influence)
    beyond = found["beats-temperature-0.6-direct"]
    assert beyond.decision == "undecided"
    assert "4 of 4 students of tau 0.6 is outside" in beyond.sentence


def test_fifths_by_rarity_make_up_the_whole(tmp_path: Path, study_module: ModuleType) -> None:
    path = results_of(tmp_path / "r.h5", PRECISION, PRECISION, seeds=1)
    study = study_module.Study(read_results(path))
    student = study.students[0]
    fifths = study.by_rarity(student)
    assert np.mean([fifth.value for fifth in fifths]) == pytest.approx(study.recall(student).value)
    values = [fifth.value for fifth in fifths]
    assert values == sorted(values)  # what the truth finds rare, such a student finds rare too


def test_fifths_are_of_samples_with_a_token_and_need_five_of_them(
    tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    whole = results_of(tmp_path / "r.h5", PRECISION, PRECISION)
    for kept, known in ((5, True), (4, False)):

        def empty(pair: tuple[str, str], arrays: dict[str, Any], kept: int = kept) -> None:
            if pair[0] == "truth":
                arrays["num_tokens"][kept:] = arrays["log_prob_sum"][kept:] = 0

        path = changed(whole, tmp_path / f"{kept}.h5", empty)
        study = study_module.Study(read_results(path))
        assert study.has_fifths == known
        assert ("rare-pays" in found_in(path, study_module, verdicts_module)) == known
        if known:
            student = study.students[0]
            fifths = [fifth.value for fifth in study.by_rarity(student)]
            assert np.mean(fifths) == pytest.approx(study.recall(student).value)


def test_errors_of_fifths_are_those_of_other_samples(study_module: ModuleType) -> None:
    """What is lost grows with rarity here, so that a fifth depends on where it is cut."""
    noise = np.random.default_rng(0)
    num_rows, repeats = 400, 1500
    values = np.empty((repeats, 5))
    errors = np.empty((repeats, 5))
    for repeat in range(repeats):
        rarity = noise.normal(size=num_rows)
        lost = -0.3 - 0.25 * np.maximum(-rarity, 0.0) + noise.normal(0.0, 0.1, num_rows)
        order = np.argsort(rarity)
        tokens = np.full(num_rows, TOKENS)
        fifths = study_module.in_fifths(TOKENS * lost[order], tokens, order, num_rows)
        values[repeat] = [fifth.value for fifth in fifths]
        errors[repeat] = [np.linalg.norm(fifth.influence["truth"]) for fifth in fifths]
        assert all(abs(fifth.influence["truth"].sum()) < 1e-9 for fifth in fifths)
    ratios = errors.mean(axis=0) / values.std(axis=0)
    assert (np.abs(ratios - 1.0) < 0.1).all(), ratios


@pytest.mark.parametrize("what", ["nan", "infinite", "no token", "one sequence"])
def test_a_score_without_a_mean_is_left_out_and_said(
    what: str, tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    bad, seen = "student-s1-small-tau0.6", "student-s2-small-direct-T0.6"
    decode = {"direct": {0.8: (-2.6, -2.6), 0.6: (-1.9, -2.9)}}
    whole = results_of(tmp_path / "r.h5", PRECISION, PRECISION, decode=decode)

    def spoil(pair: tuple[str, str], arrays: dict[str, Any]) -> None:
        if pair[0] not in (bad, seen):
            return
        if what == "one sequence":
            arrays |= {name: array[:1] for name, array in arrays.items()}
        elif what == "no token":
            arrays["num_tokens"][:] = arrays["log_prob_sum"][:] = 0
        else:
            arrays["log_prob_sum"][7] = {"nan": np.nan, "infinite": -np.inf}[what]

    path = changed(whole, tmp_path / "s.h5", spoil)
    study = study_module.Study(read_results(path))
    assert study.unscored == [bad]
    assert study.left_out.startswith("1 of 16 trained students are left out")
    assert bad in study.left_out
    [direct] = [s for s in study.students if seen.startswith(s.name)]
    assert study.temperatures(direct) == [1.0, 0.8]
    steps = found_in(path, study_module, verdicts_module)["precision-rises"].means
    assert {step: mean.num_seeds for step, mean in steps.items()} == {
        "from tau 1 to 0.8": 4,
        "from tau 0.8 to 0.6": 3,
    }


def test_who_pays_is_said_for_the_rarest_and_the_commonest_fifth(
    tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    path = results_of(tmp_path / "r.h5", PRECISION, PRECISION)
    verdict = found_in(path, study_module, verdicts_module)["rare-pays"]
    assert verdict.decision == "fails"  # these students gain, and the same on every sample
    for name in ("rarest", "commonest"):
        assert verdict.means[name].estimate == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("change", "decision"), [(0.0, "fails"), (-1.5, "holds")])
def test_a_fifth_that_gains_less_than_another_does_not_pay(
    change: float, decision: str, tmp_path: Path, study_module: ModuleType,
    verdicts_module: ModuleType,
) -> None:  # fmt: skip
    whole = results_of(tmp_path / "r.h5", PRECISION, PRECISION)
    own = read_results(whole).scores["truth", "self"].log_prob_sum
    rarest = np.argsort(own)[: NUM_ROWS // 5]

    def lose(pair: tuple[str, str], arrays: dict[str, Any]) -> None:
        if pair[0] == "truth" and pair[1].endswith("tau0.6"):
            arrays["log_prob_sum"][rarest] += TOKENS * (change - 0.5)

    path = changed(whole, tmp_path / "s.h5", lose)
    verdict = found_in(path, study_module, verdicts_module)["rare-pays"]
    assert verdict.means["difference"].high < 0.0
    assert verdict.decision == decision


def test_end_tokens_that_precision_leaves_out_are_a_part_of_its_gain(
    tmp_path: Path, study_module: ModuleType, verdicts_module: ModuleType
) -> None:
    whole = results_of(tmp_path / "r.h5", PRECISION, PRECISION)

    def end(pair: tuple[str, str], arrays: dict[str, Any]) -> None:
        each = -4.0 if pair[0].endswith("tau0.6") and pair[1] == "truth" else -1.0
        arrays["end_log_prob"] = np.full(NUM_ROWS, each)

    path = changed(whole, tmp_path / "s.h5", end, config="eos: mask")
    verdict = found_in(path, study_module, verdicts_module)["gain-is-entropy-0.6"]
    parts = {name: verdict.means[name].estimate for name in ("entropy", "divergence", "end tokens")}
    assert parts["end tokens"] == pytest.approx(3.0 / TOKENS)
    assert verdict.means["precision"].estimate == pytest.approx(sum(parts.values()))
    assert "end tokens, which precision leaves out, +0.300" in verdict.sentence


def test_precision_and_recall_are_those_of_stored_ids(
    tiny_run: Path, study_module: ModuleType
) -> None:
    torch.set_num_threads(1)
    study = study_module.Study(read_results(tiny_run / "8-merge" / "results.h5"))
    truth = read_samples(sorted((tiny_run / "2-sample-truth" / "eval").glob("*.arrow")))
    for student in study.students:
        name = student.name
        own = read_samples(sorted((tiny_run / "6-sample-students" / name).glob("*.arrow")))
        stage = "3-train-on-truth" if student.label == "direct" else "5-train-students"
        model = model_of(tiny_run, stage, name)
        for samples, path, statistic in (
            (own, model_of(tiny_run, "1-truth", "truth"), study.precision(student)),
            (truth, model, study.recall(student)),
        ):
            exact = oracle(path, samples, 1.0).sum() / (samples.length - PROMPT).sum()
            assert abs(statistic.value - exact) < 1e-5
    assert study.has_tokens
    assert not study.has_entropies
    for student in study.students:
        # Of one token, both sets of samples know the distance between the distributions.
        overlaps, coverages = (
            of(student, 1, np.zeros(1)) for of in (study.overlaps, study.coverages)
        )
        difference = overlaps[0] - coverages[0]
        error = np.sqrt(sum((values**2).sum() for values in difference.influence.values()))
        assert abs(difference.value) < 4.5 * error
        assert (
            0.0 < study.total_variation(student, 1).value < study.total_variation(student, 8).value
        )


def test_fifths_by_entropy_make_up_the_whole(
    extended_run: tuple[Path, set[str]], study_module: ModuleType
) -> None:
    study = study_module.Study(read_results(extended_run[0] / "8-merge" / "results.h5"))
    assert study.has_entropies
    student = study.students[0]
    fifths = study.by_entropy(student)
    shares = [1.0 / len(fifths)] * len(fifths)
    whole = sum(share * fifth.value for share, fifth in zip(shares, fifths, strict=True))
    assert whole == pytest.approx(study.recall(student).value, rel=0.01)
    assert fifths[0].value > fifths[-1].value  # where the truth is sure, the next token is easier
