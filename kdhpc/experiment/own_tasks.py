"""Tasks that kdhpc makes itself: items with a right and a wrong ending of the same length.

An untrained model does not score one half on such pairs by itself: it prefers short endings, and
some words to others. So both endings have the same number of characters and of tokens, and items
come in mirrored twos, in which each of two endings (or subjects) is right once; a model that does
not notice what is asked is right in exactly one of them. Only corrupted texts have no mirror:
there, two words change places.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

from kdhpc import seeding
from kdhpc.config import downstream as config
from kdhpc.errors import InputError

LENGTH_WITH_EXAMPLES = 128
"""Shortest length in tokens of a sequence that has room for examples before an instruction."""
Encode = Callable[[str], Sequence[int]]
"""Function from a text to its token ids, which raises `InputError` if it has none."""

_THREE_LETTERS = """
sun map ice oak cat dog cup pen box hat key car bus egg arm leg sea sky day bed red old new big hot
wet dry top end way man boy job law war gas oil tax art age air bar bay bit cow cut ear eye fan fat
fox fun gun hen ink jam jar kid lip mud net nut pan pig pin pot rat row
"""
WORDS = tuple(_THREE_LETTERS.split())
"""Common words of three letters, which are one token in most vocabularies."""
SPEAKERS = (
    "The man said that", "The girl thinks that", "The boy heard that", "The note says that",
    "The king knew that", "The paper wrote that",
)  # fmt: skip
SUBJECTS = (("he", "we"), ("she", "you"), ("it", "we"))
"""A subject of singular verbs and one of plural verbs, with equally many letters."""
BE = (("was", "were"), ("is", "are"))
ADJECTIVES = ("late", "here", "old", "home", "ready", "sick", "rich", "near")
VERBS = (
    ("likes", "like"), ("knows", "know"), ("wants", "want"), ("needs", "need"),
    ("makes", "make"), ("takes", "take"), ("has", "have"),
)  # fmt: skip
OBJECTS = ("it", "this", "more", "time", "money", "food")
FAR_PLACES = ((0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4))
"""Two places in a list of six words of which neither is next to the other."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A context with two endings, one of which is right."""

    context: str
    endings: tuple[str, str]
    """Both start with a space, and have as many characters and tokens as each other."""
    right: int
    """Index of the right ending."""
    cluster: int
    """Number of the two items that mirror each other, or of the item that has no mirror."""


