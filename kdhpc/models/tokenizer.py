"""What a run needs of a tokenizer: ids of the prompt, and the id that ends a sequence.

By the library below transformers, which starts in a hundredth of the time.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.errors import DamagedError, InputError

if TYPE_CHECKING:
    import tokenizers


def read(path: Path) -> "tokenizers.Tokenizer":
    """The tokenizer.json of a checkpoint folder, for texts as they are.

    Raises:
        DamagedError: if it is not readable.
        InputError: if there is none.
    """
    import tokenizers

    file = path / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{path}: has no tokenizer.json; expected a checkpoint with one")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise DamagedError(f"{file}: not a readable tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def prompt_ids(tokenizer: "tokenizers.Tokenizer", prompt: str) -> list[int]:
    """Ids of the prompt, with nothing added.

    Raises:
        InputError: if the tokenizer makes no token of it.
    """
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise InputError(
            f"prompt={prompt!r}: the tokenizer makes no token of it; expected at least one"
        )
    return ids


class Tokenizer:
    """The tokenizer inside a checkpoint folder, as transformers writes it."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            DamagedError: if it is not readable.
            InputError: if there is none, or if its sequences have no end.
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
        """Id that ends a sequence."""
        self.size: int = self._tokenizer.get_vocab_size()
        """Number of ids."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of the prompt, with nothing added.

        Raises:
            InputError: if the tokenizer makes no token of it.
        """
        return prompt_ids(self._tokenizer, prompt)
