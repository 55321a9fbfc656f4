"""Prompts: many texts that sequences start with, in place of one.

Row i of a sample set starts with prompt i % P of its P prompts and is that prompt's sample i // P.
Its random numbers belong to the prompt and to the number of the sample, so they do not depend on
which other prompts there are, or on the order in which a file has them.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from kdhpc import addition, docstrings
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import InputError
from kdhpc.plan.shards import ADDED
from kdhpc.types import Json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.sampling.sampler import Prompt
    from kdhpc.storage.token_shards import Samples

Part = Literal["train", "eval"]
Entry: TypeAlias = str
"""A prompt as a line of its file has it, in canonical JSON: `text` or `messages`, and perhaps
`answer` or `reference`."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Settings that determine the prompts of an arm, besides the run's seed and the tokenizer."""

    fingerprint: str
    """Digest of all prompts; where they are kept determines nothing."""
    held_out_share: float
    part: Part
    texts: str = field(default="", metadata=ADDED)
    """Digest of the texts that the chat template makes of messages; empty without messages."""

    @staticmethod
    def of(config: LanguageConfig, part: Part) -> "Prompts | None":
        """Return those of a part of a run; None if all sequences start with `prompt`."""
        if config.prompts is None:
            return None
        return Prompts(
            fingerprint=config.prompts_fingerprint,
            held_out_share=config.held_out_prompts,
            part=part,
            texts=config.prompts_texts,
        )


def read_prompts(source: str) -> list[Entry]:
    """Read prompts, each once, in an order that does not depend on that of the file.

    Args:
        source: a name of `BUILT_IN`, or a `.jsonl` file.

    Raises:
        InputError: if a line is no prompt; the message names it.
    """
    if source in BUILT_IN:
        entries = {_canonical(content) for content in BUILT_IN[source]()}
    else:
        entries = {*_lines(source)}
    known: dict[str, Entry] = {}
    for entry in entries:
        if known.setdefault(_digest(entry), entry) != entry:
            raise InputError(
                f"prompts={source}: {_shown(entry)}: has two answers or two references; "
                "expected each prompt once, or the same ones"
            )
    if any("reference" in json.loads(entry) for entry in known.values()) and not (
        importlib.util.find_spec("rouge_score")
    ):
        raise InputError(
            f"prompts={source}: has references, with which rouge-score compares texts; expected "
            "pip install 'kdhpc[downstream]'"
        )
    return sorted(entries, key=_digest)


