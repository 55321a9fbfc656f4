"""The numbers of a run, each as a statistic of one seed that knows its sequences.

Recall and everything else over truth's samples shares their rows, between students and between
seeds; everything over a student's own samples has rows of its own. Log-probabilities are in nats,
per counted token unless a sequence is said.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from kdhpc.config import presets
from kdhpc.experiment.arms import SECOND_JUDGE, at_temperature
from kdhpc.science import curves
from kdhpc.science.best_of import best_of_k
from kdhpc.science.intervals import (
    SeedMean,
    Statistic,
    by_cluster,
    over_seeds,
    ratio,
    through,
)
from kdhpc.storage.results import Results
from kdhpc.storage.score_shards import Scores

TRUTH, SELF, SECOND = "truth", "self", SECOND_JUDGE
PROMPTS = "prompts"
"""Name of the clusters of rows if there are several prompts; they are those of every sampler."""
BEST_ARRAYS = {"pass": "right", "rouge": "rouge_l"}
"""Array of a sampler's own scores that says how good its answers are, by what `best_of` is of."""
NUM_GROUPS = 5
"""Number of equal groups that truth's samples are cut into, from the rarest."""
TRAINING = ("training", "fine_tuning", "labels", "train_sequences")
"""Settings of a model that say how it is trained; the others say what it is before that."""
BLOCK_ROWS = 4096
"""Number of rows whose tokens are in memory at once."""
Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trained student with both of its scores."""

    name: str
    size: str
    seed: int
    label: str
    """What it learnt from: `direct`, a tau such as `0.8`, or a truncation such as `topk50`."""
    tau: float | None
    """Temperature of its teacher; None if it is direct or its teacher was truncated."""


Measure = Callable[[Student], Statistic]


class Study:
    """Statistics of every student of a run.

    Methods with `per_sequence` return nats per sequence instead of nats per counted token.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.scores = {pair: s for pair, s in results.scores.items() if _has_mean(s)}
        self._config = presets.from_yaml(results.provenance.get("config", ""))
        self.eos_counts: bool = self._config.get("eos", "learn") == "learn"
        """Whether end tokens are among the counted tokens."""
        self.num_sets = int(results.provenance.get("sets_of_truth", "1"))
        """Number of sets of truth's samples, of runs that were pooled (analysis/claims.py). If
        there are several, a model has scored one of them, and has no tokens in the others."""
        self.num_prompts: int = self._config.get("eval_prompts") or 0
        """Number of different prompts of evaluation sets; 0 if all sequences have the same."""
        students = [_student(n, f) for n, f in results.models.items() if f["kind"] == "student"]
        self.students = [student for student in students if self._has_both(student)]
        self.unscored = [student.name for student in students if not self._has_both(student)]
        """Names of students of which a score is missing or has no mean."""
        self.students.sort(key=lambda s: (s.size, s.seed, label_order(s.label)))

    def _has_both(self, student: Student) -> bool:
        return {(student.name, TRUTH), (TRUTH, student.name)} <= self.scores.keys()

    @property
    def left_out(self) -> str:
        """Which students are left out, and why, in one line; empty if none is."""
        if not self.unscored:
            return ""
        return (
            f"{len(self.unscored)} of {len(self.unscored) + len(self.students)} trained students "
            "are left out, because a score is missing or has no finite mean: "
            f"{', '.join(self.unscored)}"
        )

    @property
    def judged_by(self) -> str:
        """What stands for p* if the truth is a corpus, in one line; empty if it is a model."""
        truth = self._config.get("truth", {})
        if truth.get("source", "model") == "model":
            return ""
        judge = (
            "a model that was trained on its other documents"
            if truth.get("model") == "train"
            else str(truth.get("model"))
        )
        return (
            f"truth is a corpus ({truth.get('corpus')}), whose own probabilities nobody knows: "
            f"precision is judged by {judge}, which stands for p* in everything but recall"
        )

    @property
    def given_prompts(self) -> str:
        """What precision and recall are given, in one line, if there are several prompts."""
        if self.num_prompts < 2:
            return ""
        used = min(self.num_prompts, len(self.scores[TRUTH, SELF].num_tokens))
        return (
            f"sequences start with {used} prompts that are the same for every model: "
            "precision and recall are given the prompt, and intervals are over prompts and seeds"
        )

    @property
    def second_judge(self) -> str:
        """Who judges besides, in a few words; empty if there is no second judge."""
        judge = self._config.get("truth", {}).get("second_judge") or {}
        if not judge:
            return ""
        if judge.get("model") == "train":
            return "another model, trained on documents of its own"
        return str(judge.get("model"))

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(student.size for student in self.students))

    def parameters(self, size: str) -> int:
        """Return the number of parameters of the students of a size."""
        facts = self.results.models
        return next(int(str(facts[s.name]["parameters"])) for s in self.students if s.size == size)

    def training(self, size: str) -> Mapping[str, object]:
        """Return how the students of a size were trained, as the config has it."""
        model = self._model(size)
        return {name: model.get(name) for name in TRAINING}

    def untrained(self, size: str) -> Mapping[str, object]:
        """Return what the students of a size were before training, as the config has it."""
        return {name: value for name, value in self._model(size).items() if name not in TRAINING}

    def sequences_seen(self, size: str) -> float:
        """Return how many sequences a student of a size was trained on, each pass counted.

        That is a distilled one, and of a fine-tuned size both of its trainings.
        """
        model = self._model(size)
        trainings = (model["training"], model.get("fine_tuning"))
        passes = sum(t.get("stop_after_epochs") or t["epochs"] for t in trainings if t)
        all_sequences = self._config.get("sampling", {}).get("train_sequences", 1)
        return float(passes * (model.get("train_sequences") or all_sequences))

    def _model(self, size: str) -> Mapping[str, Any]:
        """Return the settings of the students of a size; none if the results have no config."""
        model: Mapping[str, Any] = self._config.get("students", {}).get(size, {})
        return model

    def smaller_sizes(self, size: str) -> list[str]:
        """Return the sizes with fewer parameters and the same training, from the smallest."""
        found = [
            name
            for name in self.sizes
            if self.training(name) == self.training(size)
            and self.parameters(name) < self.parameters(size)
        ]
        return sorted(found, key=self.parameters)

    def labels(self, size: str) -> list[str]:
        """Return what the students of a size learnt from: `direct`, then taus from the highest."""
        return sorted({s.label for s in self.students if s.size == size}, key=label_order)

    def taus(self, size: str) -> list[str]:
        """Return the labels of the taus of a size, from the highest."""
        return [label for label in self.labels(size) if label[0].isdigit()]

    def of(self, size: str, label: str) -> dict[int, Student]:
        """Return the students of a size and label by seed."""
        return {s.seed: s for s in self.students if (s.size, s.label) == (size, label)}

    def mean(self, size: str, label: str, measure: Measure) -> SeedMean:
        """Return the mean of a measure over the seeds of a size and label."""
        return over_seeds([measure(student) for student in self.of(size, label).values()])

    def contrast(self, size: str, label: str, against: str, measure: Measure) -> SeedMean | None:
        """Return the mean over seeds of a measure of one student less that of another, paired.

        None if no seed has both.
        """
        ours, theirs = self.of(size, label), self.of(size, against)
        seeds = [seed for seed in ours if seed in theirs]
        differences = [measure(ours[seed]) - measure(theirs[seed]) for seed in seeds]
        return over_seeds(differences) if differences else None

    def score(self, sampler: str, scorer: str) -> Statistic:
        """Return the mean of a stored score, over the sampler's sequences."""
        return self._mean_of(sampler, scorer)

    def has_teacher(self, name: str, tau: float) -> bool:
        """Return whether a teacher has both of its scores at a tau."""
        pairs = {(f"{name}-tau{tau:g}", TRUTH), (TRUTH, at_temperature(name, tau))}
        return pairs <= self.scores.keys()

    def teacher(self, name: str, tau: float) -> tuple[Statistic, Statistic]:
        """Return the precision and the recall of a teacher at a tau."""
        return (
            self._mean_of(f"{name}-tau{tau:g}", TRUTH),
            self._mean_of(TRUTH, at_temperature(name, tau)),
        )

    def precision(self, student: Student, temperature: float = 1.0) -> Statistic:
        """Return E over the student's samples of log p*."""
        return self._mean_of(at_temperature(student.name, temperature), TRUTH)

    def recall(self, student: Student, temperature: float = 1.0) -> Statistic:
        """Return E over truth's samples of log p''."""
        return self._mean_of(TRUTH, at_temperature(student.name, temperature))

    def has_best(self, kind: str) -> bool:
        """Return whether `pass` or `rouge` is known of the sequences of all students."""
        own = [self.scores[pair].arrays() for pair in self._own_pairs]
        return all(BEST_ARRAYS[kind] in arrays for arrays in own)

    @property
    def _own_pairs(self) -> list[tuple[str, str]]:
        return [(s.name, SELF) for s in self.students if (s.name, SELF) in self.scores]

    @property
    def answers_per_prompt(self) -> int:
        """The smallest number of sequences of a prompt."""
        rows = min(len(self.scores[pair].num_tokens) for pair in self._own_pairs)
        return rows // max(1, self.num_prompts)

    def best_of(self, sampler: str, k: int, kind: str) -> Statistic:
        """Return how good the best of k answers of a sampler is, over prompts.

        Args:
            sampler: name of the sampler.
            k: number of answers.
            kind: `pass`, the probability that one is right, or `rouge`, the largest ROUGE-L.

        Raises:
            ValueError: if that is not known, or a prompt has fewer than k answers.
        """
        values = self.scores[sampler, SELF].arrays().get(BEST_ARRAYS[kind])
        if values is None:
            raise ValueError(f"{sampler}: has no {BEST_ARRAYS[kind]}; see has_best")
        best = best_of_k(values, np.arange(len(values)) % self.num_prompts, k)
        return ratio(best, rows=PROMPTS)

    def truth_log_prob(self) -> Statistic:
        """Return E over truth's samples of log p*: less its entropy."""
        return self._mean_of(TRUTH, SELF)

    def entropy(
        self, student: Student, temperature: float = 1.0, *, per_sequence: bool = False
    ) -> Statistic:
        """Return H(p''), end tokens included, over the student's samples."""
        name = at_temperature(student.name, temperature)
        own = -self._whole(name, SELF)
        return self.ratio(own, self._tokens(name, per_sequence), rows=name)

    def divergence(
        self, student: Student, temperature: float = 1.0, *, per_sequence: bool = False
    ) -> Statistic:
        """Return KL(p''||p*), end tokens included, over the student's samples."""
        name = at_temperature(student.name, temperature)
        log_ratio = self._whole(name, SELF) - self._whole(name, TRUTH)
        return self.ratio(log_ratio, self._tokens(name, per_sequence), rows=name)

    def missed(
        self, student: Student, temperature: float = 1.0, *, per_sequence: bool = False
    ) -> Statistic:
        """Return KL(p*||p''), end tokens included, over truth's samples."""
        name = at_temperature(student.name, temperature)
        log_ratio = self._whole(TRUTH, SELF) - self._whole(TRUTH, name)
        own, tokens = self._own_rows(name), self._tokens(TRUTH, per_sequence)
        return self.ratio(log_ratio * own, own if tokens is None else tokens * own, rows=TRUTH)

    def _own_rows(self, name: str) -> Numbers:
        """Return 1 for each of truth's samples that a model scored, 0 for those of other runs."""
        counts = self.scores[TRUTH, name].num_tokens
        return np.ones(len(counts)) if self.num_sets == 1 else (counts > 0).astype(np.float64)

    @property
    def has_averages(self) -> bool:
        """Whether divergences averaged over the next token are there (`scoring.expected`)."""
        pairs = [(s.name, f"{TRUTH}-expected") for s in self.students]
        pairs += [(TRUTH, f"{s.name}-expected") for s in self.students]
        return self.scores.keys() >= {*pairs}

    def averaged_divergence(self, student: Student) -> Statistic:
        """Return KL(p''||p*) per sequence, each token averaged over the vocabulary."""
        return self._averaged(student.name, TRUTH)

    def averaged_missed(self, student: Student) -> Statistic:
        """Return KL(p*||p'') per sequence, each token averaged over the vocabulary."""
        return self._averaged(TRUTH, student.name)

    def _averaged(self, sampler: str, scorer: str) -> Statistic:
        divergence = self.scores[sampler, f"{scorer}-expected"].divergence_sum
        return self.ratio(np.asarray(divergence, dtype=np.float64), rows=sampler)

    def end_part(self, student: Student) -> Statistic:
        """Return E of log p* of the end tokens, which precision leaves out with `eos: mask`.

        Precision is -entropy - divergence - this.
        """
        scores = self.scores[student.name, TRUTH]
        zero = np.zeros(len(scores.num_tokens))
        ends = zero if self.eos_counts else _ends(scores)
        return self.ratio(ends, scores.num_tokens, rows=student.name)

    @property
    def has_divergences(self) -> bool:
        """Whether end tokens are known on both sides, as divergences of whole texts need."""
        pairs = [(TRUTH, SELF), *((s.name, of) for s in self.students for of in (SELF, TRUTH))]
        known = [self.scores[pair] for pair in pairs if pair in self.scores]
        return len(known) == len(pairs) and (
            self.eos_counts or all(scores.end_log_prob is not None for scores in known)
        )

    @property
    def has_tokens(self) -> bool:
        """Whether per-token scores are there, which curves need."""
        pairs = [(TRUTH, SELF)]
        for student in self.students:
            pairs += [(TRUTH, student.name), (student.name, SELF), (student.name, TRUTH)]
        return self.has_divergences and all(
            self.scores[pair].token_log_prob is not None for pair in pairs
        )

    def overlaps(self, student: Student, prefix: int, log_factors: Numbers) -> list[Statistic]:
        """Return the precision alpha of the student's curve at each factor (kdhpc.science.curves).

        Args:
            student: the student.
            prefix: number of tokens after the prompt that are compared, one of `PREFIXES`.
            log_factors: [M] log lambda.
        """
        log_ratio = self._prefix_ratio(student.name, student.name, prefix)
        terms = curves.precision_terms(log_ratio, log_factors)
        return [self.ratio(column, rows=student.name) for column in terms.T]

    def coverages(self, student: Student, prefix: int, log_factors: Numbers) -> list[Statistic]:
        """Return the recall beta of the student's curve at each factor, over truth's samples."""
        terms = curves.recall_terms(self._prefix_ratio(TRUTH, student.name, prefix), log_factors)
        return [self.ratio(column, rows=TRUTH) for column in terms.T]

    def total_variation(self, student: Student, prefix: int) -> Statistic:
        """Return the total variation between p'' and p* of prefixes, from both sets of samples."""
        [overlap] = self.overlaps(student, prefix, np.zeros(1))
        [coverage] = self.coverages(student, prefix, np.zeros(1))
        return 1.0 - 0.5 * (overlap + coverage)

    def _prefix_ratio(self, sampler: str, model: str, prefix: int) -> Numbers:
        """Return log p* - log p'' [N] of the first tokens of a sampler's sequences."""
        column = curves.PREFIXES.index(prefix)
        truth = self._prefixes(sampler, SELF if sampler == TRUTH else TRUTH)
        own = self._prefixes(sampler, model if sampler == TRUTH else SELF)
        return np.asarray(truth[:, column] - own[:, column])

    @lru_cache(maxsize=32)  # noqa: B019  # all seeds of a label; a study lives as long as its script
    def _prefixes(self, sampler: str, scorer: str) -> Numbers:
        """Return the log-probabilities [N, K] of the first tokens, reading some rows at a time."""
        scores = self.scores[sampler, scorer]
        tokens, parts = scores.token_log_prob, []
        if tokens is None:
            raise ValueError(f"{sampler} under {scorer}: no per-token scores")
        for start in range(0, len(tokens), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            ends = None if self.eos_counts else _ends(scores)[rows]
            parts.append(curves.prefix_log_prob(tokens[rows, : self._prefix_stop], ends))
        return np.concatenate(parts)

    @cached_property
    def _prefix_stop(self) -> int:
        """Position after the longest prefix of every row; prompts have no log-probabilities."""
        tokens = self.scores[TRUTH, SELF].token_log_prob
        if tokens is not None and self.num_prompts:
            return int(tokens.shape[1])
        counted = ~np.isnan(tokens[:BLOCK_ROWS]).all(axis=0) if tokens is not None else [True]
        return int(np.argmax(counted)) + max(curves.PREFIXES)

    def by_rarity(self, student: Student, temperature: float = 1.0) -> list[Statistic]:
        """Return the student's recall on each fifth of truth's samples, the rarest first.

        A sample is rare if its log-probability per counted token under the truth is low. Samples
        without a counted token are in no part.
        """
        own = self.scores[TRUTH, SELF]
        scores = self.scores[TRUTH, at_temperature(student.name, temperature)]
        order = np.argsort(own.log_prob_sum / np.maximum(own.num_tokens, 1), kind="stable")
        order = order[own.num_tokens[order] > 0]
        return self._in_fifths(
            scores.log_prob_sum[order], scores.num_tokens[order], order, len(own.num_tokens)
        )

    @property
    def has_fifths(self) -> bool:
        """Whether truth's samples, of one run, can be cut into fifths by rarity."""
        own = self.scores.get((TRUTH, SELF))
        return (
            self.num_sets == 1
            and own is not None
            and int(np.count_nonzero(own.num_tokens)) >= NUM_GROUPS
        )

    @property
    def has_entropies(self) -> bool:
        """Whether the entropy of p* is known at every position of truth's samples.

        This needs `scoring.expected` and `scoring.per_token`.
        """
        averaged = self.scores.get((TRUTH, f"{TRUTH}-expected"))
        known = averaged is not None and averaged.token_log_prob is not None
        return known and self.has_tokens and self.has_fifths

    def by_entropy(self, student: Student) -> list[Statistic]:
        """Return the student's recall on each fifth of positions, the surest of the truth first.

        Positions of all of truth's samples are ordered by the entropy of p*'s next token. Where it
        is the same, as after the prompt, they are cut in the order of the samples.
        """
        tokens = self.scores[TRUTH, student.name].token_log_prob
        if tokens is None:
            raise ValueError(f"{TRUTH} under {student.name}: no per-token scores")
        positions = self._positions_by_entropy
        picked = tokens.ravel()[positions].astype(np.float64)
        ones = np.ones(len(picked))
        return self._in_fifths(picked, ones, positions // tokens.shape[1], len(tokens))

    @cached_property
    def _positions_by_entropy(self) -> NDArray[np.int64]:
        """Counted positions in the flattened truth's samples, the surest of the truth first."""
        averaged = self.scores[TRUTH, f"{TRUTH}-expected"].token_log_prob
        own = self.scores[TRUTH, SELF].token_log_prob
        if averaged is None or own is None:
            raise ValueError("no entropies of the truth's next token")
        counted = np.flatnonzero(~np.isnan(own))
        order = np.argsort(-averaged.ravel()[counted], kind="stable")
        return np.asarray(counted[order])

    def temperatures(self, student: Student) -> list[float]:
        """Return the temperatures at which the student was sampled and scored, from the highest."""
        samplers = {sampler for sampler, scorer in self.scores if scorer == TRUTH}
        scored = self.scored_temperatures(student.name)
        return [t for t in scored if t in _temperatures(student.name, samplers)]

    def scored_temperatures(self, name: str) -> list[float]:
        """Return the temperatures at which a model scored truth's samples, from the highest."""
        scorers = {scorer for sampler, scorer in self.scores if sampler == TRUTH}
        return sorted(_temperatures(name, scorers), reverse=True)

    def _mean_of(self, sampler: str, scorer: str) -> Statistic:
        scores = self.scores[sampler, scorer]
        return self.ratio(scores.log_prob_sum, scores.num_tokens, rows=sampler)

    def ratio(
        self,
        numerators: NDArray[np.floating | np.integer],
        denominators: NDArray[np.floating | np.integer] | None = None,
        *,
        rows: str,
    ) -> Statistic:
        """Return a ratio of sums over sequences; its unit is the prompt if there are several."""
        return self._by_prompt(ratio(numerators, denominators, rows=rows))

    def _by_prompt(self, statistic: Statistic) -> Statistic:
        """Add up what sequences of one prompt do to a statistic, if there are several prompts."""
        if self.num_prompts < 2:
            return statistic
        num_rows = {len(influence) for influence in statistic.influence.values()}.pop()
        return by_cluster(statistic, np.arange(num_rows) % self.num_prompts, rows=PROMPTS)

    def _in_fifths(self, *of: Any) -> list[Statistic]:
        return [self._by_prompt(fifth) for fifth in in_fifths(*of)]

    def _tokens(self, sampler: str, per_sequence: bool) -> Numbers | None:
        return None if per_sequence else self.scores[sampler, SELF].num_tokens.astype(np.float64)

    def _whole(self, sampler: str, scorer: str) -> Numbers:
        """Return the log-probabilities of whole sequences, end tokens included."""
        scores = self.scores[sampler, scorer]
        return scores.log_prob_sum + (0.0 if self.eos_counts else _ends(scores))


def at_equal_precision(study: Study, base: Student, student: Student) -> Statistic | None:
    """Return the recall of a student at another decode temperature less that of a distilled one.

    The temperature is the one at which the first has the precision of the second; the highest one
    if precision does not rise at each step to a lower temperature. Between two temperatures recall
    is interpolated linearly in precision, and the errors of all precisions are carried through the
    slope. None if no two temperatures enclose the precision.

    Args:
        study: the run.
        base: the direct student or that of tau 1, whose temperature is lowered.
        student: the distilled student, at temperature 1.
    """
    target = study.precision(student)
    temperatures = study.temperatures(base)
    points = [(study.precision(base, t), study.recall(base, t)) for t in temperatures]
    for (p_low, r_low), (p_high, r_high) in pairwise(points):
        rise = p_high.value - p_low.value
        if rise <= 0.0 or not p_low.value <= target.value <= p_high.value:
            continue
        weight = (target.value - p_low.value) / rise
        slope = (r_high.value - r_low.value) / rise
        recall = (1.0 - weight) * r_low + weight * r_high
        off = target - ((1.0 - weight) * p_low + weight * p_high)  # 0, with the errors of all three
        return recall + slope * off - study.recall(student)
    return None


def at_equal_precision_smoothly(study: Study, base: Student, student: Student) -> Statistic | None:
    """Return what `at_equal_precision` does, with a smooth curve through all temperatures.

    Between temperatures recall bends downwards, so straight lines understate what the base keeps.
    The curve is a monotone cubic in each part (F. N. Fritsch, R. E. Carlson, SIAM J. Numer. Anal.
    17 (1980), 238-246). None if precision does not rise at every step to a lower temperature, or
    its range does not contain the student's.
    """
    temperatures = study.temperatures(base)
    precisions = [study.precision(base, t) for t in temperatures]
    recalls = [study.recall(base, t) for t in temperatures]
    target, num = study.precision(student), len(temperatures)
    values = [precision.value for precision in precisions]
    rises = all(low < high for low, high in pairwise(values))
    if num < 2 or not rises or not values[0] <= target.value <= values[-1]:
        return None

    def recall_at_target(of: Numbers) -> float:
        return float(PchipInterpolator(of[:num], of[num : 2 * num], extrapolate=True)(of[-1]))

    least = min(high - low for low, high in pairwise(values))
    kept = through(recall_at_target, [*precisions, *recalls, target], step=min(0.01, least / 4))
    return kept - study.recall(student)


def best_recall(study: Study, student: Student) -> tuple[float, Statistic]:
    """Return the temperature at which the student's recall is highest, and that recall."""
    scored = {t: study.recall(student, t) for t in study.scored_temperatures(student.name)}
    best = max(scored, key=lambda t: scored[t].value)
    return best, scored[best]


def in_fifths(
    sums: Numbers,
    counts: NDArray[np.number],
    rows: NDArray[np.integer],
    num_rows: int,
) -> list[Statistic]:
    """Return the ratio of sums to counts in each fifth of parts of truth's samples.

    Other samples would be cut at other places, which moves a fifth's ratio by what the parts at its
    ends differ from it; the influence of each row contains that.
    Source: the influence function of a trimmed mean, P. J. Huber, Robust Statistics (1981), 3.3.

    Args:
        sums: [M] log-probabilities of parts, in the order in which they are cut.
        counts: [M] numbers of tokens of the parts.
        rows: [M] the sample that each is a part of.
        num_rows: number of truth's samples.
    """
    num_parts = len(sums)
    size, more = divmod(num_parts, NUM_GROUPS)
    ends = [index * size + min(index, more) for index in range(NUM_GROUPS + 1)]
    width = max(1, num_parts // (8 * NUM_GROUPS))
    expected = np.bincount(rows, minlength=num_rows) / num_parts
    lack = [end * expected - np.bincount(rows[:end], minlength=num_rows) for end in ends]
    fifths = []
    for index, (start, stop) in enumerate(pairwise(ends)):
        above, below = (
            np.bincount(rows[start:stop], of[start:stop], num_rows) for of in (sums, counts)
        )
        inside = ratio(above, below, rows=TRUTH)
        influence = inside.influence[TRUTH]
        for end, side in ((index + 1, 1.0), (index, -1.0)):
            if 0 < end < NUM_GROUPS:
                near = slice(max(0, ends[end] - width), ends[end] + width)
                off = float((sums[near] - inside.value * counts[near]).mean())
                influence = influence + side * off * lack[end] / below.sum()
        fifths.append(Statistic(value=inside.value, influence={TRUTH: influence}))
    return fifths


def _has_mean(scores: Scores) -> bool:
    """Return whether scores have a mean over tokens, and one whose error can be estimated.

    They have none if a model does not return numbers, or if no token counts: with `eos: mask`, all
    sequences of a model may end at once.
    """
    sums = (scores.log_prob_sum, scores.end_log_prob, scores.divergence_sum)
    finite = all(bool(np.isfinite(array).all()) for array in sums if array is not None)
    return finite and len(scores.num_tokens) > 1 and int(scores.num_tokens.sum()) > 0


def _ends(scores: Scores) -> Numbers:
    if scores.end_log_prob is None:
        return np.full(len(scores.num_tokens), np.nan)
    return scores.end_log_prob


def _temperatures(name: str, names: set[str]) -> list[float]:
    prefix = f"{name}-T"
    return [1.0] * (name in names) + [
        float(other.removeprefix(prefix)) for other in names if other.startswith(prefix)
    ]


def _student(name: str, facts: Mapping[str, object]) -> Student:
    arm = str(facts["arm"])
    tau = float(str(facts["tau"])) if arm.startswith("tau") else None
    return Student(
        name=name,
        size=str(facts["size"]),
        seed=int(str(facts["seed"])),
        label=arm if tau is None else f"{tau:g}",
        tau=tau,
    )


def label_order(label: str) -> tuple[bool, float, str]:
    """Return a key that sorts labels: `direct`, taus from the highest, truncations."""
    return label != "direct", -float(label) if label[0].isdigit() else 0.0, label
