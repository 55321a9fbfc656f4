"""Experiments share what they can, claims compare sizes and teachers, pages are made."""

import importlib
import itertools
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT
from test_project import golden

from kdhpc.cluster import runs
from kdhpc.cluster.planning import batches_by_stage, preview_stages
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import DamagedError, InputError
from kdhpc.experiment.claims import read_term
from kdhpc.models.sizes import forward_flops, sizes_of_shape, training_flops
from kdhpc.science.intervals import Statistic, ratio, through
from kdhpc.storage.results import ScorePieces, read_results, write_results

BASES = ("demo", "paper", "tiny")
NUM_ROWS, TOKENS = 300, 10
PARAMETERS = {"a": 1000, "b": 8000, "c": 64000, "ax4": 1000}


@pytest.fixture(scope="module", autouse=True)
def analysis() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield


@pytest.mark.parametrize(
    ("base", "experiment"),
    [
        *itertools.product(BASES, ("temperature", "capacity", "real_data", "downstream")),
        *itertools.product(
            ("tiny", "demo"),
            (
                "post_training",
                "reasoning",
                "summarisation",
                "objective",
                "truncation",
                "modes",
            ),
        ),
    ],
)
def test_an_experiment_plans_to_its_golden(base: str, experiment: str) -> None:
    pipeline, config = runs.from_words([base, experiment])
    plan = pipeline.plan(config)
    batches = batches_by_stage(pipeline, plan, config, max_array=1000)
    rows = preview_stages(pipeline, plan, config, batches, at_once=64)
    lines = [f"{r.folder}: {r.num_shards} shards, {r.rank_hours:.2f} rank-hours" for r in rows]
    lines.append(f"total: {sum(row.rank_hours for row in rows):.2f} rank-hours")
    golden(f"{base}-{experiment}.txt", "\n".join(lines) + "\n")
    golden(f"{base}-{experiment}.yaml", presets.to_yaml(config))


@pytest.mark.parametrize("base", BASES)
def test_capacity_shares_everything_but_its_students_with_temperature(base: str) -> None:
    plans = []
    for experiment in ("temperature", "capacity"):
        pipeline, config = runs.from_words([base, experiment])
        plans.append(pipeline.plan(config))
    theirs, ours = plans
    shared = {
        k
        for k, s in ours.shards.items()
        if k in theirs.shards and s.recipe == theirs.shards[k].recipe
    }
    for stage in ("truth", "sample-truth", "sample-teacher"):
        assert {shard.key for shard in ours.stage(stage)} <= shared, stage
    teachers = {shard.key for shard in ours.stage("train-on-truth") if "teacher" in shard.key}
    assert teachers <= shared
    assert not any("student-" in key for key in shared)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["capacity"], "expected one of demo, paper, tiny before it"),
        (["mini", "capacity"], "such as demo capacity"),
        (["demo", "capacitie"], "Did you mean capacity"),
        (["demo", "cluster"], "no preset 'cluster'"),
        (["tiny", "students.small=null"], "at least one size"),
        (["tiny", "students.smal=null"], "no such size to take away; expected one of small"),
    ],
)
def test_a_preset_that_is_added_to_nothing_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs.from_words(words)


def test_the_last_preset_that_fits_is_added_to() -> None:
    _, config = runs.from_words(["paper", "tiny", "capacity"])
    assert config.name == "tiny-capacity"
    _, config = runs.from_words(["tiny", "capacity", "students.h8=null", "students.h16x4=null"])
    assert [*presets.plain(config)["students"]] == ["h16", "h32", "h8x4", "h32x4"]


