"""Log-probabilities of stored ids under a model, without logits of a whole batch in memory."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdhpc.models import exact_matmuls


def counted(
    length: Tensor, width: int, *, num_prompt: int, ended: Tensor, count_eos: bool
) -> Tensor:
    """Which tokens are trained on and scored.

    Args:
        length: [B] tokens of each row, a drawn end-of-sequence token included.
        width: columns L of the ids.
        num_prompt: tokens of the prompt, which never count.
        ended: [B] bool, whether the last token of the row is the end-of-sequence token.
        count_eos: whether that token counts.

    Returns:
        [B, L] bool.
    """
    stop = length if count_eos else length - ended.to(length.dtype)
    position = torch.arange(width, device=length.device)
    return (position >= num_prompt) & (position < stop[:, None])


@torch.inference_mode()
def token_log_probs(model: PreTrainedModel, ids: Tensor, *, head_tokens: int) -> Tensor:
    """Log p(token | tokens before it) for every token but the first of each row.

    The body runs in the model's dtype; logits and log-softmax are float32, for `head_tokens`
    positions at a time. Rows are padded on the right; attention is causal, so padding is never
    seen.

    Args:
        model: any causal language model of transformers.
        ids: [B, L] int64.
        head_tokens: positions whose logits [head_tokens, V] are in memory at once.

    Returns:
        [B, L] float32 in nats; column 0 is NaN.
    """
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1]
    weight = model.get_output_embeddings().weight.float()
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
    found = torch.full(ids.shape, torch.nan, device=ids.device)
    with exact_matmuls():
        parts = [
            _picked(flat[at : at + head_tokens].float() @ weight.T, targets[at : at + head_tokens])
            for at in range(0, len(flat), head_tokens)
        ]
    found[:, 1:] = torch.cat(parts).view(hidden.shape[:2])
    return found


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return chosen - logits.logsumexp(dim=1)
