"""Score texts under a model with another tokenizer than the one that their sequences have.

A sequence is decoded, and its text is encoded again by the model's own tokenizer. What is scored is
the text between prompt and end: the sum over its tokens of their log-probabilities, given the
prompt. It is the probability of one way to write the text in tokens, the tokenizer's own. An end
token is not scored, because those of two models need not mean the same. Divided by the number of
characters, Unicode code points, it compares models with different tokens.

Bytes that are no character are scored as the replacement character that a reader sees, and so are
characters that the tokenizer has no token for. To leave out texts that have any would choose the
better ones: small models of bytes write some in 40 % of texts of 63 bytes.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kdhpc.errors import InputError
from kdhpc.models.devices import Linear
from kdhpc.models.loading import LanguageModel
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.scorer import score
from kdhpc.storage.score_shards import Scores
from kdhpc.storage.token_shards import Samples, padded

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Character that decoders put in place of bytes that are no character."""
PARTS = 8
"""Parts of a batch, by number of tokens, that are scored one after the other."""


def texts_of(samples: Samples, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[str | None]:
    """Return the texts of sequences between prompt and end.

    Args:
        samples: N sequences.
        tokenizer: tokenizer of their ids.
        prompt_ids: ids of the prompt that each of them starts with.

    Returns:
        N texts, in which bytes that are no character are replaced, as where a sequence begins or
        ends inside of one; None if the text of a sequence does not begin with that of the prompt.
    """
    ends = {tokenizer.eos, *tokenizer.other_ends}
    prompt, texts = tokenizer.decode(prompt_ids), []
    for ids, length in zip(samples.ids, samples.length, strict=True):
        stop = int(length)
        if stop > len(prompt_ids) and int(ids[stop - 1]) in ends:
            stop -= 1
        whole = tokenizer.decode(ids[:stop].tolist())
        texts.append(whole.removeprefix(prompt) if whole.startswith(prompt) else None)
    return texts


def encode(text: str, tokenizer: Tokenizer, prompt: str) -> list[int] | None:
    """Return the ids of a prompt and a text as a tokenizer writes them.

    The two are encoded together. If a token would span their border, they are encoded one by one,
    so that the tokens of the text are always those after the tokens of the prompt.

    Args:
        text: the text.
        tokenizer: the tokenizer.
        prompt: the prompt, which the tokenizer's begin token precedes if the tokenizer says so.

    Returns:
        The ids; None if the tokenizer can write the text neither way, as one that puts a space
        before each text that is encoded by itself.
    """
    prompt_ids = tokenizer.prompt_ids(prompt)
    begin = prompt_ids[: len(prompt_ids) - len(tokenizer.text_ids(prompt))]
    ids = [*begin, *tokenizer.text_ids(prompt + text)]
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids
    ids = [*prompt_ids, *tokenizer.text_ids(text)]
    return ids if tokenizer.decode(ids) == tokenizer.decode(prompt_ids) + text else None


def unwritable(texts: Sequence[str | None], tokenizer: Tokenizer) -> dict[int, str]:
    """Return the characters of texts that a tokenizer leaves out, for `str.translate`.

    Some tokenizers of bytes lack those of control characters, which they pass over in silence.
    """
    characters = set().union(*(text for text in texts if text is not None))
    return {
        ord(character): REPLACEMENT
        for character in characters
        if character not in tokenizer.decode(tokenizer.text_ids(character))
    }


def score_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str | None],
    *,
    prompt: str,
    num_positions: int | None,
    batch_rows: int,
    head_tokens: int,
    head: Linear | None = None,
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> tuple[Scores, int]:
    """Compute the log-probabilities of texts.

    Args:
        model: the model that scores.
        tokenizer: its tokenizer.
        texts: N texts; None for one that is left out.
        prompt: text that comes before each of them, and is not scored.
        num_positions: largest number of tokens of a row, prompt included; None for any. Longer
            texts are left out.
        batch_rows: number of consecutive texts whose parts of similar length are scored together.
        head_tokens: largest number of positions whose logits are in memory at once.
        head: function from hidden states [N, H] to float32 logits [N, V]; the model's own if None.
        on_batch: called after each batch with the number of texts scored so far.

    Returns:
        Scores, with `num_tokens` in tokens of this model, `num_characters` and `num_replaced`; all
        are 0 for a text that is empty or left out. Then the number of texts that are left out.

    Raises:
        InputError: if all texts are longer than the model's positions.
    """
    prompt_ids = tokenizer.prompt_ids(prompt)
    counting = Counting(num_prompt=len(prompt_ids), eos=tokenizer.eos, count_eos=True)
    replaced = unwritable(texts, tokenizer)
    texts = [None if text is None else text.translate(replaced) for text in texts]
    encoded = [None if text is None else encode(text, tokenizer, prompt) for text in texts]
    lengths = [len(ids) for ids in encoded if ids is not None]
    if num_positions is not None and lengths and min(lengths) > num_positions:
        raise InputError(
            f"the model has {num_positions} positions, and the shortest of {len(lengths)} texts "
            f"has {min(lengths)} of its tokens; expected a model of longer texts, or a smaller "
            "length"
        )
    kept = [
        ids if ids is not None and len(ids) <= (num_positions or len(ids)) else None
        for ids in encoded
    ]
    log_prob_sum, num_tokens = np.zeros(len(texts)), np.zeros(len(texts), np.int32)
    for start in range(0, len(texts), batch_rows):
        batch = [row for row in range(len(texts))[start : start + batch_rows] if kept[row]]
        batch.sort(key=lambda row: len(kept[row] or ()))  # rows of a part are padded to its longest
        for part in np.array_split(np.array(batch, int), PARTS):
            rows = [kept[row] or [] for row in part]
            if not rows:
                continue
            [scores] = score(
                model,
                padded(rows, max(2, *map(len, rows)), tokenizer.size),
                counting=counting,
                batch_rows=batch_rows,
                head_tokens=head_tokens,
                head=head,
            ).values()
            log_prob_sum[part], num_tokens[part] = scores.log_prob_sum, scores.num_tokens
        on_batch(min(start + batch_rows, len(texts)))
    scored = [
        "" if text is None or ids is None else text for ids, text in zip(kept, texts, strict=True)
    ]
    left_out = sum(ids is None for ids in kept)
    return (
        Scores(
            log_prob_sum=log_prob_sum,
            num_tokens=num_tokens,
            num_characters=np.array([len(text) for text in scored], np.int32),
            num_replaced=np.array([text.count(REPLACEMENT) for text in scored], np.int32),
        ),
        left_out,
    )
