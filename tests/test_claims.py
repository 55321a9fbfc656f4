"""Claims are tested as they were fixed, on the pooled seeds of one experiment."""

import functools
import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ROOT, launch
from test_verdicts import PRECISION, results_of

from kdhpc.cluster import runs
from kdhpc.errors import InputError
from kdhpc.science.intervals import over_seeds
from kdhpc.storage.results import ScorePieces, read_results, write_results

CLAIMS = (ROOT / "tests" / "data" / "claims.yaml").read_text()
RECALL = {"direct": -2.5, "1": -2.5, "0.8": -2.8, "0.6": -2.9}
Run = Callable[[Path], str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the script on a folder and returns what it prints."""
    monkeypatch.syspath_prepend(ROOT / "analysis")
    script = importlib.import_module("claims")

    def on(folder: Path) -> str:
        assert script.main([str(folder)]) == 0
        return capsys.readouterr().out

    return on


def folder_of(path: Path, claims: str = CLAIMS, *, recorded: str | None = None) -> Path:
    """Make a folder with claims and the scores of four seeds in one file."""
    path.mkdir()
    (path / "claims.yaml").write_text(claims)
    decode = {"direct": {0.8: (-2.6, -2.6), 0.6: (-2.1, -2.9)}}
    made = results_of(path / "made.h5", PRECISION, RECALL, decode=decode)
    digest = hashlib.sha256(claims.encode()).hexdigest() if recorded is None else recorded
    rewrite(made, path / "scores-all.h5", {"config": f"claims_fingerprint: '{digest}'"})
    made.unlink()
    return path


def rewrite(old: Path, new: Path, provenance: Mapping[str, str], seeds: str = "0123") -> None:
    """Copy the seeds of a file of results into another."""
    results = read_results(old)
    models = {n: f for n, f in results.models.items() if str(f["seed"]) in seeds}
    others = {n for n in results.models if n not in models}
    parts = [
        ScorePieces(
            sampler=sampler, scorer=scorer, num_rows=len(scores.num_tokens),
            pieces=[*scores.arrays().items()],
        )
        for (sampler, scorer), scores in results.scores.items()
        if not any(name.startswith(tuple(others)) for name in (sampler, scorer))
    ]  # fmt: skip
    write_results(new, recipe="r", provenance=provenance, scores=parts, models=models)


def test_each_claim_is_decided(tmp_path: Path, run: Run) -> None:
    said = " ".join(run(folder_of(tmp_path / "all")).split())
    for decision, name in (
        ("holds", "precision-steps"),
        ("fails", "recall-rises"),
        ("holds", "same-recall"),
        ("holds", "control"),
    ):
        before, _, _ = said.partition(f"{name}:")
        assert before.split()[-2] == decision, name
    assert "4 claims, 4 seeds" in said
    assert "precision of 0.6 against 0.8: +0." in said


def test_seeds_of_several_files_are_pooled(tmp_path: Path, run: Run) -> None:
    whole = folder_of(tmp_path / "all")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    provenance = read_results(whole / "scores-all.h5").provenance
    (cut / "scores-all.h5").unlink()
    for name, seeds in (("a", "02"), ("b", "13")):
        rewrite(whole / "scores-all.h5", cut / f"scores-{name}.h5", provenance, seeds)
    assert run(cut) == run(whole)
    rewrite(whole / "scores-all.h5", cut / "scores-c.h5", provenance, "1")
    with pytest.raises(InputError, match="expected each seed once"):
        run(cut)
    other = results_of(tmp_path / "other.h5", PRECISION, RECALL, seeds=1, seed_error=0.1)
    rewrite(other, cut / "scores-c.h5", provenance, "0")
    (cut / "scores-a.h5").unlink()
    assert "3 seeds" in run(cut)  # truth's samples are the same there


def test_a_claim_without_a_value_counts_among_those_that_are_corrected_for(
    tmp_path: Path, run: Run
) -> None:
    claims = importlib.import_module("claims")
    folder = folder_of(tmp_path / "all")
    study = claims.Study(read_results(folder / "scores-all.h5"))
    [same] = [c for c in claims.read_claims(folder / "claims.yaml") if c.name == "same-recall"]
    [term] = same.terms
    unknown = replace(same, terms=(replace(term, of="0.7"),))
    none = replace(same, terms=(replace(term, measure="divergence-beyond-share", of="0.7"),))
    outcomes = [claims.evaluate(study, claim, "small") for claim in (same, unknown, none)]
    assert [outcome.p_value == 1.0 for outcome in outcomes] == [False, True, True]
    _, corrected, _ = (list(column.cells) for column in claims.table(outcomes, 4).columns)
    assert corrected[0] == f"{3 * outcomes[0].p_value:.4f}"


def test_a_tau_may_be_a_number(tmp_path: Path, run: Run) -> None:
    claims = importlib.import_module("claims")
    numbers, texts = tmp_path / "numbers.yaml", tmp_path / "texts.yaml"
    texts.write_text(CLAIMS)
    numbers.write_text(CLAIMS.replace('"0.8"', "0.80").replace('"1"', "1.0"))
    assert numbers.read_bytes() != texts.read_bytes()
    assert claims.read_claims(numbers) == claims.read_claims(texts)


def test_what_is_missing_is_said_and_never_a_traceback(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "all")
    results = read_results(folder / "scores-all.h5")
    bad = "student-s2-small-tau0.6"
    parts = [
        ScorePieces(
            sampler=sampler, scorer=scorer, num_rows=len(scores.num_tokens),
            pieces=[*scores.arrays().items()],
        )
        for (sampler, scorer), scores in results.scores.items()
        if bad not in (sampler, scorer)
    ]  # fmt: skip
    write = functools.partial(
        write_results, folder / "scores-all.h5", recipe="r", provenance=results.provenance,
        models=results.models, complete=False,
    )  # fmt: skip
    claims = importlib.import_module("claims")
    (folder / "scores-all.h5").unlink()
    write(scores=parts)
    assert claims.main([str(folder)]) == 0
    printed = capsys.readouterr()
    assert "some planned shards are missing" in printed.err
    said = " ".join(printed.out.split())
    assert "1 of 16 trained students are left out" in said
    assert "3 of 4 seeds; detectable" in said
    for kept, message in (("student", "lacks truth's own scores"), ("truth", "no student has")):
        some = [p for p in parts if p.sampler.startswith(kept)]
        write(scores=some)
        with pytest.raises(InputError, match=message):
            run(folder)


def test_runs_with_other_samples_of_truth_are_pooled_as_replicates(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each seed keeps its own recall; what is true of truth's samples is over both sets."""
    folder = folder_of(tmp_path / "all")
    whole = read_results(folder / "scores-all.h5")
    config = {"config": whole.provenance["config"]}
    parts = []
    for (sampler, scorer), scores in whole.scores.items():
        arrays = scores.arrays()
        if sampler == "truth":
            arrays = {name: array[-350:] for name, array in arrays.items()}
        if (sampler, scorer) == ("truth", "self"):
            arrays["log_prob_sum"] = arrays["log_prob_sum"] * 0.9
        parts.append(
            ScorePieces(
                sampler=sampler, scorer=scorer, num_rows=len(arrays["num_tokens"]),
                pieces=[*arrays.items()],
            )
        )  # fmt: skip
    other = tmp_path / "other.h5"
    write_results(other, recipe="r", provenance=config, scores=parts, models=whole.models)
    rewrite(folder / "scores-all.h5", folder / "scores-a.h5", config, "01")
    rewrite(other, folder / "scores-b.h5", config, "23")
    (folder / "scores-all.h5").unlink()
    assert "2 different sets of D and truth's samples" in run(folder)
    claims = importlib.import_module("claims")
    _, study = claims.read(folder)
    alone = [
        importlib.import_module("study").Study(read_results(folder / f"scores-{name}.h5"))
        for name in "ab"
    ]
    for part, seeds in zip(alone, ((0, 1), (2, 3)), strict=True):
        for seed in seeds:
            ours, theirs = (s.of("small", "0.6")[seed] for s in (study, part))
            pooled, own = study.recall(ours), part.recall(theirs)
            assert pooled.value == pytest.approx(own.value)
            one, two = over_seeds([pooled]), over_seeds([own])
            assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=1e-3)
            assert study.precision(ours).value == part.precision(theirs).value
            for per_sequence in (False, True):
                missed = [
                    of.missed(student, per_sequence=per_sequence)
                    for of, student in ((study, ours), (part, theirs))
                ]
                assert missed[0].value == pytest.approx(missed[1].value)
                one, two = over_seeds([missed[0]]), over_seeds([missed[1]])
                assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=1e-3)
    assert not study.has_fifths
    # Seeds of different runs share no sequence of truth, so nothing is shared in their errors.
    mean = over_seeds([study.recall(study.of("small", "0.6")[seed]) for seed in (1, 2)])
    assert mean.covariance == pytest.approx(0.0, abs=1e-12)
    truths = [part.truth_log_prob().value for part in alone]
    assert min(truths) < study.truth_log_prob().value < max(truths)


