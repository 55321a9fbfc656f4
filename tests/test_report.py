"""The report of a run says what its numbers say, in a browser of any width, without a network."""

import argparse
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import unescape
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest
from commands import ROOT, need
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verdicts import results_of

from kdhpc.models.tokenizer import Tokenizer
from kdhpc.storage.results import read_results
from kdhpc.storage.token_shards import read_samples

LAPTOP, PHONE = (1280, 800), (390, 844)
MAX_BYTES = 2_000_000
BROWSER = next(filter(shutil.which, ("chromium", "google-chrome")), "")
MEASURE = """<script>
addEventListener("load", () => setTimeout(() => {
  const box = text => {
    const {left, top, right, bottom} = text.getBoundingClientRect();
    return {text: text.textContent, left, top, right, bottom};
  };
  const shown = text => text.textContent.trim() && !text.closest('[style*="opacity: 0"]');
  const charts = [...document.querySelectorAll("svg.marks")].map(svg => ({
    texts: [...svg.querySelectorAll("text")].map(text => text.textContent),
    labels: [...svg.querySelectorAll(".mark-text.role-mark text, .role-legend text")]
      .filter(shown).map(box),
    boxes: [...svg.querySelectorAll("text")].filter(shown).map(box),
    right: svg.getBoundingClientRect().right,
  }));
  const wide = document.scrollingElement.scrollWidth;
  const numbers = [...document.querySelectorAll(".number")].map(n => n.getClientRects().length);
  dispatchEvent(new Event("beforeprint"));
  const text = document.body.innerText;
  parent.postMessage({charts, wide, inner: innerWidth, numbers, text}, "*");
}, 1500));
</script>"""
"""Says where the texts of charts are, and what a print of the page says; only tests add it."""
ACT = """<script>
addEventListener("load", () => setTimeout(async () => {
  const soon = () => new Promise(resolve => setTimeout(resolve, 500));
  const charts = () => [...document.querySelectorAll("svg.marks")];
  const at = part => {
    const {left, top, width, height} = part.getBoundingClientRect();
    return {bubbles: true, cancelable: true, clientX: left + width / 2, clientY: top + height / 2};
  };
  const point = charts()[0].querySelector(".mark-symbol.role-mark path");
  point.dispatchEvent(new PointerEvent("pointermove", at(point)));
  await soon();
  const hover = document.querySelector("#vg-tooltip-element").innerText;
  const axes = () => [...charts()[0].querySelectorAll(".role-axis")]
    .map(axis => axis.textContent).filter(text => text);
  const before = axes();
  const plot = charts()[0].querySelector(".background");
  plot.dispatchEvent(new WheelEvent("wheel", {...at(plot), deltaY: -900, ctrlKey: true}));
  await soon();
  const after = axes();
  const choice = document.querySelector("select");
  choice.value = 16;
  choice.dispatchEvent(new Event("change", {bubbles: true}));
  await soon();
  const titles = charts().map(svg => svg.querySelector(".role-title")?.textContent ?? "");
  const curves = titles.find(title => title.startsWith("the first"));
  parent.postMessage({hover, before, after, curves}, "*");
}, 1500));
</script>"""
"""Hovers over a point, zooms into a figure, and chooses a number of tokens."""
AROUND = """<body style="margin: 0"><iframe src="measured.html" width="{width}" height="{height}"
style="border: 0"></iframe><script>
addEventListener("message", event => {{
  document.body.innerHTML = "";
  document.body.append(JSON.stringify(event.data));
}});
</script></body>"""
"""A page around the report, because a window of Chromium is never as narrow as a phone."""
TAUS = ("1", "0.95", "0.875", "0.8", "0.6")