def fingerprint_of(entries: Sequence[Entry]) -> str:
    """Return the digest of prompts as 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def other_texts(source: str) -> str:
    """Return the error of messages of which the chat template makes other texts than before."""
    return (
        f"prompts={source}: the chat template makes other texts of the messages than when the run "
        "was submitted; expected the template that the model had"
    )


def changed(source: str, fingerprint: str) -> str:
    """Return the error of prompts that are no longer those that a run was submitted with."""
    return (
        f"prompts={source}: have changed since the run was submitted; expected those with "
        f"fingerprint {fingerprint[:12]}"
    )


def digest_of_texts(entries: Sequence[Entry], tokenizer: "Tokenizer") -> str:
    """Return the digest of what the chat template makes of messages; empty without messages.

    Raises:
        InputError: if there is no chat template that can be used.
    """
    texts = [
        _text(json.loads(entry), tokenizer) for entry in entries if "messages" in json.loads(entry)
    ]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest() if texts else ""


def part_of(entries: Sequence[Entry], part: Part, held_out_share: float, seed: int) -> list[Entry]:
    """Return the prompts of the training sets or of the evaluation sets.

    A prompt is in the same part whatever other prompts there are. If none are held out, both parts
    have all of them.
    """
    if not held_out_share:
        return list(entries)
    chosen = []
    for entry in entries:
        digest = hashlib.sha256(f"{seed}\0{_digest(entry)}".encode()).hexdigest()
        place = int(digest[:16], 16) / 16**16
        if (place < held_out_share) == (part == "eval"):
            chosen.append(entry)
    return chosen


def prompts_of(
    tokenizer: "Tokenizer",
    *,
    prompt: str,
    begin: str,
    prompts: Prompts | None = None,
    source: str | None = None,
    seed: int = 0,
) -> "tuple[Prompt, ...]":
    """Return what the sequences of an arm start with, as ids.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: the only prompt, if there are no others.
        begin: whether the begin token comes first, as the config has it.
        prompts: which of many prompts it has instead.
        source: where these are.
        seed: seed of the run.

    Raises:
        InputError: if the prompts have changed since the run was submitted, or have no ids.
    """
    from kdhpc.sampling.sampler import Prompt

    if prompts is None or source is None:
        return (Prompt(ids=tuple(tokenizer.prompt_ids(prompt, begin))),)
    entries = read_prompts(source)
    if prompts.fingerprint not in {"", fingerprint_of(entries)}:
        raise InputError(changed(source, prompts.fingerprint))
    if prompts.texts not in {"", digest_of_texts(entries, tokenizer)}:
        raise InputError(other_texts(source))
    return tuple(
        Prompt(
            ids=tuple(_ids(entry, tokenizer, begin)),
            stream=_digest(entry)[:16],
            answer=json.loads(entry).get("answer"),
            reference=json.loads(entry).get("reference"),
        )
        for entry in part_of(entries, prompts.part, prompts.held_out_share, seed)
    )


def right_answers(
    samples: "Samples", prompts: "Sequence[Prompt]", first_row: int, tokenizer: "Tokenizer"
) -> "NDArray[np.uint8] | None":
    """Return which sequences [N] end with the right answer as their last line, as 0 and 1.

    A sequence that was cut before its end is wrong: its answer may be the start of another one.

    Args:
        samples: N sequences of consecutive rows.
        prompts: what they start with.
        first_row: index of the first row.
        tokenizer: the tokenizer of the model.

    Returns:
        None if not every prompt has an answer.
    """
    import numpy as np

    if any(prompt.answer is None for prompt in prompts):
        return None
    right = np.zeros(len(samples), np.uint8)
    for row, (prompt, text, ended) in enumerate(_drawn(samples, prompts, first_row, tokenizer)):
        right[row] = ended and text.strip().rpartition("\n")[2].strip() == prompt.answer
    return right


def likeness(
    samples: "Samples", prompts: "Sequence[Prompt]", first_row: int, tokenizer: "Tokenizer"
) -> "NDArray[np.float32] | None":
    """Return how like its reference each text [N] after a prompt is: the F measure of ROUGE-L.

    It is that of rouge-score: the longest common subsequence of words, which are runs of a to z
    and digits, whatever their case. 0 is the least and 1 the most, and a text without words has 0.
    A sequence that was cut counts as far as it goes.

    Args:
        samples: N sequences of consecutive rows.
        prompts: what they start with.
        first_row: index of the first row.
        tokenizer: the tokenizer of the model.

    Returns:
        None if not every prompt has a reference.

    Source:
        C.-Y. Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004).
    """
    if any(prompt.reference is None for prompt in prompts):
        return None
    import numpy as np
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    likest = np.zeros(len(samples), np.float32)
    for row, (prompt, text, _) in enumerate(_drawn(samples, prompts, first_row, tokenizer)):
        likest[row] = scorer.score(prompt.reference, text)["rougeL"].fmeasure
    return likest


def _drawn(
    samples: "Samples", prompts: "Sequence[Prompt]", first_row: int, tokenizer: "Tokenizer"
) -> "Iterator[tuple[Prompt, str, bool]]":
    """Yield of each sequence its prompt, the text after it, and whether that has ended."""
    ends = {tokenizer.eos, *tokenizer.other_ends}
    for row, (ids, length) in enumerate(zip(samples.ids, samples.length, strict=True)):
        prompt = prompts[(first_row + row) % len(prompts)]
        drawn = ids[len(prompt.ids) : length].tolist()
        ended = bool(drawn) and drawn[-1] in ends
        yield prompt, tokenizer.decode(drawn[:-1] if ended else drawn), ended


def all_ids(
    tokenizer: "Tokenizer",
    *,
    prompt: str,
    begin: str,
    source: str | None,
    length: int | None = None,
) -> list[int]:
    """Return the ids of all prompts of a run, one after the other.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: the only prompt, if there are no others.
        begin: whether the begin token comes first, as the config has it.
        source: where other prompts are.
        length: number of tokens of a sequence, which must leave room for one more; None to check
            nothing.

    Raises:
        InputError: if a prompt has no tokens, or too many.
    """
    if source is None:
        prompts = {f"prompt={prompt!r}": tokenizer.prompt_ids(prompt, begin)}
    else:
        prompts = {
            f"prompts={source}: {_shown(entry)}": _ids(entry, tokenizer, begin)
            for entry in read_prompts(source)
        }
    for name, ids in prompts.items():
        if length is not None and len(ids) >= length:
            raise InputError(f"{name}: has {len(ids)} tokens; expected fewer than length={length}")
    return [i for ids in prompts.values() for i in ids]


def num_prompts(config: LanguageConfig) -> int:
    """Return the number of prompts of evaluation sets.

    Raises:
        InputError: if they, or training sets, have none.
    """
    entries, share = read_prompts(config.prompts or ""), config.held_out_prompts
    num_train = len(part_of(entries, "train", share, config.seed))
    num_eval = len(part_of(entries, "eval", share, config.seed))
    if not num_train or num_eval < 2:
        raise InputError(
            f"held_out_prompts={share:g}: leaves {num_train} of {len(entries)} prompts for "
            f"training sets and {num_eval} for evaluation sets; expected at least one and two, or "
            "0, with which both have all of them"
        )
    return num_eval


def _ids(entry: Entry, tokenizer: "Tokenizer", begin: str) -> list[int]:
    """Return the ids of a prompt; messages are put through the model's chat template."""
    content = json.loads(entry)
    if "text" in content:
        return tokenizer.prompt_ids(content["text"], begin)
    return tokenizer.prompt_ids(_text(content, tokenizer), "never")


