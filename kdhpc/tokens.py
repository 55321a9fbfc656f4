"""What a run needs of a tokenizer: ids of the prompt, and the id that ends a sequence."""

import json
from collections.abc import Callable
from pathlib import Path

from kdhpc.errors import DamagedError, InputError


class Tokenizer:
    """The tokenizer inside a checkpoint folder."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            DamagedError: if there is none.
            InputError: if it has no end-of-sequence token.
        """
        try:
            kind = _fast if (path / "tokenizer.json").exists() else _of_transformers
            self._encode, self.size, eos = kind(path)
        except Exception as error:  # tokenizers raises nothing more special
            raise DamagedError(f"{path}: has no readable tokenizer ({error})") from error
        if eos is None:
            raise InputError(
                f"{path}: its tokenizer has no end-of-sequence token; expected a model whose "
                "sequences end"
            )
        self.eos: int = eos
        """Id that ends a sequence."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of the prompt, with nothing added.

        Raises:
            InputError: if the tokenizer makes no token of it.
        """
        ids = self._encode(prompt)
        if not ids:
            raise InputError(f"prompt={prompt!r}: the tokenizer makes no token of it")
        return ids


Parts = tuple[Callable[[str], list[int]], int, int | None]
"""How a text becomes ids, the number of ids, and the id that ends a sequence."""


def _fast(path: Path) -> Parts:
    """By the library below transformers, which is imported in a hundredth of the time."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    token = json.loads((path / "tokenizer_config.json").read_bytes()).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return (
        lambda words: tokenizer.encode(words, add_special_tokens=False).ids,
        tokenizer.get_vocab_size(),
        None if text is None else tokenizer.token_to_id(text),
    )


def _of_transformers(path: Path) -> Parts:
    """Kinds that are written in Python only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return (
        lambda words: list(tokenizer(words, add_special_tokens=False)["input_ids"]),
        len(tokenizer),
        tokenizer.eos_token_id,
    )
