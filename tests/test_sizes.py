"""Sizes of students are compared seed by seed, and no more is said than the numbers carry."""

import importlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from commands import ROOT
from test_report import (
    LAPTOP,
    MEASURE,
    PHONE,
    Browser,
    Reported,
    browser,
    overlapping,
    reported,
    run_report,
)

from kdhpc.cluster import runs
from kdhpc.config import presets
from kdhpc.storage.results import ScorePieces, read_results, write_results

__all__ = ["browser"]  # a fixture
NUM_ROWS, TOKENS, SEED_ERROR = 400, 10, 0.004


@dataclass(frozen=True, kw_only=True)
class Made:
    """Students of a size that are made up, by their changes against tau 1."""

    parameters: int
    gain: float
    """Change of precision from tau 1 to 0.6, in nats per token as all changes."""
    loss: float
    """Change of recall from tau 1 to 0.6."""
    direct: tuple[float, float]
    """Precision and recall of the direct student less those of tau 1."""
    kl: float
    """Change of KL(p''||p*) from tau 1 to 0.6."""


SIZES = {
    # After one epoch both changes vanish with capacity.
    "h8": Made(parameters=5000, gain=1.0, loss=-0.40, direct=(0.0, 0.1), kl=0.2),
    "h16": Made(parameters=20000, gain=0.5, loss=-0.20, direct=(0.0, 0.1), kl=0.1),
    "h32": Made(parameters=80000, gain=0.2, loss=-0.10, direct=(0.0, 0.1), kl=0.1),
    # After four they become the teacher's.
    "h8x4": Made(parameters=5000, gain=0.8, loss=-0.30, direct=(0.3, 0.1), kl=0.1),
    "h16x4": Made(parameters=20000, gain=0.9, loss=-0.30, direct=(0.3, 0.1), kl=0.2),
    "h32x4": Made(parameters=80000, gain=1.0, loss=-0.30, direct=(0.3, 0.0), kl=-0.2),
}
TEACHER = (1.0, -0.3)
"""Change of the precision and the recall of every teacher from tau 1 to 0.6."""


def sized(
    path: Path,
    sizes: Mapping[str, Made] = SIZES,
    *,
    teacher: tuple[float, float] | None = TEACHER,
    left_out: Collection[str] = (),
    seeds: int = 4,
    config: bool = True,
) -> Path:
    """Write results of several sizes whose changes are given, with errors of seeds and sequences.

    Args:
        path: the file.
        sizes: the students by the name of their size.
        teacher: change of every teacher; without it no teacher is scored.
        left_out: endings of the names of students that have no scores.
        seeds: number of seeds.
        config: whether the results say how they were made, with the trainings of `tiny capacity`.
    """
    noise = np.random.default_rng(1)
    truth_rows = noise.normal(0.0, 0.3, NUM_ROWS)
    scores: dict[tuple[str, str], Any] = {("truth", "self"): -2.0 + truth_rows}
    models: dict[str, dict[str, Any]] = {}

    def rows(mean: float, shared: Any = 0.0) -> Any:
        return mean + noise.normal(0.0, SEED_ERROR) + shared + noise.normal(0.0, 0.05, NUM_ROWS)

    def score(sampler: str, scorer: str, precision: float, recall: float, entropy: float) -> None:
        scores[sampler, "truth"] = rows(precision)
        scores[sampler, "self"] = rows(-entropy)
        scores["truth", scorer] = rows(recall, truth_rows)

    for seed in range(seeds):
        for tau, (gain, loss) in ((1.0, (0.0, 0.0)), (0.6, teacher)) if teacher else ():
            name = f"teacher-s{seed}"
            score(f"{name}-tau{tau:g}", name if tau == 1.0 else f"{name}-T{tau:g}",
                  -3.0 + gain, -2.5 + loss, 1.0)  # fmt: skip
        for size, made in sizes.items():
            for arm, precision, recall, kl in (
                ("direct", *made.direct, 0.0),
                ("tau1", 0.0, 0.0, 0.0),
                ("tau0.6", made.gain, made.loss, made.kl),
            ):
                name = f"student-s{seed}-{size}-{arm}"
                models[name] = {
                    "kind": "student", "seed": seed, "size": size, "arm": arm,
                    "tau": 0.6 if arm == "tau0.6" else 1.0, "parameters": made.parameters,
                }  # fmt: skip
                if not name.endswith(tuple(left_out)):
                    # KL(p''||p*) is -entropy - precision.
                    score(name, name, -3.0 + precision, -2.5 + recall, 1.0 - precision - kl)
    counts = np.full(NUM_ROWS, TOKENS, np.int32)
    pieces = [
        ScorePieces(
            sampler=sampler, scorer=scorer, num_rows=NUM_ROWS,
            pieces=[("log_prob_sum", TOKENS * values), ("num_tokens", counts)],
        )
        for (sampler, scorer), values in scores.items()
    ]  # fmt: skip
    as_configured = presets.to_yaml(runs.from_words(["tiny", "capacity"])[1])
    provenance = {"config": as_configured} if config else {}
    write_results(path, recipe="r", provenance=provenance, scores=pieces, models=models)
    return path


