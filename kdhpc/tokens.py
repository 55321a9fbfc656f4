"""What a run needs of a tokenizer: ids of the prompt, and the id that ends a sequence.

By the library below transformers, which starts in a hundredth of the time.
"""

import json
from pathlib import Path

from kdhpc.errors import DamagedError, InputError


class Tokenizer:
    """The tokenizer inside a checkpoint folder, as transformers writes it."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            DamagedError: if it is not readable.
            InputError: if there is none that this library reads, or it has no end of sequence.
        """
        import tokenizers

        file = path / "tokenizer.json"
        if not file.exists():
            raise InputError(f"{path}: has no tokenizer.json; expected a checkpoint with one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            config = json.loads((path / "tokenizer_config.json").read_bytes())
        except MemoryError:
            raise
        except Exception as error:  # tokenizers raises nothing more special
            raise DamagedError(f"{path}: its tokenizer.json is not readable ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        token = config.get("eos_token")
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
        ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        if not ids:
            raise InputError(
                f"prompt={prompt!r}: the tokenizer makes no token of it; expected at least one"
            )
        return ids
