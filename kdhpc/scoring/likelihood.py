"""Log-probabilities of given ids under a model, without the logits of a whole batch in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc.models.devices import Linear, exact_matmuls
from kdhpc.models.loading import LanguageModel

CPU_HEAD_TOKENS = 128
"""Number of positions whose logits stay in a CPU's cache between the product and the softmax."""


@torch.inference_mode()
def token_log_probs(
    model: LanguageModel,
    ids: Tensor,
    *,
    head_tokens: int,
    taus: Sequence[float] = (1.0,),
    head: Linear | None = None,
) -> Tensor:
    """Compute log p(token | tokens before it) for every token but the first of each row.

    The body runs once, in the model's dtype. Logits and log-softmax are float32 and are computed
    for at most `head_tokens` positions at a time. Rows are padded on the right, so causal attention
    never sees the padding.

    Args:
        model: a causal language model.
        ids: [B, L] int64.
        head_tokens: largest number of positions whose logits are in memory at once.
        taus: temperatures, each of which divides the logits.
        head: function from hidden states [N, H] to float32 logits [N, V]; the model's own if None.

    Returns:
        [len(taus), B, L] float32 in nats; column 0 is NaN.

    Raises:
        InputError: if the model's logits are more than a product of hidden states and its head.
    """
    head, targets = head or model.head, ids[:, 1:].reshape(-1)
    size = min(head_tokens, CPU_HEAD_TOKENS) if ids.device.type == "cpu" else head_tokens
    picked = torch.empty((len(taus), len(targets)), device=ids.device)
    with exact_matmuls():
        hidden = model.hidden(ids)[:, :-1]
        flat = hidden.reshape(len(targets), -1)
        for at in range(0, len(targets), size):
            logits, target = head(flat[at : at + size]), targets[at : at + size, None]
            for log_prob, tau in zip(picked, taus, strict=True):
                log_p = (logits if tau == 1.0 else logits / tau).log_softmax(1)
                log_prob[at : at + size] = log_p.gather(1, target).squeeze(1)
    return functional.pad(picked.view(-1, *hidden.shape[:2]), (1, 0), value=torch.nan)
