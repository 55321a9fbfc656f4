"""A corpus in place of the truth: its documents, split once, and rows cut from them.

A document belongs to one part for good: what a judge learns from, D, or truth's evaluation set.
Which one follows from a digest of its text and the run's seed, so the parts share no document, a
document that occurs twice counts once, and more documents leave the others where they are.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kdhpc.config.language import LanguageConfig, Truth
from kdhpc.errors import InputError

if TYPE_CHECKING:
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.storage.token_shards import Samples

Part = Literal["judge", "train", "eval"]


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
    """Return the share of the documents that a judge learns from: none if it is a given model."""
    return truth.judge_share if truth.model == "train" else 0.0


def split(texts: Sequence[str], truth: Truth, seed: int) -> dict[Part, list[str]]:
    """Return the documents of each part, each once, in an order that their digests give.

    Args:
        texts: documents.
        truth: its `judge_share` and `held_out_share` are those of the documents.
        seed: seed of the run.
    """
    digests = {hashlib.sha256(f"{seed}\0{text}".encode()).digest(): text for text in texts}
    parts: dict[Part, list[str]] = {"judge": [], "train": [], "eval": []}
    for_judge = judge_share(truth)
    for digest, text in sorted(digests.items()):
        place = int.from_bytes(hashlib.sha256(digest).digest()[:8], "big") / 2**64
        if place < for_judge:
            parts["judge"].append(text)
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

    Rows of one document stay together in the judge's part; in the others they are in an order that
    their ids give, so that the first ones come from many documents.

    Raises:
        InputError: if the corpus is not the one that the run was submitted with.
    """
    from kdhpc.storage.corpora import corpus_fingerprint, read_documents

    truth = config.truth
    expected = truth.corpus_fingerprint or truth.fingerprint
    if expected not in {"", corpus_fingerprint(truth.corpus, truth.text_column)}:
        raise InputError(
            f"truth.corpus={truth.corpus}: has changed since the run was submitted; expected the "
            f"text with fingerprint {expected[:12]}"
        )
    texts = split(read_documents(truth.corpus, truth.text_column), truth, config.seed)[part]
    prompt = tokenizer.prompt_ids(config.prompt, config.begin)
    rows = list(pieces(texts, tokenizer, prompt, config.length))
    if part == "judge":
        return rows
    return sorted(rows, key=lambda ids: hashlib.sha256(repr(ids).encode()).digest())


def check_sizes(config: LanguageConfig, tokenizer: "Tokenizer") -> None:
    """Check that the corpus has as many rows as a run asks for.

    Raises:
        InputError: if D or the evaluation set would be too small.
    """
    sizes = config.sampling
    wanted: dict[Part, tuple[str, int]] = {
        "train": ("sampling.train_sequences", sizes.train_sequences),
        "eval": ("sampling.eval_sequences", sizes.eval_sequences),
    }
    for part, (name, number) in wanted.items():
        rows = rows_of(part, config, tokenizer)
        if len(rows) < number:
            raise InputError(
                f"{name}={number}: truth.corpus={config.truth.corpus} makes {len(rows)} rows of "
                f"{config.length} tokens for it; expected at most that many, or other shares "
                "(truth.judge_share, truth.held_out_share)"
            )


def padded(rows: Sequence[Sequence[int]], length: int, num_ids: int) -> "Samples":
    """Return rows as sequences without log-probabilities, which are 0."""
    import numpy as np

    from kdhpc.storage.token_shards import Samples, id_type

    ids: Any = np.zeros((len(rows), length), id_type(num_ids))
    for out, row in zip(ids, rows, strict=True):
        out[: len(row)] = row
    none = np.zeros(len(rows))
    return Samples(
        ids=ids,
        length=np.array([len(row) for row in rows], np.int32),
        log_prob_sum=none,
        log_prob_tau_sum=none,
    )
