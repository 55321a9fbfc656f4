"""A corpus in place of the truth: its documents, split once, and rows cut from them.

A document belongs to one part for good: what a judge learns from, D, or truth's evaluation set. If
two judges are trained, each learns from half of the judges' part.
Which one follows from a digest of its text and the run's seed, so the parts share no document, a
document that occurs twice counts once, and more documents leave the others where they are.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kdhpc.config.language import LanguageConfig, Truth
from kdhpc.errors import InputError

if TYPE_CHECKING:
    from kdhpc.models.tokenizer import Tokenizer

Part = Literal["judge", "second-judge", "train", "eval"]
JUDGES: tuple[Part, ...] = ("judge", "second-judge")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Settings that determine the rows that are cut from a corpus, besides seed and length."""

    fingerprint: str
    """Identity of the corpus; where it is kept determines nothing."""
    text_column: str
    judge_share: float
    held_out_share: float
    prompt: str
    begin: str

    @staticmethod
    def of(config: LanguageConfig) -> "Documents | None":
        """Return those of a config; None if D is sampled from a model."""
        truth = config.truth
        if truth.source == "model":
            return None
        return Documents(
            fingerprint=truth.corpus_fingerprint or truth.fingerprint,
            text_column=truth.text_column,
            judge_share=judge_share(truth),
            held_out_share=truth.held_out_share,
            prompt=config.prompt,
            begin=config.begin,
        )


def judge_share(truth: Truth) -> float:
    """Return the share of the documents that judges learn from: none if all are given models."""
    is_trained = truth.model == "train" or truth.trained_second_judge is not None
    return truth.judge_share if is_trained else 0.0


def shared_by_judges(truth: Truth) -> bool:
    """Return whether two judges learn from halves of the documents that are set apart for them."""
    return truth.model == "train" and truth.trained_second_judge is not None


def split(texts: Sequence[str], truth: Truth, seed: int) -> dict[Part, list[str]]:
    """Return the documents of each part, each once, in an order that their digests give.

    Args:
        texts: documents.
        truth: its `judge_share` and `held_out_share` are those of the documents.
        seed: seed of the run.
    """
    digests = {hashlib.sha256(f"{seed}\0{text}".encode()).digest(): text for text in texts}
    parts: dict[Part, list[str]] = {part: [] for part in (*JUDGES, "train", "eval")}
    for_judge = judge_share(truth)
    for_first = for_judge if truth.model == "train" else 0.0
    if shared_by_judges(truth):
        for_first /= 2.0
    for digest, text in sorted(digests.items()):
        place = int.from_bytes(hashlib.sha256(digest).digest()[:8], "big") / 2**64
        if place < for_first:
            parts["judge"].append(text)
        elif place < for_judge:
            parts["second-judge"].append(text)
        elif place < for_judge + truth.held_out_share:
            parts["eval"].append(text)
        else:
            parts["train"].append(text)
    return parts


def pieces(
    texts: Sequence[str], tokenizer: "Tokenizer", prompt: Sequence[int], length: int
) -> Iterator[list[int]]:
    """Yield rows of at most `length` ids: the prompt, then a piece of a document.

    The last piece of a document ends with the end token.
    """
    step = length - len(prompt)
    for text in texts:
        ids = [*tokenizer.text_ids(text), tokenizer.eos]
        yield from ([*prompt, *ids[start : start + step]] for start in range(0, len(ids), step))


def rows_of(part: Part, config: LanguageConfig, tokenizer: "Tokenizer") -> list[list[int]]:
    """Return all rows of a part of the corpus, in the order in which they are used.

    Rows of one document stay together in the judges' parts; in the others they are in an order that
    their ids give, so that the first ones come from many documents.

    Raises:
        InputError: if the corpus is not the one that the run was submitted with.
    """
    return _rows(part, _parts(config)[part], config, tokenizer)


def _parts(config: LanguageConfig) -> dict[Part, list[str]]:
    """Read the corpus and split it.

    Raises:
        InputError: if it is not the one that the run was submitted with.
    """
    from kdhpc.storage.corpora import corpus_fingerprint, read_documents

    truth = config.truth
    expected = truth.corpus_fingerprint or truth.fingerprint
    if expected not in {"", corpus_fingerprint(truth.corpus, truth.text_column)}:
        raise InputError(
            f"truth.corpus={truth.corpus}: has changed since the run was submitted; expected the "
            f"text with fingerprint {expected[:12]}"
        )
    return split(read_documents(truth.corpus, truth.text_column), truth, config.seed)


def _rows(
    part: Part, texts: Sequence[str], config: LanguageConfig, tokenizer: "Tokenizer"
) -> list[list[int]]:
    prompt = tokenizer.prompt_ids(config.prompt, config.begin)
    rows = list(pieces(texts, tokenizer, prompt, config.length))
    return rows if part in JUDGES else shuffled(rows)


def shuffled(rows: Iterable[list[int]]) -> list[list[int]]:
    """Return rows in an order that their ids give."""
    return sorted(rows, key=lambda ids: hashlib.sha256(repr(ids).encode()).digest())


def check_sizes(config: LanguageConfig, tokenizer: "Tokenizer") -> None:
    """Check that the corpus has as many rows as a run asks for.

    Raises:
        InputError: if D, the evaluation set, or what a judge learns from would be too small.
    """
    sizes, truth = config.sampling, config.truth
    wanted: dict[Part, tuple[str, int]] = {
        "train": ("sampling.train_sequences", sizes.train_sequences),
        "eval": ("sampling.eval_sequences", sizes.eval_sequences),
    }
    if truth.model == "train" and truth.training:
        wanted["judge"] = ("truth.training.batch_sequences", truth.training.batch_sequences)
    if (judge := truth.trained_second_judge) and judge.training:
        name = "truth.second_judge.training.batch_sequences"
        wanted["second-judge"] = (name, judge.training.batch_sequences)
    parts = _parts(config)
    for part, (name, number) in wanted.items():
        rows = _rows(part, parts[part], config, tokenizer)
        if len(rows) < number:
            raise InputError(
                f"{name}={number}: truth.corpus={config.truth.corpus} makes {len(rows)} rows of "
                f"{config.length} tokens for it; expected at most that many, or other shares "
                "(truth.judge_share, truth.held_out_share)"
            )