def run_report(*words: str | Path, code: str = "", cwd: Path = ROOT) -> str:
    """Run the script, after some code of Python; return what it printed."""
    script = ROOT / "analysis" / "report.py"
    start = [str(script)]
    if code:
        run = f"{code}; import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        path = f"import sys; sys.path.insert(0, {str(script.parent)!r})"
        start = ["-c", f"{path}; {run}"]
    finished = subprocess.run(
        [sys.executable, *start, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A report that was written."""

    printed: str
    page: Path

    @property
    def html(self) -> str:
        return self.page.read_text()

    @property
    def spaced(self) -> str:
        """The page with plain spaces."""
        return self.html.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def body(self) -> str:
        """The page without the library that draws its charts."""
        return self.html.split("<script>")[0]

    @property
    def sentences(self) -> list[str]:
        unbroken = re.sub('<span class="number">(.*?)</span>', r"\1", self.body)
        found = re.findall(r"<(?:p|li|h\d|dd|td|summary)(?: [^>]*)?>([^<]+)</", unbroken)
        return [squeezed(unescape(sentence)) for sentence in found]

    @property
    def headings(self) -> list[str]:
        return re.findall("<h2>(.*?)</h2>", self.body)

    @property
    def specs(self) -> list[dict[str, Any]]:
        """What the charts draw."""
        found = re.findall(r'<script type="application/json">(.*?)</script>', self.html)
        return [json.loads(spec) for spec in found]

    @property
    def axis_titles(self) -> list[str]:
        found = [title for spec in self.specs for title in _titles(spec["layer"])]
        assert len(found) >= 2 * len(self.specs) > 0
        return found

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.page.parent / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))


def _titles(part: Any) -> Iterator[str]:
    if isinstance(part, list):
        for item in part:
            yield from _titles(item)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in {"x", "y"} and isinstance(value, dict) and value.get("title"):
                yield value["title"]
            yield from _titles(value)


def reported(printed: str) -> Reported:
    return Reported(printed=printed, page=Path(printed.splitlines()[-1]))


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def one_seed(
    extended_run: tuple[Path, set[str]], tmp_path_factory: pytest.TempPathFactory
) -> Reported:
    """Return the report of a run of one seed with all scores that there are."""
    run = shutil.copytree(extended_run[0], tmp_path_factory.mktemp("report") / "tiny")
    return reported(run_report(run))


@pytest.fixture(scope="module")
def four_seeds(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """Return the report of made-up results of four seeds, with many points close together."""
    folder = tmp_path_factory.mktemp("seeds")
    return reported(run_report(made_up(folder / "results.h5")))


def made_up(path: Path, shift: float = 0.0) -> Path:
    precision = {"direct": -3.0, "1": -2.98, "0.95": -2.9, "0.875": -2.7, "0.8": -2.5, "0.6": -2.0}
    recall = {"direct": -2.5, "1": -2.5, "0.95": -2.5, "0.875": -2.52, "0.8": -2.6, "0.6": -2.9}
    decode = {
        "direct": {
            1.25: (-3.6, -2.61),
            0.9: (-2.75, -2.51),
            0.8: (-2.51, -2.58),
            0.6: (-2.0, -2.8),
        },
        "1": {1.25: (-3.5, -2.6), 0.9: (-2.76, -2.52), 0.8: (-2.53, -2.59), 0.6: (-2.05, -2.84)},
    }
    moved = {label: value + shift for label, value in recall.items()}
    return results_of(path, precision, moved, decode=decode)


@dataclass(frozen=True, kw_only=True)
class Browser:
    """Chromium without a window."""

    folder: Path

    def _start(self, *words: str) -> str:
        finished = subprocess.run(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={self.folder / 'profile'}", "--virtual-time-budget=5000", *words,
            ],
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip
        return finished.stdout

    def look(self, page: Path, size: tuple[int, int], script: str) -> dict[str, Any]:
        """Return what a script in the page says about it, in a frame of some size."""
        before, end, after = page.read_text().rpartition("</body>")
        (self.folder / "measured.html").write_text(before + script + end + after)
        around = self.folder / "around.html"
        around.write_text(AROUND.format(width=size[0], height=size[1]))
        dom = self._start("--window-size=1400,900", "--dump-dom", around.as_uri())
        [body] = re.findall(r"<body[^>]*>(\{.*\})\s*</body>", dom, re.DOTALL)
        measured: dict[str, Any] = json.loads(unescape(body))
        return measured

    def picture(self, page: Path, size: tuple[int, int]) -> Any:
        """Return the pixels of the page, as an array [height, width, 4]."""
        shot = self.folder / "shot.png"
        window = f"--window-size={size[0]},{size[1]}"
        self._start(window, f"--screenshot={shot}", page.as_uri())
        return plt.imread(shot)


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    need(BROWSER != "", "a browser is needed (apt-get install chromium)")
    return Browser(folder=tmp_path)


def overlapping(labels: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (a["text"], b["text"])
        for a, b in combinations(labels, 2)
        if a["left"] < b["right"] - 1 and b["left"] < a["right"] - 1
        and a["top"] < b["bottom"] - 2 and b["top"] < a["bottom"] - 2
    ]  # fmt: skip


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("name", ["one_seed", "four_seeds"])
def test_a_browser_shows_every_sentence_and_axis_and_no_label_lies_on_another(
    name: str, size: tuple[int, int], browser: Browser, request: pytest.FixtureRequest
) -> None:
    report: Reported = request.getfixturevalue(name)
    measured = browser.look(report.page, size, MEASURE)
    assert measured["inner"] == size[0]
    assert measured["wide"] <= measured["inner"]
    text = squeezed(measured["text"])
    missing = [s for s in report.sentences if s not in text]
    assert not missing
    assert len(report.sentences) > 40
    shown = [title for chart in measured["charts"] for title in chart["texts"]]
    assert set(report.axis_titles) <= set(shown)
    shown_numbers = [num_lines for num_lines in measured["numbers"] if num_lines]
    assert len(shown_numbers) > 20
    assert set(shown_numbers) == {1}
    assert len(measured["charts"]) == report.html.count('<div class="chart">')
    for chart in measured["charts"]:
        assert overlapping(chart["labels"]) == []
        assert all(label["right"] <= chart["right"] + 1 for label in chart["labels"])
        assert chart["right"] <= size[0]
    points = {label["text"] for label in measured["charts"][0]["labels"]}
    assert {"direct", "truth: E log p*", "tau 1", "tau 0.6"} <= points
    assert any(re.match("truth$|recall \N{MINUS SIGN}[0-9.]+$", label) for label in points)


def test_points_can_be_hovered_axes_zoomed_and_prefixes_chosen(
    one_seed: Reported, browser: Browser
) -> None:
    done = browser.look(one_seed.page, LAPTOP, ACT)
    assert "recall high" in done["hover"]
    assert len(done["before"]) == len(done["after"]) == 2
    assert all(a != b for a, b in zip(done["before"], done["after"], strict=True))
    assert done["curves"] == "the first 16 tokens"


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_a_screenshot_is_not_blank(
    size: tuple[int, int], four_seeds: Reported, browser: Browser
) -> None:
    pixels = browser.picture(four_seeds.page, size)
    assert pixels.shape[:2] == size[::-1]
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.5).mean() < 0.5


def test_the_page_is_small_and_loads_nothing(one_seed: Reported) -> None:
    html = one_seed.html
    assert len(html.encode()) < MAX_BYTES
    links = re.findall(
        r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", html.split("<script>")[0]
    )
    assert len(links) >= 7 * 4
    assert not [link for link in links if not (one_seed.page.parent / link).stat().st_size]
    assert "<link" not in html
    assert '"$schema"' not in html
    assert "default-src 'none'" in html  # a browser refuses whatever else the page would load


def test_one_seed_says_so_and_decides_nothing(one_seed: Reported) -> None:
    first, *lines = one_seed.printed.splitlines()
    assert first.startswith("tiny: one training: sampling error only")
    assert max(map(len, lines[:-1])) <= 100
    assert "holds" not in {line.split()[0] for line in lines if line.strip()}
    assert squeezed("precision rises with every step to a lower tau") in one_seed.printed
    words = one_seed.html.split("<h2>Figures")[0]
    assert "one training: sampling error only" in words
    assert 'class="decision undecided"' in words
    assert 'class="decision holds"' not in words


def test_parts_are_in_order_and_say_how_the_run_was_made(one_seed: Reported) -> None:
    expected = ["What this page says", "Verdicts", "Figures", "Tables", "Texts", "The run"]
    expected += ["What differs from the paper", "Appendix: diversity of samples"]
    assert one_seed.headings == expected
    results = read_results(one_seed.page.with_name("results.h5"))
    sentences = one_seed.sentences
    assert json.loads(results.provenance["code"])[0] in sentences
    assert "7-score" in sentences
    assert sum("in the released code" in sentence for sentence in sentences) >= 3
    [differs] = re.findall("alpha, from the students.*?at most ([0-9.]+) standard", one_seed.html)
    assert 0.0 < float(differs) < 5.0


def test_texts_are_those_of_the_evaluation_sets(one_seed: Reported) -> None:
    [caption] = [s for s in one_seed.sentences if s.startswith("The first 4 sequences")]
    for said in ("students of seed 0;", "600 characters", "\N{REPLACEMENT CHARACTER}"):
        assert said in caption
    run = one_seed.page.parents[1]
    record = json.loads((run / "1-truth" / "truth" / "00000.json").read_text())
    tokenizer = Tokenizer(run / "1-truth" / "truth" / record["data"])
    for arm in ("2-sample-truth/eval", "6-sample-students/student-s0-small-tau0.6"):
        samples = read_samples(sorted((run / arm).glob("*.arrow"))[:1])
        text = tokenizer.decode(samples.ids[0, : samples.length[0]].tolist())
        plain = re.sub(r"[^ -~]", "", text)
        shown = [re.sub(r"[^ -~]", "", unescape(t)) for t in re.findall("<pre>(.*?)</pre>",
                 one_seed.html, re.DOTALL)]  # fmt: skip
        assert plain in shown


def test_numbers_beside_the_figures_are_those_of_the_scores(one_seed: Reported) -> None:
    scores = read_results(one_seed.page.with_name("results.h5")).scores

    def mean(sampler: str, scorer: str) -> float:
        pair = scores[sampler, scorer]
        return float(pair.log_prob_sum.sum() / pair.num_tokens.sum())

    rows = {(r["series"], r["label"]): r for r in one_seed.rows("report-precision-recall")}
    rows |= {(r["series"], r["label"]): r for r in one_seed.rows("report-teacher")}
    for place, sampler, scorer in (
        (("teacher, along tau", "tau 0.6"), "teacher-s0-tau0.6", "teacher-s0-T0.6"),
        (("distilled, along tau", "tau 0.6"), *("student-s0-small-tau0.6",) * 2),
        (("direct, along T", "T 0.7"), *("student-s0-small-direct-T0.7",) * 2),
        (("tau 1, along T", "T 1.3"), *("student-s0-small-tau1-T1.3",) * 2),
    ):
        assert float(rows[place]["precision"]) == pytest.approx(mean(sampler, "truth"))
        assert float(rows[place]["recall"]) == pytest.approx(mean("truth", scorer))
        assert float(rows[place]["recall_low"]) < float(rows[place]["recall"])
    parts = {(r["student"], r["part"]): float(r["estimate"]) for r in one_seed.rows("report-parts")}
    total, entropy, divergence = (
        parts["tau 0.6", part] for part in ("-precision", "entropy H(p'')", "KL(p''||p*)")
    )
    assert total == pytest.approx(entropy + divergence)
    best = [r for r in one_seed.rows("report-best-temperature") if r["best"]]
    assert [row["student"] for row in best] == ["direct", "tau 1", "tau 0.6"]
    curves = one_seed.rows("report-curves")
    assert {row["k"] for row in curves} == {"1", "2", "4", "8", "16"}
    assert all(0.0 <= float(row[name]) <= 1.0 for row in curves for name in ("alpha", "beta"))


def test_a_figure_whose_scores_are_missing_says_what_it_needs(four_seeds: Reported) -> None:
    needs = [s for s in four_seeds.sentences if s.startswith("Not drawn: it needs")]
    assert len(needs) == 4
    assert needs[0].startswith("Not drawn: it needs scores of the teacher: launch/sweep.py")
    assert needs[1].startswith("Not drawn: it needs scoring.expected=true, which launch/sweep.py")
    assert set(needs[2:]) == {
        "Not drawn: it needs per-token scores: a new run with scoring.per_token=true."
    }
    assert not (four_seeds.page.parent / "report-curves.csv").exists()
    assert "Texts" not in four_seeds.headings
    assert 'class="decision holds"' in four_seeds.html
    assert four_seeds.printed.startswith("results.h5: given p* and D; 4 seeds")


def test_several_runs_are_compared(tmp_path: Path, four_seeds: Reported) -> None:
    other = made_up(tmp_path / "other.h5", shift=-0.3)
    results = four_seeds.page.with_name("results.h5")
    report = reported(run_report(results, other, "--out", tmp_path / "out"))
    assert report.page == tmp_path / "out" / "report-compared.html"
    head = re.findall("<th>(.*?)</th>", report.html)
    assert head[:3] == ["claim", "results.h5", "other.h5"]
    rows = report.rows("report-compared-precision-recall")
    recall = {(r["run"], r["label"]): float(r["recall"]) for r in rows if r["recall"]}
    for label in ("direct", "tau 0.6"):
        change = recall["other.h5", label] - recall["results.h5", label]
        assert change == pytest.approx(-0.3, abs=0.1)
    assert four_seeds.page.with_name("report.html").exists()


def test_without_its_packages_the_verdicts_are_printed_and_what_to_install(tmp_path: Path) -> None:
    path = made_up(tmp_path / "results.h5")
    printed = run_report(path, code="sys.modules['altair'] = sys.modules['vl_convert'] = None")
    assert "holds" in printed
    assert "pip install 'kdhpc[report]'" in printed.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def labels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield importlib.import_module("report_labels")


@pytest.fixture(scope="module")
def report_run() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield importlib.import_module("report_run")


share = st.floats(0.0, 1.0)


@settings(deadline=None, max_examples=50)
@given(points=st.lists(st.tuples(share, share), min_size=1, max_size=20))
def test_a_label_has_a_free_place_at_every_width_or_none(
    labels: ModuleType, points: list[tuple[float, float]]
) -> None:
    plots = [labels.Plot(width=width, height=300) for width in (250, 900)]
    texts = [f"tau 0.{index}" for index in range(len(points))]
    places = labels.place_labels(points, texts, [], plots)
    assert any(places)
    for plot in plots:
        placed = zip(points, texts, places, strict=True)
        boxes = [plot.box(point, text, place) for point, text, place in placed if place]
        assert not any(a.meets(b) for a, b in combinations(boxes, 2))
        assert not any(box.holds(plot.pixels(point)) for box in boxes for point in points)
        assert all(plot.contains(box) for box in boxes)


def test_the_introduction_says_what_the_words_mean_and_what_the_run_is(
    one_seed: Reported, four_seeds: Reported
) -> None:
    words = squeezed(unescape(one_seed.body.split("<h2>Verdicts")[0]))
    for word in ("Truth p*", "teacher p'", "student p''", "Precision is", "Recall is", "nats"):
        assert word in words
    for fact in ("arXiv 2505.13111", "a small Llama over bytes", "toy run", "Parameters: truth"):
        assert fact in words
    assert "They do not cover another p*" in words
    assert "toy run" not in four_seeds.body  # its results do not say how they were made


@pytest.mark.parametrize("name", ["one_seed", "four_seeds"])
def test_signs_percentages_and_taus_are_written_in_one_way(
    name: str, request: pytest.FixtureRequest
) -> None:
    report: Reported = request.getfixturevalue(name)
    prose = re.sub(
        r"<(pre|figcaption|dl|style|head|script)\b.*?</\1>", "", report.body, flags=re.DOTALL
    )
    text = unescape(re.sub("<[^>]*>", "\n", prose))
    assert not re.findall(r"\b(?:tau|T) \d", text)
    assert "\N{MINUS SIGN}" in text
    assert not re.findall(r"(?<![\w.)])-\d| - |-precision", text)
    assert not re.findall(r"\d%|\d %", text)
    assert "\N{NO-BREAK SPACE}%" in text
    assert not re.findall(r"\N{GREEK SMALL LETTER TAU}|tau-\d|tau\d", text)


def test_a_student_has_one_look_in_all_figures(four_seeds: Reported, one_seed: Reported) -> None:
    for report in (four_seeds, one_seed):
        looks: dict[str, set[str]] = {}
        for spec in report.specs:
            for channel, scale in _scales(spec["layer"]):
                for student, look in zip(scale["domain"], scale["range"], strict=True):
                    looks.setdefault(f"{channel} of {student}", set()).add(str(look))
        assert len(looks) > 12
        assert {look: found for look, found in looks.items() if len(found) > 1} == {}
    assert len({str(looks[f"color of {name}"]) for name in ("direct", "tau 1", "tau 0.6")}) == 3


def _scales(part: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(part, list):
        for item in part:
            yield from _scales(item)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in {"color", "shape", "strokeDash"} and "scale" in (value or {}):
                yield name, value["scale"]
            yield from _scales(value)


def test_a_point_is_drawn_once_and_truth_is_marked(four_seeds: Reported) -> None:
    rows = four_seeds.rows("report-precision-recall")
    drawn = [(r["precision"], r["recall"]) for r in rows if r["label"] and r["recall"]]
    assert len(set(drawn)) == len(drawn) == 15
    [truth] = [row for row in rows if row["series"] == "truth itself"]
    assert truth["precision"] == truth["recall"]


def test_temperatures_on_an_axis_have_all_their_digits(
    four_seeds: Reported, browser: Browser
) -> None:
    measured = browser.look(four_seeds.page, LAPTOP, MEASURE)
    assert "1.25" in measured["charts"][-1]["texts"]


def test_contrasts_are_shown_once_with_each_step_of_tau(four_seeds: Reported) -> None:
    [table] = re.findall("Change against another student.*?</table>", four_seeds.spaced, re.DOTALL)
    pairs = re.findall("<tr><td>(.*?)</td><td>(.*?)</td>", table)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 5 + 4 + 3
    assert {("tau 1", "direct"), ("tau 0.95", "tau 1"), ("tau 0.6", "tau 0.8")} <= set(pairs)
    assert "Detectable is the smallest change" in table


def test_the_length_of_texts_is_beside_nats_per_sequence(one_seed: Reported) -> None:
    scores = read_results(one_seed.page.with_name("results.h5")).scores
    [table] = re.findall("<h3>Nats per sequence.*?</table>", one_seed.spaced, re.DOTALL)
    shown = dict(re.findall(r'<tr><td>([^<]*)</td><td><span class="number">([\d.]+) \[', table))
    for name, sampler in (("truth", "truth"), ("tau 0.6", "student-s0-small-tau0.6")):
        tokens = scores[sampler, "self"].num_tokens
        assert float(shown[name]) == pytest.approx(tokens.mean(), abs=0.001)


def test_several_versions_of_the_code_are_said(tmp_path: Path, report_run: ModuleType) -> None:
    results = read_results(made_up(tmp_path / "results.h5"))
    for code, said in (('["a1", "b2"]', True), ('["a1"]', False)):
        given = replace(results, provenance={"code": code})
        study = importlib.import_module("study").Study(given)
        facts = dict(report_run.provenance(study, report_run.RunFacts(config=None, records={})))
        assert facts["code"].startswith("a1")
        assert ("different versions of the code" in facts["code"]) == said


def test_curves_that_are_checked_nowhere_say_so(report_run: ModuleType) -> None:
    rows = importlib.import_module("report_rows")
    assert rows._check([]).startswith("Not checked:")
    assert "at most 1.2 standard errors" in rows._check([0.3, 1.2])


def test_a_report_of_pooled_runs_says_what_its_intervals_are_over(tmp_path: Path) -> None:
    folder = ROOT / "docs" / "results" / "smollm2"
    options = argparse.Namespace(run=[str(folder)], out=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        [read] = importlib.import_module("report").read_all(options)
    assert read.name == "smollm2"
    assert "2 different sets of D and truth's samples" in read.given
    assert read.analysis.out == tmp_path
