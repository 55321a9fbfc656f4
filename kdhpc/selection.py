"""How tokens are selected when a model is sampled: by temperature and truncation."""

from dataclasses import dataclass

from kdhpc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Temperature and truncation of the distribution that tokens are drawn from.

    The same object is used from the command line to the draw. The defaults leave the model's
    distribution as it is.
    """

    tau: float = 1.0
    """Temperature, which divides the logits."""
    top_k: int = 0
    """Number of most likely tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Probability of the smallest set of most likely tokens to keep; 1 keeps all."""

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
        """Name of the selection as part of arm names: `tau0.8`, `topk50`, `topp0.9`."""
        if self.top_k:
            return f"topk{self.top_k}"
        if self.top_p < 1.0:
            return f"topp{self.top_p:g}"
        return f"tau{self.tau:g}"