def results_of_sizes(
    path: Path, changes: Mapping[str, float], *, teacher: float, seeds: int = 4
) -> Path:
    """Write results of several sizes of students, without errors of seeds or sequences.

    Args:
        path: the file.
        changes: by size, the change of precision from tau 1 to 0.6, which is -2 times that of
            recall, in nats per token.
        teacher: that of the teacher.
        seeds: number of seeds.
    """
    noise = np.random.default_rng(0)
    models: dict[str, dict[str, Any]] = {}
    means: dict[tuple[str, str], float] = {("truth", "self"): -2.0}
    for seed in range(seeds):
        off = noise.normal(0.0, 0.3)
        for size, change in changes.items():
            for tau, share in (("1", 0.0), ("0.6", 1.0)):
                name = f"student-s{seed}-{size}-tau{tau}"
                models[name] = {
                    "kind": "student", "seed": seed, "size": size, "arm": f"tau{tau}",
                    "tau": float(tau), "parameters": PARAMETERS[size],
                }  # fmt: skip
                means[name, "truth"] = -4.0 + off + share * change
                means[name, "self"] = -1.0
                means["truth", name] = -3.0 + off - 0.5 * share * change
        for tau, share in (("1", 0.0), ("0.6", 1.0)):
            name = f"teacher-s{seed}"
            means[f"{name}-tau{tau}", "truth"] = -3.5 + off + share * teacher
            means["truth", name if tau == "1" else f"{name}-T{tau}"] = -2.5 - 0.5 * share * teacher
    counts = np.full(NUM_ROWS, TOKENS, np.int32)
    pieces = [
        ScorePieces(
            sampler=sampler, scorer=scorer, num_rows=NUM_ROWS,
            pieces=[("log_prob_sum", np.full(NUM_ROWS, TOKENS * mean)), ("num_tokens", counts)],
        )
        for (sampler, scorer), mean in means.items()
    ]  # fmt: skip
    epochs = {size: 4.0 if size.endswith("x4") else 1.0 for size in changes}
    students = {size: {"training": {"epochs": epochs[size]}} for size in changes}
    provenance = {"config": str({"students": students})}
    write_results(path, recipe="r", provenance=provenance, scores=pieces, models=models)
    return path


def terms_of(path: Path, *terms: Mapping[str, Any]) -> list[float | None]:
    """Return the estimates of terms, for students of size a where a term names none."""
    claim_terms, study = (importlib.import_module(name) for name in ("claim_terms", "study"))
    scores = study.Study(read_results(path))
    means = [claim_terms.mean_of(scores, read_term(term, "here"), "a") for term in terms]
    return [None if mean is None else round(mean.estimate, 6) for mean in means]


def test_a_term_may_be_about_a_size_a_teacher_or_a_difference(tmp_path: Path) -> None:
    path = results_of_sizes(tmp_path / "r.h5", {"a": 1.0, "b": 0.8, "ax4": 0.7}, teacher=0.4)
    own = {"measure": "precision", "of": "0.6", "against": "1"}
    recall = {**own, "measure": "recall"}
    assert terms_of(
        path,
        own,
        {**own, "size": "b"},
        {**recall, "size": "teacher"},
        {**own, "size": "b", "minus": {"size": "ax4"}},
        {**recall, "minus": {"size": "teacher"}},
        {**own, "minus": {"measure": "recall"}},
        {**own, "of": "0.7"},
        {**own, "minus": {"of": "0.7"}},
    ) == [1.0, 0.8, -0.2, 0.1, -0.3, 1.5, None, None]


@pytest.mark.parametrize(("limit", "better"), [(0.0, -1), (0.4, 1)])
def test_the_law_that_made_the_changes_predicts_the_held_out_size(
    tmp_path: Path, limit: float, better: int
) -> None:
    changes = {n: limit + 0.6 * (PARAMETERS[n] / 1000) ** -0.5 for n in ("a", "b", "c")}
    path = results_of_sizes(tmp_path / "r.h5", changes, teacher=0.4)
    own = {"of": "0.6", "against": "1", "size": "c"}
    values = terms_of(path, *({**own, "measure": f"held-out-{m}"} for m in ("precision", "recall")))
    for value, scale in zip(values, (1.0, 0.5), strict=True):
        assert value is not None
        assert better * value > 0.02 * scale
    [unknown] = terms_of(path, {**own, "measure": "held-out-recall", "size": "b"})
    assert unknown is None  # one smaller size gives no law


def test_a_power_law_is_fitted_and_a_function_is_linearised() -> None:
    terms = importlib.import_module("claim_terms")
    parameters = np.array([10.0, 100.0, 1000.0])
    assert terms.extrapolate(parameters, 3.0 * parameters**-0.5, 1e4) == pytest.approx(0.03)
    assert terms.extrapolate(parameters, np.full(3, 2.0), 1e4) == pytest.approx(2.0)
    noise = np.random.default_rng(0)
    one, two = (ratio(noise.normal(m, 1.0, 50), rows="r") for m in (2.0, 3.0))
    made = through(lambda of: float(of[0] * of[1]), [one, two])
    by_hand = two.value * one + one.value * two
    assert made.value == one.value * two.value
    assert made.influence["r"] == pytest.approx(by_hand.influence["r"], rel=1e-6)