@pytest.fixture(scope="module")
def study_module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield importlib.import_module("study")


@pytest.fixture
def size_verdicts(study_module: ModuleType) -> ModuleType:
    return importlib.import_module("size_verdicts")


@pytest.fixture
def report_sizes(study_module: ModuleType) -> ModuleType:
    return importlib.import_module("report_sizes")


def study_of(study_module: ModuleType, path: Path) -> Any:
    return study_module.Study(read_results(path))


def test_each_claim_about_sizes_is_decided_as_the_results_were_made(
    tmp_path: Path, study_module: ModuleType, size_verdicts: ModuleType
) -> None:
    study = study_of(study_module, sized(tmp_path / "r.h5"))
    made = size_verdicts.across_sizes(study)
    assert len(made) == len({(v.name, v.size) for v in made}) == 2 * 4 + 3 * 3
    own = "from tau 1 to 0.6 is the teacher's own, within 20% of it"
    assert {(v.claim, v.size): v.decision for v in made if not v.claim.startswith("KL")} == {
        ("the gain in precision from tau 1 to 0.6 gets smaller from size h8 to h32", ""): "holds",
        ("the loss of recall from tau 1 to 0.6 gets smaller from size h8 to h32", ""): "holds",
        (f"the change of precision {own}", "h32"): "fails",
        (f"the change of recall {own}", "h32"): "fails",
        ("the gain in precision from tau 1 to 0.6 gets smaller from size h8x4 to h32x4", ""):
            "fails",
        ("the loss of recall from tau 1 to 0.6 gets smaller from size h8x4 to h32x4", ""):
            "undecided",
        (f"the change of precision {own}", "h32x4"): "holds",
        (f"the change of recall {own}", "h32x4"): "holds",
        **{
            (f"{measure} of direct less that of tau 1 is larger at size {size}x4, which is "
             f"trained for longer, than at {size}", ""): decision
            for measure, size, decision in (
                ("precision", "h8", "holds"), ("precision", "h16", "holds"),
                ("precision", "h32", "holds"), ("recall", "h8", "undecided"),
                ("recall", "h16", "undecided"), ("recall", "h32", "fails"),
            )
        },
    }  # fmt: skip
    of_kl = [verdict.decision for verdict in made if verdict.claim.startswith("KL")]
    assert of_kl == ["fails", "holds", "fails"]


def test_sentences_have_the_change_at_each_size_and_the_difference(
    tmp_path: Path, study_module: ModuleType, size_verdicts: ModuleType
) -> None:
    study = study_of(study_module, sized(tmp_path / "r.h5"))
    found = {(verdict.name, verdict.size): verdict for verdict in size_verdicts.across_sizes(study)}
    recall = found["recall-over-sizes-h8-h32-0.6", ""]
    expected = {"h8": -0.4, "h32": -0.1, "difference": 0.3}
    assert {n: m.estimate for n, m in recall.means.items()} == pytest.approx(expected, abs=0.02)
    assert recall.sentence.startswith("From tau 1 to 0.6, recall changes by -0.")
    teachers = found["precision-is-the-teachers-0.6", "h32"].means
    expected = {"students": 0.2, "teachers": 1.0, "difference": -0.8}
    expected |= {"less 0.8 times": -0.6, "less 1.2 times": -1.0}
    assert {n: m.estimate for n, m in teachers.items()} == pytest.approx(expected, abs=0.02)
    of_kl = found["divergence-0.6-after-training-h32-h32x4", ""]
    assert of_kl.means["h32x4"].estimate == pytest.approx(-0.2, abs=0.02)
    assert "(above 0) at h32 (epochs 1) and -0." in of_kl.sentence
    assert "(below 0) at h32x4 (epochs 4)" in of_kl.sentence