@pytest.mark.parametrize(
    ("field", "other_field", "pooled"),
    [
        ("eos: learn", "eos: mask", False),
        ("sampling: {train_sequences: 4}", "sampling: {train_sequences: 8}", False),
        ("students: {a: {training: {epochs: 1}}}", "students: {a: {training: {epochs: 2}}}", False),
        ("teacher: {model: /here}", "teacher: {model: /there, added: 1}", True),
        ("taus: [1.0]", "taus: [1.0, 0.6]", True),
    ],
)
def test_seeds_of_another_experiment_are_not_pooled(
    field: str, other_field: str, pooled: bool, tmp_path: Path, run: Run
) -> None:
    folder = folder_of(tmp_path / "all")
    whole = folder / "scores-all.h5"
    config = read_results(whole).provenance["config"]
    for name, added, seeds in (("a", field, "02"), ("b", other_field, "13")):
        rewrite(whole, folder / f"scores-{name}.h5", {"config": f"{config}\n{added}"}, seeds)
    whole.unlink()
    if pooled:
        assert "4 claims, 4 seeds" in run(folder)
        return
    with pytest.raises(InputError, match="differs between files; expected seeds of one experiment"):
        run(folder)


def test_claims_that_were_changed_afterwards_are_refused(tmp_path: Path, run: Run) -> None:
    folder = folder_of(tmp_path / "all")
    (folder / "claims.yaml").write_text(CLAIMS.replace("margin: 0.1", "margin: 0.5"))
    with pytest.raises(InputError, match="expected the same file"):
        run(folder)
    with pytest.raises(InputError, match="of no file"):
        run(folder_of(tmp_path / "none", recorded=""))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "claims: 3",
        "claims: [",
        "claims: []",
        "claims: [{name: a, says: b, test: less, terms: [3]}]",
        CLAIMS.replace("name: control", "name: same-recall"),
        CLAIMS.replace("test: within", "test: near"),
        CLAIMS.replace("says:", "x:"),
        CLAIMS.replace("margin:", "margn:"),
        CLAIMS.replace("margin: 0.1", "margin: -0.1"),
        CLAIMS.replace("margin: 0.1", "margin: .nan"),
    ],
)
def test_a_file_that_is_no_claims_is_refused(text: str, tmp_path: Path, run: Run) -> None:
    with pytest.raises(InputError, match="not a file of claims"):
        run(folder_of(tmp_path / "all", text))


