#!/usr/bin/env python
"""Test claims that were fixed before a run was scored.

    python analysis/claims.py FOLDER

FOLDER has claims.yaml and one or more files scores-*.h5.xz as `analysis/archive.py` writes them, of
one run or of runs with other seeds of the same experiment (`first_seed`). The seeds are pooled; the
table says so if D and truth's samples are not the same in each, as on machines of several kinds.
The sha256 of claims.yaml must be the one that each run recorded when it was submitted (`claims`).

A claim has one or more terms, each a mean over seeds (kdhpc/experiment/claims.py says what they
are), and a test: all terms are `greater` or `less` than a margin in nats a token, or `within` it of
0. Its p-value is the largest of its terms', and 1 if a term has no value. Claims whose terms name
sizes of students are one family; the others are tested for each size, which is a family of its own,
and Holm's method corrects for the number of claims of a family. A claim holds if the corrected
p-value is at most 0.05. It fails if the 95 % interval of a term contradicts it, and is undecided
otherwise. With one seed nothing is decided.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files
import judges
import numpy as np
from claim_terms import tested
from rich.console import Console
from rich.table import Table
from study import SECOND, SELF, TRUTH, Study
from verdicts import Decision, detectable, text

from kdhpc.cluster.display import WIDTH, command
from kdhpc.config import presets
from kdhpc.errors import InputError
from kdhpc.experiment.arms import SAMPLE_TRUTH
from kdhpc.experiment.claims import BEST_OF, BY_MODE, Claim, read_claims
from kdhpc.science.intervals import SeedMean, equivalence_p_value, holm
from kdhpc.science.modes import Slope
from kdhpc.storage.results import Results
from kdhpc.storage.score_shards import Scores
from kdhpc.types import Json

CLAIMS = "claims.yaml"
ALPHA = 0.05
ONE_TRAINING = "one training: sampling error only"
SHARED = (
    "seed", "prompt", "prompts_fingerprint", "held_out_prompts", "begin", "length", "eos",
    "teacher", "students",
)  # fmt: skip
"""Fields of the config that runs must share to be pooled, besides the size of D."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the scores say about a claim."""

    claim: Claim
    means: tuple[SeedMean | Slope, ...]
    """One for each term; empty if a term has no value in some seed."""
    p_value: float
    """Not corrected; 1 without means."""


def pool(parts: Sequence[Results]) -> Results:
    """Return the results of runs with other seeds, as those of one run.

    Truth's samples are usually the same in each. If they differ, as on another kind of machine,
    each run is a replicate with a D and an evaluation set of its own: the sets are put one after
    the other, and a model's scores have no tokens in those of other runs. So they say nothing
    there, and means over seeds are over D and truth's samples too (`Study.num_sets`).

    Raises:
        InputError: if truth's samples are missing, models or the components of p* were trained
            differently, two runs have one seed, or truth's samples differ and are made from several
            prompts.
    """
    if any((TRUTH, SELF) not in part.scores for part in parts):
        raise InputError("a file lacks truth's own scores; expected files of finished runs")
    sets = _sets_of_truth(parts)
    if len(sets) > 1:
        configs = (presets.from_yaml(part.provenance.get("config", "")) for part in parts)
        if any(config.get("prompts") for config in configs):
            raise InputError(
                "truth's samples of several prompts differ between files; expected seeds of one "
                "experiment"
            )
        parts = _side_by_side(parts, sets)
    first = parts[0]
    scores, models = dict(first.scores), dict(first.models)
    for part in parts[1:]:
        if (field := _difference(first, part)) is not None:
            raise InputError(f"{field} differs between files; expected seeds of one experiment")
        shared = {n for n in part.models if n in models} - {TRUTH, SECOND}
        if shared:
            raise InputError(f"two files have {min(shared)}; expected each seed once")
        scores |= part.scores
        models |= part.models
    return Results(
        scores=scores,
        tables={},
        downstream={pair: of for part in parts for pair, of in part.downstream.items()},
        models=models,
        recipe=first.recipe,
        complete=all(part.complete for part in parts),
        provenance={**first.provenance, **_costs(parts), "sets_of_truth": str(len(sets))},
    )


def _sets_of_truth(parts: Sequence[Results]) -> list[list[int]]:
    """Return the indices of the parts that have the same samples of truth, for each set of them."""
    sets: list[list[int]] = []
    for index, part in enumerate(parts):
        own = part.scores[TRUTH, SELF].log_prob_sum
        for same in sets:
            if np.array_equal(parts[same[0]].scores[TRUTH, SELF].log_prob_sum, own):
                same.append(index)
                break
        else:
            sets.append([index])
    return sets


