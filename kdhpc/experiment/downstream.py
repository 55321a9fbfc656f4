"""Which models are evaluated on which tasks, shared by the stages that do it and that merge it."""

from collections.abc import Iterator
from dataclasses import dataclass

from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Design
from kdhpc.experiment import arms

CLUSTER = "cluster"
"""Array that numbers the groups of items whose scores depend on each other."""

OWN_VERSION = 1
"""Number that changes with the items of kdhpc's own tasks; it is part of the recipe of scores."""
OWN_ITEMS = 512
"""Number of items of kdhpc's own tasks if `downstream.limit` is not given."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A model that is evaluated: a finished one of the run, or the initial weights of a size."""

    name: str
    model: arms.ArmName | None = None
    """The finished model; None for initial weights."""
    size: str = ""
    """Size of initial weights: `teacher`, or a key of `students`."""
    design: Design | None = None
    """Architecture of initial weights; None for a finished model."""
    stream: str = ""
    """Random stream of initial weights, which is that of the training of the first seed."""

    def arm(self, task: str) -> str:
        """Return the name of the arm of this model's scores in a task."""
        return f"{self.name}-on-{task}"


def evaluated(config: LanguageConfig) -> Iterator[Evaluated]:
    """Yield every model that is evaluated: truth, teachers, students, then initial weights.

    Models that start from a finished model have no initial weights of their own.
    """
    yield Evaluated(name="truth", model=arms.TRUTH_MODEL)
    trainees = list(arms.trainees(config))
    for trainee in trainees:
        yield Evaluated(name=trainee.name, model=(trainee.stage, trainee.name))
    sizes = {trainee.size: trainee for trainee in reversed(trainees)}
    for size, trainee in reversed(sizes.items()):
        if trainee.model.design and trainee.model.model is None:
            yield Evaluated(
                name=f"initial-{size}",
                size=size,
                design=trainee.model.design,
                stream=f"{trainee.kind}/s{trainee.seed}/{size}/init",
            )
