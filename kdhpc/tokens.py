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
            DamagedError: if it is not there or not readable.
            InputError: if it has no end-of-sequence token.
        """
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            token = json.loads((path / "tokenizer_config.json").read_bytes()).get("eos_token")
        except Exception as error:  # tokenizers raises nothing more special
            raise DamagedError(f"{path}: its tokenizer is not readable ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        text = token.get("content") if isinstance(token, dict) else token
        eos = None if text is None else self._tokenizer.token_to_id(text)
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
            raise InputError(f"prompt={prompt!r}: the tokenizer makes no token of it")
        return ids
