"""The mixture-of-Gaussians simulation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kdhpc.config.bounds import AtLeastTwo, Count, Positive, list_problems, name_problems
from kdhpc.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of the mixture simulation; the defaults are the paper's."""

    truth: Literal["grid", "fitted_grid", "random"] = "grid"
    """p*: `grid` (eight modes in the plane, exactly), `fitted_grid` (an EM fit to points of that
    grid, as in the released code), or `random` (`modes` of them in `dimension` dimensions)."""
    modes: Count = 8
    """Modes of p*; the grid has 8."""
    dimension: Count = 2
    """Of the points; the grid has 2."""
    fit_points: Count = 50000
    """Points that `truth: fitted_grid` is fitted to."""
    train_points: AtLeastTwo = 100
    """Points in D."""
    distill_points: AtLeastTwo = 1000
    """Points in every D'."""
    teacher_components: Count = 4
    """K', components of the teacher."""
    student_components: Count = 1
    """K'', components of the students, the direct one too."""
    teacher_covariance: Literal["diagonal", "full"] = "diagonal"
    """Shape of the teacher's components."""
    student_covariance: Literal["diagonal", "full"] = "diagonal"
    """Shape of the students' components."""
    em_starts: Count = 10
    """Runs of EM a fit, of which the likeliest is taken; one is quicker and finds worse fits."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(RunConfig):
    """The mixture-of-Gaussians simulation."""

    settings: dict[str, Setting]
    """What is simulated, by name."""
    seeds: Count
    """Repetitions of every setting, each with its own D, teacher and students."""
    shard_seeds: Count = 20
    """Repetitions a shard. Seeds added in multiples of it repeat none."""
    betas: tuple[Positive, ...]
    """Sharpenings of the teacher's weights; the direct student is always there too."""
    eval_points: AtLeastTwo = 20000
    """Fresh points for every expectation that has no closed form."""


def mixture_problems(config: MixtureConfig) -> Iterator[str]:
    """What is wrong with a mixture simulation whose values are within their bounds."""
    yield from list_problems("beta", config.betas, "[1,100]")
    if not config.settings:
        yield "settings={}: expected at least one, such as settings.paper.train_points=100"
    yield from name_problems("settings", config.settings)
    for name, setting in config.settings.items():
        yield from _setting_problems(f"settings.{name}", setting)


def _setting_problems(key: str, setting: Setting) -> Iterator[str]:
    if setting.truth != "random":
        for name, value, there in (
            ("modes", setting.modes, 8),
            ("dimension", setting.dimension, 2),
        ):
            if value != there:
                yield (
                    f"{key}.{name}={value}: truth={setting.truth} has {there}; expected that, or "
                    "truth=random"
                )
    student = setting.student_components
    most = max(setting.teacher_components, student)
    for name, points, components in (
        ("train_points", setting.train_points, most),
        ("distill_points", setting.distill_points, student),
    ):
        if points < components:
            yield f"{key}.{name}={points}: expected at least {components}, one for each component"
    if setting.fit_points % setting.modes:
        yield (
            f"{key}.fit_points={setting.fit_points}: expected a multiple of the "
            f"{setting.modes} modes, so that each has as many"
        )