def test_a_change_that_is_not_there_cannot_get_smaller(
    tmp_path: Path, study_module: ModuleType, size_verdicts: ModuleType
) -> None:
    gains = replace(SIZES["h8"], loss=0.0), replace(SIZES["h32"], loss=0.3)
    path = sized(tmp_path / "r.h5", dict(zip(("h8", "h32"), gains, strict=True)))
    found = {v.name: v for v in size_verdicts.across_sizes(study_of(study_module, path))}
    verdict = found["recall-over-sizes-h8-h32-0.6"]
    assert verdict.means["difference"].low > 0.0
    assert verdict.decision == "undecided"
    assert verdict.sentence.startswith("No loss of recall is established at h8. ")


def test_one_seed_decides_nothing_about_sizes(
    tmp_path: Path, study_module: ModuleType, size_verdicts: ModuleType
) -> None:
    path = sized(tmp_path / "r.h5", seeds=1)
    made = size_verdicts.across_sizes(study_of(study_module, path))
    assert {verdict.decision for verdict in made} == {"undecided"}


def test_sizes_are_compared_only_where_their_trainings_are_known(
    tmp_path: Path, study_module: ModuleType, size_verdicts: ModuleType, report_sizes: ModuleType
) -> None:
    for name, sizes, config, num_verdicts, figures in (
        ("unknown", SIZES, False, 0, []),
        ("one", {"h8": SIZES["h8"]}, True, 0, []),
        ("capacity", {n: SIZES[n] for n in ("h8", "h32")}, True, 4, ["capacity"]),
        ("convergence", {n: SIZES[n] for n in ("h8", "h8x4")}, True, 3, ["convergence"]),
        ("neither", {n: SIZES[n] for n in ("h8", "h32x4")}, True, 0, []),
    ):
        study = study_of(study_module, sized(tmp_path / f"{name}.h5", sizes, config=config))
        assert len(size_verdicts.across_sizes(study)) == num_verdicts
        assert [figure.name for figure in report_sizes.figures(study)] == figures
    assert list(size_verdicts.trainings(study)) == ["epochs 1", "epochs 4"]


def test_figures_have_a_row_for_each_size_and_the_teacher(
    tmp_path: Path, study_module: ModuleType, report_sizes: ModuleType
) -> None:
    study = study_of(study_module, sized(tmp_path / "r.h5"))
    capacity, convergence = report_sizes.figures(study)
    assert (capacity.notes, convergence.notes) == ((), ())
    own = {(row["panel"], row.get("size", "teacher")): row["estimate"] for row in capacity.rows}
    precision, recall = (
        f"{name} of tau 0.6 less that of tau 1" for name in ("precision", "recall")
    )
    assert own == pytest.approx(
        {(precision, size): made.gain for size, made in SIZES.items()}
        | {(recall, size): made.loss for size, made in SIZES.items()}
        | {(precision, "teacher"): 1.0, (recall, "teacher"): -0.3},
        abs=0.03,
    )
    changes = {(row["panel"], row["size"]): row["estimate"] for row in convergence.rows}
    panels = [*(f"{name} of direct less that of tau 1" for name in ("precision", "recall"))]
    panels.append("KL(p''||p*) of tau 0.6 less that of tau 1")
    assert changes == pytest.approx(
        {
            (panel, size): value
            for size, made in SIZES.items()
            for panel, value in zip(panels, (*made.direct, made.kl), strict=True)
        },
        abs=0.03,
    )
    for row in (*capacity.rows, *convergence.rows):
        assert row["low"] < row["estimate"] < row["high"]
        if "size" in row:
            assert row["parameters"] == SIZES[row["size"]].parameters
            assert row["series"] == ("epochs 4" if row["size"].endswith("x4") else "epochs 1")
    assert [line["size"] for line in capacity.numbers] == [*SIZES, "teacher"]
    assert all(len(line) == 6 for line in convergence.numbers)