def make_items(
    task: str, *, seed: int, num_items: int, length: int, encode: Encode, texts: Sequence[str]
) -> list[Item]:
    """Make the items of a task; they depend on the arguments alone.

    Args:
        task: one of kdhpc's own tasks with right and wrong endings.
        seed: seed of the run.
        num_items: largest number of items, at least 2; items are made two at a time.
        length: number of tokens of a sequence.
        encode: token ids of a text.
        texts: truth's evaluation set.

    Raises:
        InputError: if truth's evaluation set, or the words that the tokenizer takes for equally
            many tokens, make no item.
    """
    words = _of_equal_tokens(encode)
    if task in (config.INSTRUCTIONS, config.ANSWERS):
        made = _instructions(seed, words, with_examples=length >= LENGTH_WITH_EXAMPLES)
    elif task == config.PAIRS:
        made = _pairs(seed, encode)
    elif task == config.INDUCTION:
        made = _induction(seed, words)
    elif task == config.CLOZE:
        made = _cloze(texts, encode)
    elif task == config.CORRUPTED:
        made = _corrupted(seed, texts, encode)
    else:
        raise ValueError(f"{task}: has no items with two endings")
    of_both = 1 if task == config.CORRUPTED else 2
    items = list(islice(made, num_items // of_both * of_both))
    if not items:
        raise InputError(
            f"downstream.tasks: no item can be made for {task}; expected words in truth's "
            "evaluation set, which more or longer sequences may have (sampling.eval_sequences, "
            "length), or no such task"
        )
    return items


def _mirrored(
    cluster: int, contexts: tuple[str, str], endings: tuple[str, str]
) -> tuple[Item, Item]:
    """Return the two items whose right endings are the first and the second."""
    one, two = (
        Item(context=context, endings=endings, right=right, cluster=cluster)
        for right, context in enumerate(contexts)
    )
    return one, two


def _of_equal_tokens(encode: Encode) -> list[str]:
    """Return the words that have, after a space, the number of tokens that most words have."""
    num_tokens = {word: _num_tokens(encode, f" {word}") for word in WORDS}
    most = Counter(num_tokens.values()).most_common(1)[0][0]
    return [word for word in WORDS if num_tokens[word] == most]


def _drawn(words: Sequence[str], seed: int, task: str, cluster: int, number: int) -> list[str]:
    """Return different words that are drawn for the items of a cluster."""
    order = seeding.permutation(seed, f"downstream/{task}", cluster, len(words))
    return [words[index] for index in order[:number]]


def _instructions(seed: int, of: Sequence[str], *, with_examples: bool) -> Iterator[Item]:
    """Yield commands to repeat four words, also backwards, or the first or last of them."""
    cluster = 0
    while len(of) >= 8:
        words = _drawn(of, seed, "instructions", cluster, 8)
        commands = ("copy", "reverse") if cluster % 2 == 0 else ("first", "last")
        answers = {
            "copy": " ".join(words[:4]),
            "reverse": " ".join(words[3::-1]),
            "first": words[0],
            "last": words[3],
        }
        before = _examples(words[4:], commands) if with_examples else ""
        asked = tuple(f"{before}{command}: {' '.join(words[:4])} =" for command in commands)
        endings = tuple(f" {answers[command]}" for command in commands)
        yield from _mirrored(cluster, (asked[0], asked[1]), (endings[0], endings[1]))
        cluster += 1


def _examples(words: Sequence[str], commands: Sequence[str]) -> str:
    """Return both commands with their answers, a line each."""
    said = " ".join(words)
    answers = {
        "copy": said, "reverse": " ".join(words[::-1]), "first": words[0], "last": words[-1],
    }  # fmt: skip
    return "".join(f"{command}: {said} = {answers[command]}\n" for command in commands)


def _pairs(seed: int, encode: Encode) -> Iterator[Item]:
    """Yield sentences whose verb fits its subject or does not; the verb is the same in both."""
    ends = [*product(BE, ADJECTIVES), *product(VERBS, OBJECTS)]
    subjects = [
        pair
        for pair in SUBJECTS
        if len({_num_tokens(encode, f" {subject}") for subject in pair}) == 1
    ]
    frames = list(product(SPEAKERS, subjects, ends))
    for cluster, index in enumerate(seeding.permutation(seed, "downstream/pairs", 0, len(frames))):
        speaker, (one, two), (verbs, end) = frames[index]
        for right, verb in enumerate(verbs):
            endings = (f" {one} {verb} {end}.", f" {two} {verb} {end}.")
            yield Item(context=speaker, endings=endings, right=right, cluster=cluster)


def _induction(seed: int, of: Sequence[str]) -> Iterator[Item]:
    """Yield six words and one of them again; what followed it before is right."""
    cluster = 0
    while len(of) >= 6:
        words = _drawn(of, seed, "induction", cluster, 6)
        places = FAR_PLACES[cluster % len(FAR_PLACES)]
        contexts = [f"{' '.join(words)} {words[place]}" for place in places]
        endings = [f" {words[place + 1]}" for place in places]
        yield from _mirrored(cluster, (contexts[0], contexts[1]), (endings[0], endings[1]))
        cluster += 1


def _num_tokens(encode: Encode, text: str) -> int:
    """Return the number of tokens of a text; 0 if a vocabulary that was cut lacks one of them."""
    try:
        return len(encode(text))
    except InputError:
        return 0


def _cloze(texts: Sequence[str], encode: Encode) -> Iterator[Item]:
    """Yield texts of the truth without their last whole word; that of another text is wrong."""
    waiting: dict[tuple[int, int], tuple[str, str]] = {}
    cluster = 0
    for text in texts:
        pieces = text.split(" ")
        word = pieces[-2] if len(pieces) > 3 else ""
        if not word.isalpha():
            continue
        context, ending = " ".join(pieces[:-2]), f" {word}"
        shape = (len(ending), _num_tokens(encode, ending))
        other = waiting.get(shape)
        if other is None:
            waiting[shape] = (context, ending)
        elif other[1] != ending:
            del waiting[shape]
            yield from _mirrored(cluster, (other[0], context), (other[1], ending))
            cluster += 1


def _corrupted(seed: int, texts: Sequence[str], encode: Encode) -> Iterator[Item]:
    """Yield texts of the truth; the wrong ending has two neighbouring words exchanged."""
    cluster = 0
    for row, text in enumerate(texts):
        pieces = text.split(" ")[:-1]  # the last one may be cut off
        places = [
            place
            for place in range(1, len(pieces) - 1)
            if pieces[place].isalpha()
            and pieces[place + 1].isalpha()
            and pieces[place] != pieces[place + 1]
        ]
        if not places:
            continue
        drawn = seeding.permutation(seed, "downstream/corrupted", row, len(places))[0]
        place = places[drawn]
        swapped = [*pieces[:place], pieces[place + 1], pieces[place], *pieces[place + 2 :]]
        whole, damaged = (f" {' '.join(some[1:])}" for some in (pieces, swapped))
        if _num_tokens(encode, whole) == _num_tokens(encode, damaged):
            right = cluster % 2
            endings = (damaged, whole) if right else (whole, damaged)
            yield Item(context=pieces[0], endings=endings, right=right, cluster=cluster)
            cluster += 1
