"""The part of a tokenizer that a run needs: ids of the prompt and the end-of-sequence id.

It uses the tokenizers library directly, which is imported in a hundredth of the time of
transformers.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.errors import DamagedError, InputError

if TYPE_CHECKING:
    import tokenizers


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


class Tokenizer:
    """The tokenizer inside a checkpoint folder, as transformers writes it."""

    def __init__(self, path: Path) -> None:
        """Read the tokenizer of a checkpoint folder.

        Raises:
            DamagedError: if its files are not readable.
            InputError: if there is no tokenizer.json, or no end-of-sequence token.
        """
        self._tokenizer = read(path)
        try:
            token = json.loads((path / "tokenizer_config.json").read_bytes()).get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise DamagedError(f"{path}: no readable tokenizer_config.json ({error})") from error
        text = token.get("content") if isinstance(token, dict) else token
        eos = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        if eos is None:
            raise InputError(
                f"{path}: its tokenizer has no end-of-sequence token; expected a model whose "
                "sequences end"
            )
        self.eos: int = eos
        """Id of the end-of-sequence token."""
        self.size: int = max(self._tokenizer.get_vocab().values()) + 1
        """Number of ids; one more than the largest, as some tokenizers leave ids out."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids of the prompt, without special tokens.

        Raises:
            InputError: if the prompt has no tokens.
        """
        return prompt_ids(self._tokenizer, prompt)