def test_what_a_figure_of_sizes_lacks_is_said(
    tmp_path: Path, study_module: ModuleType, size_verdicts: ModuleType, report_sizes: ModuleType
) -> None:
    path = sized(tmp_path / "r.h5", teacher=None, left_out=("-h32-tau0.6", "-h8x4-direct"))
    study = study_of(study_module, path)
    capacity, convergence = report_sizes.figures(study)
    assert [note.partition(":")[0] for note in capacity.notes] == [
        "Left out, as a student or a score is missing",
        "The teacher's own change is not drawn",
    ]
    assert "h32 in precision of tau 0.6 less that of tau 1, h32 in recall of" in capacity.notes[0]
    [left_out] = convergence.notes
    assert "h8x4 in precision of direct less that of tau 1" in left_out
    assert "h32 in KL" in left_out
    claims = [verdict.claim for verdict in size_verdicts.across_sizes(study)]
    assert any("smaller from size h8 to h16" in claim for claim in claims)
    assert not any("teacher" in claim for claim in claims)
    without = sized(tmp_path / "s.h5", left_out=("tau0.6",))
    capacity, convergence = report_sizes.figures(study_of(study_module, without))
    assert not capacity.rows
    assert convergence.notes == (
        "The change of KL(p''||p*) is not drawn: it needs students of tau 1 and of a lower tau.",
    )


@pytest.mark.parametrize("sizes", [tuple(SIZES), ("h8", "h8x4")])
def test_a_figure_of_sizes_can_be_drawn_by_itself(
    sizes: tuple[str, ...], tmp_path: Path, study_module: ModuleType, report_sizes: ModuleType
) -> None:
    charts = importlib.import_module("report_figures")
    path = sized(tmp_path / "r.h5", {size: SIZES[size] for size in sizes})
    figure = report_sizes.convergence(study_of(study_module, path))
    drawn = charts.images(charts.page_spec(figure), figure.title)
    assert drawn.keys() == {".svg", ".png", ".pdf"}
    text = drawn[".svg"].decode()
    assert figure.title in text
    assert ("h16x4" in text) == ("h16x4" in sizes)
    assert text.count(" of direct less that of tau 1</text>") == 2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """Return the report of made-up results of several sizes."""
    path = sized(tmp_path_factory.mktemp("sizes") / "results.h5")
    return reported(run_report(path))


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_a_page_has_a_part_that_compares_sizes_in_which_no_label_lies_on_another(
    size: tuple[int, int], report: Reported, browser: Browser
) -> None:
    assert report.headings[:4] == ["What this page says", "Across sizes", "Verdicts", "Figures"]
    part = report.spaced.partition("<h2>Across sizes")[2].partition("<h2>Verdicts")[0]
    assert "gets smaller from size h8 to h32</p>" in part
    assert "within 20 % of it (size h32x4)" in part
    assert part.count('<div class="chart">') == 2
    for name in ("capacity", "convergence"):
        assert len(report.rows(f"report-{name}")) > 12
        for suffix in (".svg", ".png", ".pdf"):
            assert (report.page.parent / f"report-{name}{suffix}").stat().st_size
    assert "gets smaller from size h8 to h32" in report.printed
    measured = browser.look(report.page, size, MEASURE)
    assert measured["wide"] <= measured["inner"] == size[0]
    for chart, names in zip(measured["charts"], (["teacher"], []), strict=False):
        labels = ["h8h8x45k", "h16h16x420k", "h32h32x480k"]  # each of three lines
        assert {*labels, "epochs 1", "epochs 4", *names} <= {*chart["texts"]}
        assert overlapping(chart["boxes"]) == []
        assert chart["right"] <= size[0]