def test_a_run_records_its_claims_and_its_archive_has_all_but_tokens(
    extended_run: tuple[Path, set[str]], tmp_path: Path, run: Run
) -> None:
    shutil.copy(ROOT / "tests" / "data" / "tiny-claims.yaml", tmp_path / "claims.yaml")
    path = extended_run[0]
    archive = importlib.import_module("archive")
    assert archive.main([str(path), str(tmp_path / "scores-0.h5")]) == 0
    whole = read_results(path / "8-merge" / "results.h5")
    slim = read_results(tmp_path / "scores-0.h5")
    kept = (tmp_path / "scores-0.h5").read_bytes()
    for there in ("scores-0.h5", "."):
        with pytest.raises(InputError, match="exists already"):
            archive.main([str(tmp_path / "scores-0.h5"), str(tmp_path / there)])
    assert (tmp_path / "scores-0.h5").read_bytes() == kept
    for pair, scores in slim.scores.items():
        dropped = {"token_log_prob", "end_log_prob"}  # end tokens count in the sums of this run
        assert scores.arrays().keys() == whole.scores[pair].arrays().keys() - dropped
        error = abs(scores.log_prob_sum - whole.scores[pair].log_prob_sum).max()
        assert error <= 0.5 / 32
    assert slim.models == whole.models
    stages = json.loads(slim.provenance["seconds_by_stage"])
    assert all(stages[stage] > 0.0 for stage in ("truth", "sample-truth", "score"))
    assert json.loads(slim.provenance["seconds_reused"]) == {}
    said = run(tmp_path)
    assert said.count("1 claims, 1 seeds") == 2  # of each size, and those that name sizes
    assert "one training: sampling error only" in said
    assert "detectable" not in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('of: "0.6"', 'of: "0.7"', "no students called 0.7; expected one of 0.6, 1, direct"),
        ("size: small", "size: big", "no size big; expected one of small, or teacher"),
        ("size: teacher", "size: big", "no size big"),
        (
            "measure: precision",
            "measure: recal",
            "mass-by-weight, pass@1, or rouge@1",
        ),
        ("measure: recall", "measure: divergence", "of teachers, expected precision or recall"),
        ("minus: {size: teacher}", "minus: {measure: recall}", "subtracts itself"),
        ("minus: {size: teacher}", "minus: teacher", "minus: expected what differs"),
        ("size: teacher", "sise: teacher", "unknown field sise"),
        ("measure: precision, ", "", "measure is missing"),
        ("precision, of", "held-out-recall, of", "expected a size of students, and two taus"),
        ("claims:", "alpha: 0.1\nclaims:", "expected one key, claims"),
        ('of: "0.6"', "of: [1]", "expected a name or a tau"),
    ],
)
def test_claims_that_the_run_cannot_answer_are_refused_before_it_starts(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    claims = tmp_path / "claims.yaml"
    text = (ROOT / "tests" / "data" / "tiny-claims.yaml").read_text()
    assert old in text
    claims.write_text(text.replace(old, new))
    pipeline, config = runs.from_words(["tiny", f"claims={claims}"])
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        pipeline.prepare(config)
    assert "\n" not in str(refused.value)


def test_a_file_of_claims_that_is_not_there_is_refused(tmp_path: Path) -> None:
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", f"claims={tmp_path}/none.yaml"]
    refused = launch("sweep", *words, code=2)
    assert "none.yaml: not readable" in refused.stderr
    assert refused.stderr.count("\n") == 1
