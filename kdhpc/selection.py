"""How a model is sampled: at a temperature, or truncated."""

from dataclasses import dataclass

from kdhpc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What tokens are drawn from: the model's distribution, sharpened or truncated.

    The same object from the command line to the draw; the defaults are the model itself.
    """

    tau: float = 1.0
    """Temperature: divides the logits."""
    top_k: int = 0
    """Keeps this many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the fewest most likely tokens that hold this much probability; 1 keeps all."""

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """A truncation from `top_k=50` or `top_p=0.9`.

        Raises:
            InputError: for anything else.
        """
        name, _, value = text.partition("=")
        try:
            if name == "top_k" and int(value) >= 1:
                return cls(top_k=int(value))
            if name == "top_p" and 0 < float(value) <= 1:
                return cls(top_p=float(value))
        except ValueError:
            pass
        raise InputError(f"expected every item to be like top_k=50 or top_p=0.9, got {text!r}")

    @property
    def keeps_all(self) -> bool:
        """Whether what is drawn from is the model's own distribution."""
        return self == Selection()

    @property
    def name(self) -> str:
        """Part of the names of arms: `tau0.8`, `topk50`, `topp0.9`."""
        if self.top_k:
            return f"topk{self.top_k}"
        if self.top_p < 1.0:
            return f"topp{self.top_p:g}"
        return f"tau{self.tau:g}"
