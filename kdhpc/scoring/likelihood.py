"""Log-probabilities of stored ids under a model, without logits of a whole batch in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc.models.devices import Linear, exact_matmuls
from kdhpc.models.loading import LanguageModel

CPU_HEAD_TOKENS = 128
"""Positions whose logits stay in a CPU's cache between the product and the softmax."""


@torch.inference_mode()
def token_log_probs(
    model: LanguageModel,
    ids: Tensor,
    *,
    head_tokens: int,
    taus: Sequence[float] = (1.0,),
    head: Linear | None = None,
) -> Tensor:
    """Log p(token | tokens before it) for every token but the first of each row.

    The body runs once, in the model's dtype; logits and log-softmax are float32, for `head_tokens`
    positions at a time. Rows are padded on the right; attention is causal, so padding is never
    seen.

    Args:
        model: a causal language model whose logits are a product with its head.
        ids: [B, L] int64.
        head_tokens: most positions whose logits [head_tokens, V] are in memory at once.
        taus: temperatures, each of which divides the logits.
        head: float32 logits [N, V] of hidden states [N, H]; the model's own if None.

    Returns:
        [len(taus), B, L] float32 in nats; column 0 is NaN.

    Raises:
        InputError: for a model whose logits are something else.
    """
    head, targets = head or model.head, ids[:, 1:].reshape(-1)
    size = min(head_tokens, CPU_HEAD_TOKENS) if ids.device.type == "cpu" else head_tokens
    picked = torch.empty((len(taus), len(targets)), device=ids.device)
    with exact_matmuls():
        hidden = model.hidden(ids)[:, :-1]
        flat = hidden.reshape(len(targets), -1)
        for at in range(0, len(targets), size):
            logits, wanted = head(flat[at : at + size]), targets[at : at + size, None]
            for found, tau in zip(picked, taus, strict=True):
                log_p = (logits if tau == 1.0 else logits / tau).log_softmax(1)
                found[at : at + size] = log_p.gather(1, wanted).squeeze(1)
    return functional.pad(picked.view(-1, *hidden.shape[:2]), (1, 0), value=torch.nan)
