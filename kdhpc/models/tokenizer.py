"""The part of a tokenizer that a run needs: ids of the prompt and the end, and text of ids.

It uses the tokenizers library directly, which is imported in a hundredth of the time of
transformers.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.errors import DamagedError, InputError
from kdhpc.types import Json

if TYPE_CHECKING:
    import tokenizers


VOCABULARY = "vocabulary.json"
"""Name of the file in a checkpoint folder whose vocabulary is cut: a list of the id in
tokenizer.json of each id of the model, in increasing order."""


END_OF_TEXT = "<|endoftext|>"
"""Token of the tokenizer of bytes that begins and ends a text."""


def read(path: Path) -> "tokenizers.Tokenizer":
    """Read the tokenizer.json of a checkpoint folder, without truncation or padding.

    Raises:
        DamagedError: if the file is not readable.
        InputError: if the folder has no such file.
    """
    import tokenizers

    file = path / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{path}: has no tokenizer.json; expected a checkpoint with one")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises no narrower class
        raise DamagedError(f"{file}: not a readable tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def byte_tokenizer() -> "tokenizers.Tokenizer":
    """Make a tokenizer of 257 ids: end of text, then the 256 bytes."""
    from tokenizers import Tokenizer as Whole
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: 1 + i for i, symbol in enumerate(alphabet)}
    tokenizer = Whole(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def write_byte_tokenizer(path: Path) -> None:
    """Write the tokenizer of bytes into a folder, as far as `Tokenizer` reads it."""
    byte_tokenizer().save(str(path / "tokenizer.json"))
    config = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def prompt_ids(tokenizer: "tokenizers.Tokenizer", prompt: str) -> list[int]:
    """Return the ids of the prompt, without special tokens.

    Raises:
        InputError: if the prompt has no tokens.
    """
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise InputError(
            f"prompt={prompt!r}: the tokenizer makes no token of it; expected a text with at "
            "least one token"
        )
    return ids


def read_vocabulary(path: Path) -> list[int] | None:
    """Return the id in tokenizer.json of each id of a model; None if its vocabulary is not cut.

    Raises:
        DamagedError: if the file is not a list of increasing ids.
    """
    file = path / VOCABULARY
    if not file.exists():
        return None
    try:
        ids: list[int] = json.loads(file.read_bytes())
        if not ids or any(type(i) is not int for i in ids) or ids != sorted({*ids}) or ids[0] < 0:
            raise ValueError("not a list of increasing ids")
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{file}: not a readable vocabulary ({error})") from error
    return ids


def write_vocabulary(path: Path, ids: Sequence[int]) -> None:
    """Write the ids in tokenizer.json, increasing, of the model in a checkpoint folder."""
    (path / VOCABULARY).write_text(json.dumps([int(i) for i in ids]))


def read_ends(path: Path) -> list[int]:
    """Return the ids that end a sequence in a checkpoint of a run; [] if the tokenizer's alone do.

    They are a list in generation_config.json. A single id there is not read: transformers writes
    one for every model, if need be the default of its architecture.

    Raises:
        OSError, ValueError, AttributeError: if the file is there and not readable.
    """
    file = path / "generation_config.json"
    ends = json.loads(file.read_bytes()).get("eos_token_id") if file.exists() else None
    return [i for i in ends if type(i) is int] if isinstance(ends, list) else []


def given_ends(path: Path) -> list[int]:
    """Return the ids, one or a list, that end a sequence as the files of a given model say.

    As in transformers, config.json decides if there is no generation_config.json.

    Raises:
        DamagedError: if the file is not readable.
    """
    file = path / "generation_config.json"
    if not file.exists():
        file = path / "config.json"
    try:
        ends = json.loads(file.read_bytes()).get("eos_token_id") if file.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedError(f"{file}: its eos_token_id is not readable ({error})") from error
    return [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int]


class Tokenizer:
    """The tokenizer inside a checkpoint folder, as transformers writes it.

    If the model's vocabulary is cut, ids are those of the model; tokenizer.json has the whole one.
    """

    def __init__(self, path: Path, ends: Sequence[int] | None = None) -> None:
        """Read the tokenizer of a checkpoint folder.

        Args:
            path: the folder.
            ends: other ids that end a sequence; None for those of `read_ends`.

        Raises:
            DamagedError: if its files are not readable.
            InputError: if there is no tokenizer.json, or no end-of-sequence token.
        """
        self._tokenizer = read(path)
        self.path = path
        """The folder."""
        self._whole_ids = read_vocabulary(path)
        """Id in tokenizer.json of each id of the model; None if they are the same."""
        self._new_ids = {whole: new for new, whole in enumerate(self._whole_ids or ())}
        try:
            config = json.loads((path / "tokenizer_config.json").read_bytes())
            eos, begin = (self._special_id(config.get(f"{name}_token")) for name in ("eos", "bos"))
            ends = read_ends(path) if ends is None else ends
        except (OSError, ValueError, AttributeError) as error:
            raise DamagedError(f"{path}: its special tokens are not readable ({error})") from error
        if eos is None:
            raise InputError(
                f"{path}: its tokenizer has no end-of-sequence token; expected eos_token in its "
                "tokenizer_config.json"
            )
        self.eos: int = eos
        """Id of the end-of-sequence token."""
        self.begin: int | None = begin
        """Id of the token that may begin a sequence; None if the tokenizer has none."""
        self.size: int = (
            max(self._tokenizer.get_vocab().values()) + 1
            if self._whole_ids is None
            else len(self._whole_ids)
        )
        """Number of ids; one more than the largest, as some tokenizers leave ids out."""
        self.other_ends: tuple[int, ...] = tuple(
            end for end in ends if end != eos and 0 <= end < self.size
        )
        """Other ids of the model that end a sequence as well."""

    def _special_id(self, token: Json) -> int | None:
        """Return the id of a special token of tokenizer_config.json; None if it has none."""
        text = token.get("content") if isinstance(token, dict) else token
        whole = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        return whole if self._whole_ids is None or whole is None else self._new_ids.get(whole)

    def prompt_ids(self, prompt: str, begin: str = "tokenizer") -> list[int]:
        """Return the ids of the prompt; special tokens in its text are tokens of it.

        Args:
            prompt: the text.
            begin: whether the begin token comes first: `tokenizer` if the tokenizer puts it before
                a text by itself, `always`, or `never`. It is not put before a prompt that starts
                with it.

        Raises:
            InputError: if the prompt has no tokens, or one that is not in the vocabulary, or if
                there is no begin token to put first.
        """
        ids = prompt_ids(self._tokenizer, prompt)
        first = self._begin_ids(prompt, begin)
        if ids[: len(first)] != first:
            ids = first + ids
        if self._whole_ids is None:
            return ids
        for whole in ids:
            if whole not in self._new_ids:
                raise InputError(
                    f"prompt={prompt!r}: its token {self._tokenizer.id_to_token(whole)!r} is not "
                    f"in the vocabulary of {self.size} ids; expected a prompt of tokens that are"
                )
        return [self._new_ids[whole] for whole in ids]

    def num_prompt(self, prompt: str, begin: str = "tokenizer") -> int:
        """Return the number of ids of the prompt; 0 if it is empty, because rows have their own."""
        return len(self.prompt_ids(prompt, begin)) if prompt else 0

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens.

        Raises:
            InputError: if it has a token that is not in a vocabulary that was cut.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._whole_ids is None:
            return ids
        if unknown := {*ids} - self._new_ids.keys():
            raise InputError(
                f"truth.corpus: has the token {self._tokenizer.id_to_token(min(unknown))!r}, which "
                f"is not in the vocabulary of {self.size} ids; expected truth.vocabulary=null"
            )
        return [self._new_ids[whole] for whole in ids]

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Return whether each id means the same as in another tokenizer, and the same ids end."""
        if self._tokenizer.get_vocab() != other._tokenizer.get_vocab():
            return False
        mine, theirs = ((t.eos, t.other_ends, t._whole_ids) for t in (self, other))
        return mine == theirs

    def _begin_ids(self, prompt: str, begin: str) -> list[int]:
        """Return the id in tokenizer.json of the begin token if it comes first; else nothing."""
        whole = None if self.begin is None else self._whole(self.begin)
        if begin == "always" and whole is None:
            raise InputError(
                f"begin=always: the tokenizer in {self.path} has no begin token; expected "
                "begin=tokenizer or begin=never"
            )
        if whole is None or begin == "never":
            return []
        by_itself: list[int] = self._tokenizer.encode(prompt).ids[:1]
        return [whole] if begin == "always" or by_itself == [whole] else []

    def _whole(self, new_id: int) -> int:
        """Return the id in tokenizer.json of an id of the model."""
        return int(new_id) if self._whole_ids is None else self._whole_ids[new_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids of the model, special tokens included."""
        whole_ids = [self._whole(i) for i in ids]
        text: str = self._tokenizer.decode(whole_ids, skip_special_tokens=False)
        return text
