"""The logits of a model: the product with its head, and what its architecture makes of that."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Logits:
    """How logits follow from the products of hidden states and head.

    Besides the product, some architectures have a bias (GPT-J, Phi), divide or multiply by a
    constant (Granite, Cohere), or cap the logits softly (Gemma 2). Sampling, scoring and training
    share this definition.
    """

    factor: float = 1.0
    cap: float | None = None
    """Bound that the logits approach but do not reach, by a tanh."""

    @staticmethod
    def of(config: Any) -> "Logits":
        """Return the definition of a config of transformers."""
        factor = getattr(config, "logit_scale", None) or 1.0
        factor /= getattr(config, "logits_scaling", None) or 1.0
        return Logits(factor=factor, cap=getattr(config, "final_logit_softcapping", None))

    def from_products(self, products: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits.

        Args:
            products: [N, V] float32; they are overwritten.
            bias: [V]; None if the head has none.

        Returns:
            [N, V] float32.
        """
        if bias is not None:
            products.add_(bias)
        if self.factor != 1.0:
            products.mul_(self.factor)
        if self.cap is not None:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return the derivative of the cap by its argument; None if there is no cap.

        Args:
            logits: [N, V] float32; they are overwritten.

        Returns:
            [N, V] float32.
        """
        return None if self.cap is None else logits.div_(self.cap).square_().neg_().add_(1.0)

    def gradient(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Return the gradient of the products, bias included, from that of the logits.

        Args:
            gradient: [N, V] float32; it is overwritten.
            slope: what `slope` returned for the logits.

        Returns:
            [N, V] float32.
        """
        if slope is not None:
            gradient.mul_(slope)
        return gradient if self.factor == 1.0 else gradient.mul_(self.factor)


PLAIN = Logits()
"""Logits that are the products themselves, as of a Llama."""
