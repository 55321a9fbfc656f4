"""How tokens are selected when a model is sampled: by temperature and truncation."""

from dataclasses import dataclass, field

from kdhpc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Temperature and truncation of the distribution that tokens are drawn from, or its weights.

    The same object is used from the command line to the draw. The defaults leave the model's
    distribution as it is.
    """

    tau: float = 1.0
    """Temperature, which divides the logits."""
    top_k: int = 0
    """Number of most likely tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Probability of the smallest set of most likely tokens to keep; 1 keeps all."""
    beta: float = field(default=1.0, metadata={"added": True})
    """Exponent of the weights of a mixture that is sampled in the place of a teacher."""

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """Parse a truncation such as `top_k=50` or `top_p=0.9`.

        Raises:
            InputError: if the text is anything else.
        """
        name, _, value = text.partition("=")
        try:
            if name == "top_k" and int(value) >= 1:
                return cls(top_k=int(value))
            if name == "top_p" and 0 < float(value) < 1:
                return cls(top_p=float(value))
        except ValueError:
            pass
        raise InputError(f"expected every item to be like top_k=50 or top_p=0.9, got {text!r}")

    @property
    def keeps_all(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return self == Selection()

    @property
    def name(self) -> str:
        """Name of the selection in names of arms: `tau0.8`, `topk50`, `topp0.9`, `beta2`."""
        if self.top_k:
            return f"topk{self.top_k}"
        if self.top_p < 1.0:
            return f"topp{self.top_p:g}"
        if self.beta != 1.0:
            return f"beta{self.beta:g}"
        return f"tau{self.tau:g}"