def _side_by_side(parts: Sequence[Results], sets: Sequence[Sequence[int]]) -> list[Results]:
    """Return the same parts with the rows of all sets of truth's samples in each.

    Scores of truth's own are those of all sets, and of any model zeros outside of its own set. Sums
    over tokens are right with that. What subtracts a model's scores of truth's samples from truth's
    own, row by row, has to leave out the rows of other sets (`Study.missed`).
    """
    own = [parts[same[0]].scores[TRUTH, SELF] for same in sets]
    names = set.intersection(*({*scores.arrays()} for scores in own))
    whole = Scores(**{n: np.concatenate([s.arrays()[n] for s in own]) for n in sorted(names)})
    made = list(parts)
    for place, same in enumerate(sets):
        before = sum(len(scores.num_tokens) for scores in own[:place])
        after = sum(len(scores.num_tokens) for scores in own[place + 1 :])
        for index in same:
            scores = {
                (sampler, scorer): Scores(
                    **{
                        n: np.pad(array, [(before, after), *[(0, 0)] * (array.ndim - 1)])
                        for n, array in of.arrays().items()
                    }
                )
                if sampler == TRUTH
                else of
                for (sampler, scorer), of in parts[index].scores.items()
            }
            made[index] = dataclasses.replace(parts[index], scores=scores | {(TRUTH, SELF): whole})
    return made


def _costs(parts: Sequence[Results]) -> dict[str, str]:
    """Return the seconds of all parts together, as analysis/archive.py keeps them.

    What parts took from other runs counts once, and not if one of them has made it. How many parts
    sampled the truth is said too.
    """
    own: dict[str, float] = {}
    for part in parts:
        for stage, seconds in json.loads(part.provenance.get("seconds_by_stage", "{}")).items():
            own[stage] = round(own.get(stage, 0.0) + seconds, 1)
    taken = [json.loads(part.provenance.get("seconds_reused", "{}")) for part in parts]
    most = max(taken, key=lambda of: sum(of.values())) if all(taken) else {}
    made = sum(
        SAMPLE_TRUTH in json.loads(part.provenance.get("seconds_by_stage", "{}")) for part in parts
    )
    return {
        "seconds_by_stage": json.dumps(own),
        "seconds_reused": json.dumps(most),
        "runs_with_own_truth": str(made),
    }


def _difference(first: Results, other: Results) -> str | None:
    """Return a field of the configs that has to be the same and is not; None if there is none."""
    ours, theirs = (presets.from_yaml(r.provenance.get("config", "")) for r in (first, other))
    sampling = [config.get("sampling", {}) for config in (ours, theirs)]
    if not _agree(*({n: v for n, v in of.items() if n == "train_sequences"} for of in sampling)):
        return "sampling.train_sequences"
    if _components(ours) != _components(theirs):
        return "truth.components"
    fields = (name for name in SHARED if name in ours and name in theirs)
    return next((name for name in fields if not _agree(ours[name], theirs[name])), None)


def _components(config: Mapping[str, Any]) -> Json:
    """Return what the components of a truth are; their weights may have other places in each run.

    Corpora are named by their fingerprints, as they may be kept elsewhere.
    """
    truth = config.get("truth", {})
    components = truth.get("components") or {}
    return components and [
        [[n, c.get("fingerprint"), c.get("weight")] for n, c in components.items()],
        [truth.get(name) for name in ("shape", "architecture", "training", "component_sequences")],
    ]


def _agree(ours: Json, theirs: Json) -> bool:
    """Return whether two parts of configs agree where both say something.

    Versions may differ in the fields that they have, and machines in where a model is kept.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = (ours.keys() & theirs.keys()) - {"model"}
        return all(_agree(ours[name], theirs[name]) for name in names)
    return bool(ours == theirs)


def evaluate(study: Study, claim: Claim, size: str) -> Outcome:
    """Compute the terms of a claim for the students of a size."""
    means = [tested(study, term, size) for term in claim.terms]
    known = tuple(mean for mean in means if mean is not None)
    if len(known) < len(means):
        return Outcome(claim=claim, means=(), p_value=1.0)
    return Outcome(claim=claim, means=known, p_value=max(_p_value(claim, mean) for mean in known))


def families(study: Study, claims: Sequence[Claim]) -> Iterator[tuple[list[Outcome], int]]:
    """Yield the outcomes of claims that are corrected together, and their number of seeds."""
    for size in study.sizes:
        if unsized := [claim for claim in claims if not claim.names_sizes]:
            seeds = {student.seed for student in study.students if student.size == size}
            yield [evaluate(study, claim, size) for claim in unsized], len(seeds)
    if sized := [claim for claim in claims if claim.names_sizes]:
        seeds = {student.seed for student in study.students}
        yield [evaluate(study, claim, "") for claim in sized], len(seeds)


def _p_value(claim: Claim, mean: SeedMean | Slope) -> float:
    if claim.test == "within":
        return equivalence_p_value(mean, claim.margin)
    return mean.p_value(claim.margin, "greater" if claim.test == "greater" else "less")


def decide(outcome: Outcome, corrected: float) -> Decision:
    """Decide a claim.

    Args:
        outcome: what the scores say about it.
        corrected: its p-value after Holm's correction.
    """
    if not outcome.means or any(mean.num_seeds == 1 for mean in outcome.means):
        return "undecided"
    if corrected <= ALPHA:
        return "holds"
    contradicted = any(_contradicts(outcome.claim, mean) for mean in outcome.means)
    return "fails" if contradicted else "undecided"


def _contradicts(claim: Claim, mean: SeedMean | Slope) -> bool:
    if claim.test == "greater":
        return mean.high < claim.margin
    if claim.test == "less":
        return mean.low > claim.margin
    return mean.low > claim.margin or mean.high < -claim.margin


def unit_of(outcomes: Sequence[Outcome]) -> str:
    """Return the unit of the measures of some claims."""
    measures = {term.measure for o in outcomes for term in o.claim.all_terms}
    more = ""
    if any(BEST_OF.fullmatch(measure) for measure in measures):
        more += ", pass@k and rouge@k from 0 to 1"
    if measures & {*BY_MODE}:
        more += ", of log mass per nat of entropy or of log weight"
    return f"nats per token{more}"


def replicates(study: Study) -> str:
    """Say that not all seeds have the same D and truth's samples; empty if they have."""
    if study.num_sets == 1:
        return ""
    return f"{study.num_sets} different sets of D and truth's samples"