def test_the_slopes_of_the_laws_are_those_of_a_smooth_function() -> None:
    """Laws on a coarse grid of exponents jump, which a small step takes for steep slopes."""
    terms = importlib.import_module("claim_terms")
    parameters = np.array([1000.0, 2500.0, 8000.0, 18000.0])
    law = [-0.3 + 0.2 * (num / 1000) ** -0.5 for num in parameters]
    others = [Statistic(value=value, influence={}) for value in (*law[1:], -0.3)]
    for change in np.linspace(-0.13, -0.08, 200):
        first = Statistic(value=change, influence={"r": np.array([-1.0, 1.0])})
        made = through(lambda of: terms.law_errors(parameters, of), [first, *others])
        assert abs(made.influence["r"][1]) < 2.0


def test_a_claim_names_a_size_in_all_of_its_terms_or_in_none(tmp_path: Path) -> None:
    claims = importlib.import_module("claims")
    path = tmp_path / "claims.yaml"
    path.write_text(
        "claims:\n- name: n\n  says: s\n  test: less\n  terms:\n"
        "  - {measure: recall, of: 1, against: direct, size: a}\n"
        "  - {measure: recall, of: 1, against: direct}\n"
    )
    with pytest.raises(InputError, match="in all of its terms or in none"):
        claims.read_claims(path)


def test_an_archive_is_compressed_and_keeps_samples(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, files, diversity = (
        importlib.import_module(name) for name in ("archive", "files", "diversity")
    )
    path = tmp_path / "scores-0.h5.xz"
    assert archive.main([str(tiny_run), str(path), "--samples"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    whole, kept = (files.read_file(p) for p in (tiny_run / "8-merge" / "results.h5", path))
    assert kept.scores.keys() == whole.scores.keys()
    for pair, scores in kept.scores.items():
        error = np.abs(scores.log_prob_sum - whole.scores[pair].log_prob_sum).max()
        assert error <= 0.5 / 32
        assert scores.token_log_prob is None
    study, run = importlib.import_module("study"), importlib.import_module("report_run")
    found = []
    for results in (whole, kept):
        facts = run.read_facts(results, tiny_run / "8-merge" / "results.h5")
        if results is kept:
            facts = run.RunFacts(config=None, records={})
        sets = diversity.sample_sets(study.Study(results), "small", facts)
        found.append([(v.name, v.sentence) for v in diversity.collapse(sets, "small")])
    assert found[0] == found[1] != []
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedError, match="not a whole xz file"):
        files.read_file(path)
    path.write_bytes(lzma.compress(b"text"))
    with pytest.raises(DamagedError):
        files.read_file(path)


def test_the_arithmetic_of_a_run_is_that_of_its_models() -> None:
    claims, costs = (importlib.import_module(name) for name in ("claims", "costs"))
    _, study = claims.read(ROOT / "docs" / "experiments" / "temperature")
    _, config = runs.from_words(["demo", "temperature"])
    shape = presets.build(LanguageConfig, presets.plain(config)).students["small"].shape
    assert shape is not None
    found = costs.flops(study)
    by_hand = (
        8 * 8 * 8192 * 2 * 64 * training_flops(sizes_of_shape(shape), 257, 64)
    )  # seeds, taus, rows, epochs
    assert found["train-students"] == pytest.approx(by_hand)
    teacher = presets.build(LanguageConfig, presets.plain(config)).teacher.shape
    assert teacher is not None
    by_hand = 8 * 8 * 8192 * 64 * forward_flops(sizes_of_shape(teacher), 257, 64)
    assert found["sample-teacher"] == pytest.approx(by_hand)
    assert "GPU-hours" in costs.in_words(study)


@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "capacity",
        "convergence",
        "real_data",
        "reasoning",
        "reasoning_larger",
        "summarisation",
        "post_training",
        "objective",
        "truncation",
        "modes",
        "downstream",
        "teacher_training",
        "teacher_margin",
        "teacher_ahead",
        "smollm2",
        "crossover",
    ],
)
def test_a_page_says_what_its_scores_say(name: str) -> None:
    experiment = importlib.import_module("experiment")
    assert name in experiment.PAGES
    path = experiment.DOCS_DIR / experiment.PAGES[name].path
    page = path.read_text()
    _, block = experiment.found(name)
    assert experiment.with_block(path, block) == page
    if experiment.PAGES[name].numbers:
        assert path.with_name(f"{name}.csv").read_text() == experiment.numbers(name)
    folder = experiment.DOCS_DIR / experiment.PAGES[name].folder
    claims = importlib.import_module("claims").read_claims(folder / "claims.yaml")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    predicted = page.partition("## Predicted")[2].partition("## Found")[0]
    rows = [line for line in predicted.splitlines() if line.startswith("| ")]
    if name != "smollm2":  # whose plan has no table of what is expected
        assert len(rows) - 1 == len([claim for claim in claims if claim.page in ("", name)])
