"""Config of the mixture-of-Gaussians simulation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kdhpc.config.bounds import AtLeastTwo, Count, Positive, list_problems, name_problems
from kdhpc.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One choice of sizes for the mixture simulation; the defaults are the paper's."""

    truth: Literal["grid", "fitted_grid", "random"] = "grid"
    """p*: `grid` (exactly eight modes in the plane), `fitted_grid` (an EM fit to points drawn from
    that grid, as in the released code), or `random` (`modes` modes in `dimension` dimensions)."""
    modes: Count = 8
    """Number of modes of p*; must be 8 unless `truth` is `random`."""
    dimension: Count = 2
    """Number of dimensions of the points; must be 2 unless `truth` is `random`."""
    fit_points: Count = 50000
    """Number of points that `truth: fitted_grid` is fitted to; a multiple of `modes`."""
    train_points: AtLeastTwo = 100
    """Number of points in D."""
    distill_points: AtLeastTwo = 1000
    """Number of points in every D'."""
    teacher_components: Count = 4
    """K', the number of components of the teacher."""
    student_components: Count = 1
    """K'', the number of components of every student, including the direct one."""
    teacher_covariance: Literal["diagonal", "full"] = "diagonal"
    """Form of the covariance of the teacher's components."""
    student_covariance: Literal["diagonal", "full"] = "diagonal"
    """Form of the covariance of the students' components."""
    em_starts: Count = 10
    """Number of EM runs per fit, of which the likeliest is taken. Fewer runs are quicker and find
    worse fits."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(RunConfig):
    """Config of the mixture-of-Gaussians simulation."""

    settings: dict[str, Setting]
    """The settings to simulate, by name."""
    seeds: Count
    """Number of repetitions of every setting, each with its own D, teacher and students."""
    shard_seeds: Count = 20
    """Number of repetitions per shard. If `seeds` grows from one multiple of it to another, no
    finished repetition is computed again."""
    betas: tuple[Positive, ...]
    """Exponents that sharpen the teacher's weights, each of which gets a student of its own. A
    direct student is always fitted too."""
    decode_betas: tuple[Positive, ...] = ()
    """Exponents other than 1 that sharpen the density of finished students, as a control for
    `betas`: that of direct students and of those of beta 1. Only students of one component have a
    closed form of it; settings with more have no control."""
    eval_points: AtLeastTwo = 20000
    """Number of fresh points for every expectation that has no closed form."""


def mixture_problems(config: MixtureConfig) -> Iterator[str]:
    """Yield what is wrong with a mixture simulation whose values are within their bounds."""
    yield from list_problems("beta", config.betas, "[1,100]")
    if config.decode_betas:
        yield from list_problems("decode_beta", config.decode_betas, "[1.5,2]")
    if "1" in {f"{beta:g}" for beta in config.decode_betas}:
        yield "decode_betas: 1 is always scored; expected exponents other than 1"
    if not config.settings:
        yield "settings={}: expected at least one, such as settings.paper.train_points=100"
    yield from name_problems("settings", config.settings)
    for name, setting in config.settings.items():
        yield from _setting_problems(f"settings.{name}", setting)


def _setting_problems(key: str, setting: Setting) -> Iterator[str]:
    if setting.truth != "random":
        for name, value, fixed in (
            ("modes", setting.modes, 8),
            ("dimension", setting.dimension, 2),
        ):
            if value != fixed:
                yield (
                    f"{key}.{name}={value}: expected {fixed}, as truth={setting.truth} has, or "
                    "truth=random"
                )
    student = setting.student_components
    largest = max(setting.teacher_components, student)
    for name, points, components in (
        ("train_points", setting.train_points, largest),
        ("distill_points", setting.distill_points, student),
    ):
        if points < components:
            yield f"{key}.{name}={points}: expected at least {components}, one for each component"
    if setting.fit_points % setting.modes:
        yield (
            f"{key}.fit_points={setting.fit_points}: expected a multiple of "
            f"modes={setting.modes}, so that every mode gets the same number of points"
        )
