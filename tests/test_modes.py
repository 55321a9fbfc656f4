"""A truth that is a mixture of models, by enumeration; which modes are kept, and why."""

import csv
import importlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, launch, status
from models_for_tests import llama_of, small_model
from scipy import stats

from kdhpc.cluster import runs
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import DamagedError, InputError
from kdhpc.experiment.inputs import prepare
from kdhpc.models import mixture as mixtures
from kdhpc.models.loading import Loaded
from kdhpc.models.mixture import LanguageMixture
from kdhpc.sampling.mixture import draw_components, sample_mixture
from kdhpc.sampling.sampler import Prompt, Sampler
from kdhpc.science import modes
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.mixture import score_mixture
from kdhpc.selection import Selection
from kdhpc.storage.results import Results, read_results
from kdhpc.storage.token_shards import Samples, padded, read_samples

IDS, LENGTH, EOS, PROMPT = 4, 4, 0, (2, 1)
WEIGHTS = np.array([0.5, 0.3, 0.2])


@pytest.fixture(scope="module", autouse=True)
def analysis() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [small_model(IDS, LENGTH, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def mixture(models: list[Any]) -> LanguageMixture:
    nothing: Any = None  # the tokenizer is not used
    return LanguageMixture(
        weights=WEIGHTS,
        components=tuple(Loaded(llama_of(model), nothing) for model in models),
    )


def every_sequence() -> list[tuple[int, ...]]:
    """Return every sequence: two tokens after the prompt, or the end at once."""
    drawn = [(EOS,), *itertools.product(range(1, IDS), range(IDS))]
    return [(*PROMPT, *tokens) for tokens in drawn]


def by_hand(models: list[Any], sequences: list[tuple[int, ...]]) -> np.ndarray[Any, Any]:
    """Return log p_k of each token after the prompt [K, N, 2] in float64, 0 where there is none."""
    values = np.zeros((len(models), len(sequences), LENGTH - len(PROMPT)))
    for k, model in enumerate(models):
        exact = type(model)(model.config).double()
        exact.load_state_dict({n: w.double() for n, w in model.state_dict().items()})
        for row, ids in enumerate(sequences):
            log_probs = exact(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
            for place in range(len(PROMPT), len(ids)):
                values[k, row, place - len(PROMPT)] = float(log_probs[place - 1, ids[place]])
    return values


@pytest.mark.parametrize("count_eos", [True, False])
def test_the_mixture_and_its_responsibilities_are_those_of_enumeration(
    models: list[Any], mixture: LanguageMixture, count_eos: bool
) -> None:
    sequences = every_sequence()
    of_tokens = by_hand(models, sequences)
    whole = of_tokens.sum(axis=2)
    p_star = (WEIGHTS[:, None] * np.exp(whole)).sum(axis=0)
    assert p_star.sum() == pytest.approx(1.0, abs=1e-12)
    scores, sharp = score_mixture(
        mixture,
        padded(sequences, LENGTH, IDS),
        counting=Counting(num_prompt=len(PROMPT), eos=EOS, count_eos=count_eos),
        batch_rows=5,
        head_tokens=3,
        per_token=True,
        betas=(1.0, 2.0),
    )
    weights = WEIGHTS**2 / (WEIGHTS**2).sum()
    sharpened = np.log((weights[:, None] * np.exp(whole)).sum(axis=0))
    assert sharp.end_log_prob is not None
    of_ends = 0.0 if count_eos else sharp.end_log_prob
    assert sharp.log_prob_sum + of_ends == pytest.approx(sharpened, abs=1e-5)
    assert scores.component_log_prob is not None
    assert scores.component_first_log_prob is not None
    assert scores.token_log_prob is not None
    assert scores.end_log_prob is not None
    assert scores.component_log_prob == pytest.approx(whole.T, abs=1e-5)
    assert scores.component_first_log_prob == pytest.approx(whole.T, abs=1e-5)
    shares = modes.responsibilities(scores.component_log_prob, WEIGHTS)
    exact = WEIGHTS[:, None] * np.exp(whole) / p_star
    assert shares == pytest.approx(exact.T, abs=1e-5)
    ends = 0.0 if count_eos else scores.end_log_prob
    assert scores.log_prob_sum + ends == pytest.approx(np.log(p_star), abs=1e-5)
    first = np.log((WEIGHTS[:, None] * np.exp(of_tokens[:, :, 0])).sum(axis=0))
    counted = np.nan_to_num(scores.token_log_prob)
    assert counted.sum(axis=1) == pytest.approx(scores.log_prob_sum, abs=1e-6)
    long = [row for row, ids in enumerate(sequences) if len(ids) == LENGTH]
    assert counted[long, len(PROMPT)] == pytest.approx(first[long], abs=1e-5)


def drawn(
    mixture: LanguageMixture, rows: range, weights: np.ndarray[Any, Any], batch: int = 256
) -> tuple[Samples, np.ndarray[Any, Any]]:
    samplers = [
        Sampler(
            loaded.model,
            prompts=[Prompt(ids=PROMPT)],
            length=LENGTH,
            batch_rows=batch,
            selection=Selection(),
            draw="inverse_cdf",
            counting=Counting(num_prompt=len(PROMPT), eos=EOS, count_eos=True),
        )
        for loaded in mixture.components
    ]
    component = draw_components(weights, rows=rows, seed=3, stream="truth/eval")
    return sample_mixture(samplers, component, rows=rows, seed=3, stream="truth/eval"), component


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_components_and_sequences_are_drawn_with_their_probabilities(
    models: list[Any], mixture: LanguageMixture, beta: float
) -> None:
    number, sequences = 12288, every_sequence()
    weights = mixture.sharpened(beta)
    assert weights == pytest.approx(WEIGHTS**beta / (WEIGHTS**beta).sum())
    samples, component = drawn(mixture, range(number), weights)
    found = Counter(
        (int(k), tuple(row[:length].tolist()))
        for k, row, length in zip(component, samples.ids, samples.length, strict=True)
    )
    expected = weights[:, None] * np.exp(by_hand(models, sequences).sum(axis=2)) * number
    pairs = [(k, ids) for k in range(3) for ids in sequences]
    counts = np.array([found[pair] for pair in pairs], dtype=float)
    assert counts.sum() == number
    of_pairs = expected.ravel()
    large = of_pairs >= 5.0
    counts, of_pairs = (
        np.append(values[large], values[~large].sum()) for values in (counts, of_pairs)
    )
    assert stats.chisquare(counts, of_pairs * counts.sum() / of_pairs.sum()).pvalue > 1e-3


def test_sequences_do_not_depend_on_shards(mixture: LanguageMixture) -> None:
    whole, component = drawn(mixture, range(64), WEIGHTS, batch=16)
    for rows in (range(32), range(32, 48), range(48, 64)):
        part, of_part = drawn(mixture, rows, WEIGHTS, batch=16)
        assert np.array_equal(part.ids, whole.ids[rows.start : rows.stop])
        assert np.array_equal(of_part, component[rows.start : rows.stop])


def test_a_folder_without_weights_is_no_mixture(tmp_path: Path) -> None:
    (tmp_path / mixtures.WEIGHTS).write_text("[]")
    with pytest.raises(DamagedError, match="not a mixture of models"):
        mixtures.load(tmp_path, "float32", "cpu")


def test_texts_of_no_kind_count_for_no_mode() -> None:
    noise = np.random.default_rng(0)
    component = np.repeat([0, 1], 500)
    num_tokens = np.full(1000, 10)
    own = noise.normal(-20.0, 2.0, 1000)
    log_probs = np.where(component[:, None] == np.arange(2), own[:, None], own[:, None] - 30.0)
    least = modes.floors(log_probs, num_tokens, component)
    for index in range(2):
        own_of = log_probs[component == index, index] / 10
        assert (own_of < least[index]).mean() == pytest.approx(0.01, abs=0.002)
    weights = np.array([0.5, 0.5])
    garbage = np.array([[-60.0, -45.0]])
    shares = modes.assigned(np.vstack([log_probs, garbage]), np.full(1001, 10), weights, least)
    assert shares[-1].tolist() == [0.0, 0.0]
    assert shares[:-1].sum(axis=1).mean() == pytest.approx(0.99, abs=0.002)
    assert modes.log_mass(shares, weights) == pytest.approx([0.0, 0.0], abs=0.02)
    none = np.zeros_like(shares)
    assert modes.masses(none).tolist() == [0.0, 0.0]
    uneven = np.array([0.9, 0.1])
    assert modes.log_mass(none, uneven) == pytest.approx([0.0, 0.0])
    alone = modes.log_mass(shares * [1.0, 0.0], weights)
    assert alone[0] == pytest.approx(np.log(2.0), abs=0.01)
    assert np.isfinite(alone[1])


def properties(seeds: int, number: int = 6) -> tuple[Any, Any, Any]:
    """Return two properties that are those of each mode, and weights that rotate over seeds."""
    noise = np.random.default_rng(1)
    entropy, first = (np.tile(noise.normal(size=number), (seeds, 1)) for _ in range(2))
    weight = np.log(np.arange(1.0, number + 1.0))
    return entropy, first, np.stack([np.roll(weight, seed) for seed in range(seeds)])


def test_a_regression_over_modes_finds_what_made_the_masses() -> None:
    entropy, first, weight = properties(4)
    constant = np.arange(4.0)[:, None]
    found = modes.slopes(constant - 0.7 * entropy + 0.2 * weight, [entropy, first, weight])
    assert found is not None
    assert [slope.estimate for slope in found] == pytest.approx([-0.7, 0.0, 0.2], abs=1e-9)
    assert found[0].p_value() == pytest.approx(1 / 720)
    assert found[0].p_value(alternative="less") == pytest.approx(1 / 720)
    assert found[0].p_value(alternative="greater") == 1.0
    assert found[0].p_value(-0.7) == 1.0
    assert found[0].low == pytest.approx(-0.7, abs=1e-6)  # without noise nothing else is possible
    assert found[0].high == pytest.approx(-0.7, abs=1e-6)


def test_the_interval_has_every_slope_that_is_not_rejected() -> None:
    entropy, first, weight = properties(4)
    noise = np.random.default_rng(2)
    outcome = 0.5 * entropy + noise.normal(0.0, 0.3, (4, 6))
    found = modes.slopes(outcome, [entropy, first, weight])
    assert found is not None
    for slope in found:
        assert slope.low < slope.estimate < slope.high
        for end, inside in ((slope.low, 1.0), (slope.high, -1.0)):
            assert slope.p_value(end + inside * 1e-6) > 0.05 >= slope.p_value(end - inside * 1e-6)


def test_intervals_over_modes_cover_the_truth_however_many_seeds_there_are() -> None:
    """What a mode has besides its properties is the same in every seed, and no seed averages it."""
    noise = np.random.default_rng(3)
    covered = []
    for _ in range(150):
        entropy = np.tile(noise.normal(size=6), (8, 1))
        weight = np.stack([np.roll(np.log(np.arange(1.0, 7.0)), seed) for seed in range(8)])
        of_mode = np.tile(noise.normal(size=6), (8, 1))
        found = modes.slopes(0.3 * entropy + of_mode, [entropy, weight])
        assert found is not None
        covered.append(found[0].p_value(0.3) > 0.05)
    assert np.mean(covered) > 0.9


def test_properties_that_cannot_be_told_apart_give_no_slopes() -> None:
    entropy, first, weight = properties(1)
    assert modes.slopes(entropy, [entropy, 2.0 * entropy, weight]) is None
    assert modes.slopes(entropy[:, :3], [v[:, :3] for v in (entropy, first, weight)]) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    launch(
        "sweep", "tiny", "modes", "cluster=local", f"runs_dir={folder}",
        "scoring.corruptions=[swap]", "decode_temperatures=[0.8]",
    )  # fmt: skip
    assert status(folder / "tiny-modes", code=0)["complete"]
    return folder / "tiny-modes"


def results_of(run: Path) -> Results:
    return read_results(run / "8-merge" / "results.h5")


def test_a_run_knows_where_its_sequences_come_from(run: Path) -> None:
    results = results_of(run)
    own = results.scores["truth", "self"]
    assert own.component is not None
    assert own.component_log_prob is not None
    assert own.component_log_prob.shape == (100, 3)
    weights = {"names": 0.5, "sums": pytest.approx(1 / 3), "docs": pytest.approx(1 / 6)}
    assert json.loads(str(results.models["truth"]["weights"])) == weights
    assert json.loads(str(results.models["student-s0-small-beta4"]["weights"])) == weights
    posterior = modes.responsibilities(own.component_log_prob, np.array([1 / 2, 1 / 3, 1 / 6]))
    assert posterior.sum(axis=1) == pytest.approx(1.0)
    mixed = np.log(np.exp(own.component_log_prob) @ np.array([1 / 2, 1 / 3, 1 / 6]))
    assert own.log_prob_sum == pytest.approx(mixed, abs=1e-6)
    sharp = results.scores["teacher-s0-beta4", "self"]
    assert sharp.component_log_prob is not None
    weighted = np.log(np.exp(sharp.component_log_prob) @ np.array([81, 16, 1]) / 98)
    assert sharp.log_prob_sum == pytest.approx(weighted, abs=1e-6)
    for sampler in ("student-s0-small-tau0.6", "teacher-s0-beta4", "student-s0-small-direct-T0.8"):
        assert results.scores[sampler, "truth"].component_log_prob is not None
    damaged = results.scores["truth-swap", "truth"]
    assert damaged.log_prob_sum.mean() < own.log_prob_sum.mean()
    assert results.scores["truth", "student-s0-small-beta4"].component_log_prob is None


def test_training_sets_know_the_component_alone(run: Path) -> None:
    for stage, arm in (("2-sample-truth", "train"), ("4-sample-teacher", "s0-beta4")):
        folder = run / stage / arm
        paths = [folder / json.loads(r.read_text())["data"] for r in sorted(folder.glob("*.json"))]
        samples = read_samples(paths)
        assert samples.component is not None
        assert samples.component_log_prob is None
        # With beta 4, weights of 3 to 2 to 1 become 81 to 16 to 1.
        share = 81 / 98 if arm.endswith("4") else 0.5
        assert (samples.component == 0).mean() == pytest.approx(share, abs=0.1)


def test_the_analysis_says_what_is_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("modes")
    assert script.main([str(run), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "teacher, beta 4" in printed
    assert "student small, tau 0.6" in printed
    rows = list(csv.DictReader((tmp_path / "modes.csv").read_text().splitlines()))
    assert {row["arm"] for row in rows} >= {"teacher, tau 1", "student small, direct"}
    assert all(0.0 <= float(row["unassigned"]) <= 1.0 for row in rows)


def test_runs_whose_weights_differ_share_components_and_nothing_that_is_drawn() -> None:
    plans = []
    for word in ("truth.rotate_weights=0", "truth.rotate_weights=1"):
        pipeline, config = runs.from_words(["tiny", "modes", word])
        plans.append(pipeline.plan(config))
    one, other = ({s.key: s.recipe for s in plan.shards.values()} for plan in plans)
    shared = {key for key in one if one[key] == other.get(key)}
    assert shared == {f"truth/component-{name}/00000" for name in ("names", "sums", "docs")}
    streams = {plan.arm("sample-truth", "eval")[0].arm.fields["stream"] for plan in plans}
    assert streams == {"truth/eval", "truth/rotated1/eval"}
    config = prepared("tiny", "modes", "truth.rotate_weights=1")
    assert [*config.truth.weights.values()] == pytest.approx([1 / 6, 1 / 2, 1 / 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["betas=[2]"], "needs components of p"),
        (["truth.rotate_weights=1"], "truth.rotate_weights=1: needs components of p"),
        (["modes", "betas=[1,2]"], "betas: 1 leaves the weights as they are"),
        (["modes", "scoring.expected=true"], "not possible with truth.components"),
        (["modes", "prompts=addition"], "prompts=addition: not possible with truth.components"),
        (["modes", "downstream.tasks=[cloze]"], "downstream.tasks: not possible with"),
        (["modes", "truth.source=corpus"], "truth.source=corpus: not possible with"),
        (["modes", "students.small.labels=soft"], "the distribution of a mixture is not learnt"),
        (["modes", "truth.components.sums=null", "truth.components.docs=null"], "has 1"),
        (["modes", "truth.components.doc=null"], "no such component to take away"),
        (["modes", "truth.rotate_weights=3"], "expected less than the number of components, 3"),
        (["modes", "truth.component_sequences=8"], "at least truth.training.batch_sequences=64"),
        (["modes", "truth.components.a/b={corpus: addition}"], "a name of letters, digits"),
        (["modes", "truth.components.sums.weight=0"], "truth.components.sums.weight"),
    ],
)
def test_mixtures_that_are_not_possible_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs.from_words(["tiny", *words])


def prepared(*words: str) -> LanguageConfig:
    _, config = runs.from_words([*words])
    assert isinstance(config, LanguageConfig)
    return prepare(config)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("./none.txt", "truth.components.sums.corpus=./none.txt: no such file"),
        ("changed", "truth.components.sums.fingerprint=.*the fingerprint is now"),
    ],
)
def test_corpora_of_components_are_checked_before_anything_is_submitted(
    corpus: str, message: str
) -> None:
    word = f"truth.components.sums.corpus={corpus}"
    if corpus == "changed":
        word = "truth.components.sums.fingerprint=0123"
    with pytest.raises(InputError, match=message):
        prepared("tiny", "modes", word)


def test_claims_about_modes_need_modes(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(
        "claims:\n- name: n\n  says: s\n  test: less\n  terms:\n"
        "  - {measure: mass-by-entropy, of: 0.6, against: 1}\n"
    )
    for words, message in (
        (["tiny"], "has 0 modes that are known"),
        (["tiny", "modes"], "has 3 modes that are known"),
        (["demo", "modes"], ""),
    ):
        words.append(f"claims={path}")
        if message:
            with pytest.raises(InputError, match=message):
                prepared(*words)
        else:
            assert prepared(*words).claims_fingerprint


def test_many_modes_are_permuted_at_random() -> None:
    orders = modes.permutations(12)
    assert len(orders) == modes.MAX_ORDERS
    assert orders[0] == tuple(range(12))
    assert all(sorted(order) == [*range(12)] for order in orders[:50])
    assert len(modes.permutations(4)) == 24
    entropy, first, weight = properties(4, number=12)
    found = modes.slopes(-0.7 * entropy, [entropy, first, weight])
    assert found is not None
    assert found[0].estimate == pytest.approx(-0.7)
    assert found[0].p_value() < 0.001


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("truth.rotate_weights=1", ""),
        ("truth.components.sums.weight=5", "truth.components differs between files"),
        ("truth.components.sums.fingerprint=12", "truth.components differs between files"),
        ("truth.component_sequences=128", "truth.components differs between files"),
    ],
)
def test_runs_with_other_components_are_not_pooled(run: Path, word: str, message: str) -> None:
    claims = importlib.import_module("claims")
    one = results_of(run)
    config = presets.from_yaml(one.provenance["config"])
    one = replace(one, provenance={**one.provenance, "config": str(config)})
    *path, last = word.partition("=")[0].split(".")
    part = config
    for name in path:
        part = part[name]
    part[last] = word.partition("=")[2]
    models = {name.replace("s0", "s1"): facts for name, facts in one.models.items()}
    scores = {
        (a.replace("s0", "s1"), b.replace("s0", "s1")): of for (a, b), of in one.scores.items()
    }
    provenance = {**one.provenance, "config": str(config)}
    other = replace(one, models=models, scores=scores, provenance=provenance)
    if message:
        with pytest.raises(InputError, match=message):
            claims.pool([one, other])
    else:
        assert claims.pool([one, other]).complete


def test_ends_that_do_not_count_are_tokens_of_a_text(run: Path) -> None:
    """Sums under components have the end token, so their number of tokens has it too."""
    terms, study = (importlib.import_module(name) for name in ("mode_terms", "study"))
    results = results_of(run)
    own = results.scores["truth", "self"]
    length = np.asarray(own.num_tokens)
    config = presets.from_yaml(results.provenance["config"]) | {"eos": "mask"}
    ended = np.asarray(own.end_log_prob) != 0.0
    assert ended.any()
    masked = replace(own, num_tokens=(length - ended).astype(np.int32))
    scores = {**results.scores, ("truth", "self"): masked}
    provenance = {**results.provenance, "config": str(config)}
    changed = study.Study(replace(results, scores=scores, provenance=provenance))
    whole = terms.components(study.Study(results))
    assert terms.components(changed).entropy == pytest.approx(whole.entropy)
    assert terms.components(changed).least == pytest.approx(whole.least)
