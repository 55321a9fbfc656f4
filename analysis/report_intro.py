"""What a page of a report says before its verdicts: what its words mean, and what was measured."""

from collections.abc import Iterator

from report_run import parameters
from study import Study

from kdhpc.config.language import LanguageConfig

CORPORA = {"python-docs": "the documentation inside the installed Python"}
WORDS = (
    "Truth p* is a language model that stands for the world: the probability of every text under "
    "it is known exactly. D is a set of texts sampled from truth. The teacher p' is trained on D. "
    "D' is a set of texts sampled from the teacher with its logits divided by tau: a tau below 1 "
    "makes the teacher more selective.",
    "A student p'' is named after what it learnt from: the direct student from D, a distilled "
    "student such as that of tau 1 from the D' of its tau. At a temperature of evaluation T its "
    "own logits are divided by T after training, when it is sampled or when it scores truth's "
    "texts; T is 1 unless something else is said.",
    "Precision is the mean of log p* over texts sampled from the student: would truth write what "
    "the student writes? Recall is the mean of log p'' over texts sampled from truth: would the "
    "student write what truth writes?",
    "Numbers are in nats (natural logarithms) per token unless something else is said. H(p) is "
    "the entropy of p, the mean of -log p over its own texts: how varied they are. KL(p||q) is "
    "the mean of log p - log q over texts of p: 0 if q equals p, and larger the less likely q "
    "finds them.",
)
"""What the words of a page mean."""
COVERED = (
    "Intervals are t-based (method: docs/statistics.md in the repository). They cover seeds, each "
    "of which draws teacher, D' and students anew, and sampled sequences; with one "
    "seed, sampled sequences only. They do not cover another p*, another D, other sizes or other "
    "training settings. Each verdict is at 95 %, "
    "without correction for the number of verdicts: a claim holds if its whole interval is on the "
    "claimed side, fails if it is wholly on the other side, and is undecided otherwise."
)


def subject(study: Study, config: LanguageConfig | None) -> str:
    """Return what truth, models and data are in a run, in one line."""
    lines = ["The experiment follows arXiv 2505.13111."]
    lines += _of_config(config) if config is not None else ()
    if sizes := parameters(study.results):
        lines.append(f"Parameters: {sizes}.")
    if config is not None and config.small:
        lines.append("This is a toy run: it says nothing about larger models.")
    return " ".join(lines)


def _of_config(config: LanguageConfig) -> Iterator[str]:
    truth, sampling = config.truth, config.sampling
    if truth.source == "corpus":
        corpus = CORPORA.get(truth.corpus, truth.corpus)
        yield f"Here truth is a corpus, {corpus}, split by document."
    elif truth.model == "train":
        corpus = CORPORA.get(truth.corpus, truth.corpus)
        yield f"Here truth is a small Llama over bytes that the run itself trained on {corpus}."
    else:
        cut = f", cut to {truth.vocabulary:,} ids" if truth.vocabulary else ""
        yield f"Here truth is {truth.model}{cut}."
    yield (
        f"D and each D' have {sampling.train_sequences:,} sequences of at most {config.length:,} "
        f"tokens, prompt included; {sampling.eval_sequences:,} sequences of each model are "
        "scored."
    )