def table(outcomes: Sequence[Outcome], num_seeds: int) -> Table:
    """Make a table of the claims for people."""
    corrected = holm([outcome.p_value for outcome in outcomes])
    about = "95 % intervals" if num_seeds > 1 else ONE_TRAINING
    title = f"{len(outcomes)} claims, {num_seeds} seeds, {unit_of(outcomes)}, {about}"
    printed = Table(title=title, title_justify="left", box=None)
    for name in ("decision", "p, corrected", "claim"):
        printed.add_column(name)
    for outcome, p_value in zip(outcomes, corrected, strict=True):
        lines = [f"{outcome.claim.name}: {outcome.claim.says}"]
        lines += [
            f"  {term}: {text(mean)}; {_about(mean, num_seeds)}"
            for term, mean in zip(outcome.claim.terms, outcome.means, strict=False)
        ]
        if not outcome.means:
            lines.append("  a term has no value in some seed")
        shown = f"{p_value:.4f}" if all(mean.num_seeds > 1 for mean in outcome.means) else ""
        printed.add_row(decide(outcome, p_value), shown, "\n".join(lines))
    return printed


def _about(mean: SeedMean | Slope, num_seeds: int) -> str:
    """Say what a term would have detected, and if it is a mean of fewer seeds than others."""
    if isinstance(mean, Slope):
        return f"{mean.num_components} modes, permuted"
    fewer = "" if mean.num_seeds == num_seeds else f"{mean.num_seeds} of {num_seeds} seeds; "
    if mean.num_seeds == 1:
        return f"{fewer}{ONE_TRAINING}"
    return f"{fewer}detectable {detectable(mean):.3f}"


def read(folder: Path) -> tuple[list[Claim], Study]:
    """Read the claims in a folder, and the scores that they are tested on.

    Raises:
        InputError: if there are no scores, or they are of a run that recorded other claims.
    """
    file = folder / CLAIMS
    claims = read_claims(file)
    paths = sorted(folder.glob("scores-*.h5*"))
    if not paths:
        raise InputError(f"{folder}: no scores-*.h5.xz; expected files of analysis/archive.py")
    parts = [files.read_file(path) for path in paths]
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    for path, part in zip(paths, parts, strict=True):
        config = presets.from_yaml(part.provenance.get("config", ""))
        if (recorded := config.get("claims_fingerprint", "")) != expected:
            raise InputError(
                f"{path}: was submitted with claims {recorded[:12] or 'of no file'}, and {file} is "
                f"{expected[:12]}; expected the same file"
            )
    study = Study(pool(parts))
    if not study.students:
        raise InputError(f"{folder}: no student has both of its scores; expected at least one")
    for path, part in zip(paths, parts, strict=True):
        if not part.complete:
            print(f"warning: {path}: some planned shards are missing", file=sys.stderr)
    return claims, study


def read_pooled(options: argparse.Namespace) -> files.Analysis | None:
    """Read the runs in a folder with claims as one; None if what was typed is no such folder.

    Raises:
        InputError: as `read`.
    """
    folder = Path(options.run)
    if not (folder / CLAIMS).is_file():
        return None
    _, study = read(folder)
    return files.Analysis(
        results=study.results, path=folder / CLAIMS, out=files.folder_to_write(options, folder)
    )


def main(arguments: list[str]) -> int:
    """Read claims and scores, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with claims.yaml and scores-*.h5.xz")
    claims, study = read(parser.parse_args(arguments).folder)
    for note in judges.notes(study):
        print(note)
    if apart := replicates(study):
        print(apart)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for outcomes, num_seeds in families(study, claims):
        console.print(table(outcomes, num_seeds))
    return 0


if __name__ == "__main__":
    command(main)