def _text(content: Json, tokenizer: "Tokenizer") -> str:
    """Put messages through the model's chat template."""
    from kdhpc.models import huggingface

    return huggingface.chat_text(tokenizer.path, content["messages"])


def have(what: Literal["answer", "reference"], source: str) -> bool:
    """Return whether every prompt has an answer, or a reference."""
    return all(what in json.loads(entry) for entry in read_prompts(source))


def _lines(source: str) -> Iterator[Entry]:
    path = Path(source)
    if path.suffix != ".jsonl" or path.is_dir():
        raise InputError(
            f"prompts={source}: expected a file that ends in .jsonl, or {', '.join(BUILT_IN)}"
        )
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"prompts={source}: not readable ({error.strerror})") from error
    found = False
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = True
            yield _entry(line, f"prompts={source}: line {number}")
    if not found:
        raise InputError(f"prompts={source}: has no lines; expected a prompt in each")


def _entry(line: bytes, name: str) -> Entry:
    """Return the prompt in a line of a file.

    Raises:
        InputError: if it is none.
    """
    expected = 'expected {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    try:
        content: Json = json.loads(line)
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error}); {expected}") from error
    keys = {"text", "messages"} & {*content} if isinstance(content, dict) else set()
    if len(keys) != 1:
        raise InputError(f"{name} has {'both' if keys else 'neither'} of the two; {expected}")
    [key] = keys
    value, answer, reference = content[key], content.get("answer"), content.get("reference")
    if answer is not None and (
        not isinstance(answer, str) or not answer or answer != answer.strip() or "\n" in answer
    ):
        raise InputError(
            f"{name}: its answer is {answer!r}; expected a line of text without space around it"
        )
    if reference is not None and (
        not isinstance(reference, str) or not re.search("[a-z0-9]", reference.lower())
    ):
        raise InputError(
            f"{name}: its reference is {_shown(repr(reference))}; expected text with letters a to "
            "z or digits, which are all that ROUGE-L compares"
        )
    try:
        _canonical(content).encode()
    except UnicodeError as error:
        raise InputError(f"{name} has half a character ({error}); {expected}") from error
    if key == "text":
        if not isinstance(value, str) or not value:
            raise InputError(f"{name}: its text is empty or no text; {expected}")
    elif not _are_messages(value):
        raise InputError(f"{name}: its messages lack a role or a content; {expected}")
    known = {"answer": answer, "reference": reference}
    return _canonical({key: value} | {name: of for name, of in known.items() if of is not None})


def _are_messages(value: Json) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in value
        )
    )


def _canonical(content: Json) -> Entry:
    return json.dumps(content, sort_keys=True, ensure_ascii=False)


def _digest(entry: Entry) -> str:
    """Return the digest of a prompt; its answer and its reference are no part of it."""
    content = {k: v for k, v in json.loads(entry).items() if k not in {"answer", "reference"}}
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _shown(entry: Entry) -> str:
    """Return the start of a prompt for a message."""
    return entry if len(entry) <= 60 else f"{entry[:57]}..."


def _python_signatures() -> list[dict[str, str]]:
    from kdhpc.storage.corpora import BUILT_IN as CORPORA

    sources = "\n".join(CORPORA["python-source"]())
    lines = re.findall(r"^ *(def \w+\([^\n]*\):)$", sources, re.MULTILINE)
    return [{"text": f"{line}\n"} for line in lines if len(line) < LONGEST]


LONGEST = 40
"""Number of characters of the longest signature."""
BUILT_IN = {
    "python-signatures": _python_signatures, "addition": addition.prompts,
    "docstrings": docstrings.prompts,
}  # fmt: skip
"""Prompts that every installation has: the short ones among the first lines of functions in the
modules of Python's standard library that are single files, such as `def read(self, size=-1):`; sums
with their answers (kdhpc/addition.py); docstrings of those modules without their first sentences,
which are the references (kdhpc/docstrings.py)."""
