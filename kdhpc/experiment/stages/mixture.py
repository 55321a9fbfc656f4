"""The stages of the mixture simulation: fit teachers, fit and score students, merge.

fit-teachers
reads   nothing: everything is drawn
writes  arrays [S, ...] with one row per seed: p*, teacher and direct student as weights [S, K],
        means [S, K, D] and covariances [S, K, D, D]; train_points [S, N, D]

fit-students
reads   the arrays of fit-teachers
writes  arrays [S, ...] with one row per seed: the student, and what `score_student` and
        `score_distillation` of `kdhpc.science.distillation` return for it, in nats per point; a
        narrowed student, whose density is sharpened by a decode beta, has only the former

merge
reads   the arrays of both stages
writes  results.h5: /tables/<setting>-<arm>/<array>, /models, /provenance; an arm is `teachers`,
        `direct` or, for example, `beta100`; `direct-decode2` is the direct student, narrowed by 2
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from kdhpc.config.mixture import MixtureConfig, Setting
from kdhpc.plan.shards import ADDED, Arm, Plan, Shard, cut, fields_of, merge_of, settings_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.run_folder import RESULTS
from kdhpc.storage.work import Work, Written
from kdhpc.types import Json

if TYPE_CHECKING:
    from kdhpc.science.gaussian import Facts, Floats, Mixture
    from kdhpc.storage.hdf5 import Arrays

TEACHERS, DIRECT = "teachers", "direct"
PARTS = ("weights", "means", "covariances")
PACKAGES = ("numpy", "scipy", "scikit-learn", "h5py")
FITTED_PER_S = 5e5
"""Points, times components, times starts of EM, that one core fits in a second."""
POINTS_PER_S = 1.5e6
"""Points that one core draws, fits or scores in a second."""
"""Packages whose versions are written into the results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """What determines p*, D, the teachers and the direct students of a setting."""

    seed: int
    stream: str
    threads: int
    truth: Literal["grid", "fitted_grid", "random"]
    modes: int
    dimension: int
    fit_points: int | None
    """Points that p* is fitted to; None if it is not fitted."""
    train_points: int
    teacher_components: int
    teacher_covariance: Literal["diagonal", "full"]
    student_components: int
    student_covariance: Literal["diagonal", "full"]
    em_starts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """What determines the students of an arm and their scores, beside the teachers."""

    seed: int
    stream: str
    threads: int
    arm: str
    """Part of the names of its random streams; a narrowed student shares those of the student that
    it is made from."""
    beta: float | None
    """Sharpening of the teacher's weights; None for the direct student."""
    distill_points: int
    eval_points: int
    student_components: int
    student_covariance: Literal["diagonal", "full"]
    em_starts: int
    decode_beta: float | None = dataclasses.field(default=None, metadata=ADDED)
    """Sharpening of the finished student's density; None if it is not narrowed."""


class StudentArm(NamedTuple):
    """The students of a setting that share both betas."""

    name: str
    fitted: str
    """Name of the arm in which the same students are not narrowed."""
    beta: float | None
    """Sharpening of the teacher's weights; None for the direct student."""
    decode_beta: float | None = None
    """Sharpening of the finished student's density; None if it is not narrowed."""


def arms(config: MixtureConfig, setting: Setting) -> Iterator[StudentArm]:
    """Yield the arms of the students of a setting: fitted ones, then narrowed ones."""
    betas = {DIRECT: None, **{f"beta{beta:g}": beta for beta in config.betas}}
    for name, beta in betas.items():
        yield StudentArm(name, name, beta)
    if setting.student_components > 1:
        return
    for name in (DIRECT, "beta1"):
        for decode_beta in config.decode_betas if name in betas else ():
            yield StudentArm(f"{name}-decode{decode_beta:g}", name, betas[name], decode_beta)


def plan_teachers(config: MixtureConfig, before: Plan) -> list[Shard]:
    """Plan the shards of fit-teachers: for every setting, ranges of seeds."""
    shards = []
    for name, setting in config.settings.items():
        settings = TeacherSettings(
            seed=config.seed,
            stream=name,
            threads=config.threads,
            truth=setting.truth,
            modes=setting.modes,
            dimension=setting.dimension,
            fit_points=setting.fit_points if setting.truth == "fitted_grid" else None,
            train_points=setting.train_points,
            teacher_components=setting.teacher_components,
            teacher_covariance=setting.teacher_covariance,
            student_components=setting.student_components,
            student_covariance=setting.student_covariance,
            em_starts=setting.em_starts,
        )
        fields = fields_of(settings)
        arm = Arm(stage="fit-teachers", name=f"{name}-{TEACHERS}", fields=fields, inputs={})
        points = setting.train_points + (settings.fit_points or 0)
        work = points * setting.teacher_components * setting.em_starts
        num_bytes = 8.0 * setting.dimension * (setting.train_points + 100 * setting.dimension)
        shards += [
            Shard(
                arm=arm,
                name=shard_name,
                row_range=row_range,
                work=work * (row_range[1] - row_range[0]) / FITTED_PER_S,
                num_bytes=num_bytes * (row_range[1] - row_range[0]),
            )
            for shard_name, row_range in cut(config.seeds, config.shard_seeds)
        ]
    return shards


def plan_students(config: MixtureConfig, before: Plan) -> list[Shard]:
    """Plan the shards of fit-students: for every student, one for each shard of its teachers."""
    shards = []
    for name, setting in config.settings.items():
        teachers = before.arm("fit-teachers", f"{name}-{TEACHERS}")
        for student in arms(config, setting):
            settings = StudentSettings(
                seed=config.seed,
                stream=name,
                threads=config.threads,
                arm=student.fitted,
                beta=student.beta,
                distill_points=setting.distill_points,
                eval_points=config.eval_points,
                student_components=setting.student_components,
                student_covariance=setting.student_covariance,
                em_starts=setting.em_starts,
                decode_beta=student.decode_beta,
            )
            arm = Arm(
                stage="fit-students",
                name=f"{name}-{student.name}",
                fields=fields_of(settings),
                inputs={TEACHERS: teachers[0].arm.recipe},
            )
            shards += [
                Shard(
                    arm=arm,
                    name=source.name,
                    row_range=source.row_range,
                    reads=(source.key,),
                    work=(setting.distill_points + 4 * config.eval_points)
                    * source.num_rows
                    / POINTS_PER_S,
                    num_bytes=2000.0 * source.num_rows,
                )
                for source in teachers
            ]
    return shards


def plan_merge(config: MixtureConfig, before: Plan) -> list[Shard]:
    """Plan one shard that reads all shards of both stages."""
    merged = [*before.stage("fit-teachers"), *before.stage("fit-students")]
    num_rows = sum(shard.num_rows for shard in merged)
    return [merge_of(merged, stage="merge", fields={}, num_rows=num_rows, bytes_per_row=2000.0)]


def run_teachers(shard: Shard, work: Work[MixtureConfig]) -> Written:
    """Draw D and fit a teacher and a direct student to it, for each seed of the shard."""
    from kdhpc.science import gaussian

    settings = settings_of(shard.arm.fields, TeacherSettings)
    seed = settings.seed

    def fit_one(index: int) -> "Facts":
        stream = f"{settings.stream}/s{index}"
        truth = _truth(settings, stream)
        points = gaussian.draw(truth, settings.train_points, seed=seed, stream=f"{stream}/train")
        fit = functools.partial(gaussian.fit, points, num_starts=settings.em_starts, seed=seed)
        teacher = fit(
            settings.teacher_components,
            settings.teacher_covariance,
            stream=f"{stream}/teacher/fit",
        )
        direct = fit(
            settings.student_components, settings.student_covariance, stream=f"{stream}/direct/fit"
        )
        return {
            "train_points": points,
            **_parts("truth", truth),
            **_parts("teacher", teacher),
            **_parts("direct", direct),
        }

    return _write(shard, work, fit_one)


def run_students(shard: Shard, work: Work[MixtureConfig]) -> Written:
    """Fit and score one student for each seed of the shard."""
    from kdhpc.science import distillation, gaussian
    from kdhpc.storage.hdf5 import read_arrays

    settings = settings_of(shard.arm.fields, StudentSettings)
    seed, arm = settings.seed, settings.arm
    teachers = read_arrays(work.input(shard.reads[0]))
    first = shard.row_range[0] if shard.row_range else 0

    def fit_one(index: int) -> "Facts":
        stream, row = f"{settings.stream}/s{index}", index - first
        truth, direct = (_mixture(teachers, role, row) for role in ("truth", "direct"))

        @functools.cache
        def points_of(mixture: "Mixture", role: str) -> "Floats":
            # Every arm is scored on the same points of p*, so that arms can be compared, and a
            # narrowed student's own points are those of the fitted one, scaled about its mean.
            prefix = stream if role == "truth" else f"{stream}/{arm}"
            return gaussian.draw(
                mixture, settings.eval_points, seed=seed, stream=f"{prefix}/{role}/eval"
            )

        student, scores = direct, {}
        if settings.beta is not None:
            teacher = gaussian.sharpen(_mixture(teachers, "teacher", row), settings.beta)
            distilled = gaussian.draw(
                teacher, settings.distill_points, seed=seed, stream=f"{stream}/{arm}/train"
            )
            student = gaussian.fit(
                distilled,
                settings.student_components,
                settings.student_covariance,
                num_starts=settings.em_starts,
                seed=seed,
                stream=f"{stream}/{arm}/fit",
            )
            if settings.decode_beta is None:
                scores = distillation.score_distillation(truth, teacher, student, direct, points_of)
        if settings.decode_beta is not None:
            student = gaussian.temper(student, settings.decode_beta)
        points = teachers["train_points"][row]
        scores |= distillation.score_student(truth, student, points, points_of)
        return scores | _parts("student", student)

    return _write(shard, work, fit_one)


def run_merge(shard: Shard, work: Work[MixtureConfig]) -> Written:
    """Join the shards of every arm; every digest is checked."""
    from kdhpc.storage.results import write_results

    path = work.new_path(shard, ".h5")
    merged = write_results(
        path,
        tables=_tables(work),
        models=_facts(work.config),
        recipe=shard.recipe,
        provenance=work.provenance(shard.reads, PACKAGES),
    )
    stats = {"logical_digest": merged.logical_digest}
    return Written(path=path, num_rows=1, stats=stats, digest=merged.digest)


def _tables(work: Work[MixtureConfig]) -> Iterator[tuple[str, "Arrays"]]:
    from kdhpc.storage.hdf5 import join_arrays, read_arrays

    for stage in ("fit-teachers", "fit-students"):
        for name, shards in work.plan.arms(stage).items():
            yield name, join_arrays([read_arrays(work.input(s.key)) for s in shards])


def _facts(config: MixtureConfig) -> dict[str, dict[str, Json]]:
    """Return the facts about every arm that the analysis needs, by the arm's name."""
    return {
        f"{name}-{arm.name}": {
            "setting": name,
            "arm": arm.name,
            **({} if arm.beta is None else {"beta": arm.beta}),
            **({} if arm.decode_beta is None else {"decode_beta": arm.decode_beta}),
            **dataclasses.asdict(setting),
        }
        for name, setting in config.settings.items()
        for arm in [StudentArm(TEACHERS, TEACHERS, None), *arms(config, setting)]
    }


def _truth(settings: TeacherSettings, stream: str) -> "Mixture":
    from kdhpc.science import gaussian

    seed = settings.seed
    if settings.truth == "random":
        return gaussian.random_truth(
            settings.modes, settings.dimension, seed=seed, stream=f"{stream}/truth/means"
        )
    truth = gaussian.grid_truth()
    if settings.fit_points is None:
        return truth
    points = gaussian.draw_evenly(
        truth, settings.fit_points, seed=seed, stream=f"{stream}/truth/points"
    )
    return gaussian.fit(
        points,
        settings.modes,
        "full",
        num_starts=settings.em_starts,
        seed=seed,
        stream=f"{stream}/truth/fit",
    )


def _parts(role: str, mixture: "Mixture") -> "Facts":
    return {f"{role}_{part}": getattr(mixture, part) for part in PARTS}


def _mixture(arrays: "Arrays", role: str, row: int) -> "Mixture":
    from kdhpc.science import gaussian

    return gaussian.Mixture(**{part: arrays[f"{role}_{part}"][row] for part in PARTS})


def _write(shard: Shard, work: Work[MixtureConfig], fit_one: Callable[[int], "Facts"]) -> Written:
    """Call `fit_one` for every seed of the shard, and write its results as rows of arrays."""
    import numpy as np

    from kdhpc.storage.hdf5 import write_arrays

    rows = []
    for index in range(*(shard.row_range or (0, 0))):
        rows.append(fit_one(index))
        work.progress(len(rows) / shard.num_rows)
    path = work.new_path(shard, ".h5")
    write_arrays(path, {name: np.stack([row[name] for row in rows]) for name in rows[0]})
    return Written(path=path, num_rows=len(rows))


FIT_TEACHERS = Stage(
    name="fit-teachers",
    reads="nothing: p* and D are drawn",
    writes="p*, D, teachers and direct students; arrays [S, ...] with one row per seed",
    plan=plan_teachers,
    run=run_teachers,
    uses_device=False,
)
FIT_STUDENTS = Stage(
    name="fit-students",
    reads="p*, D, teachers and direct students",
    writes="students, also narrowed, and their scores in nats; arrays [S, ...], one row per seed",
    plan=plan_students,
    run=run_students,
    uses_device=False,
)
MERGE_MIXTURE = Stage(
    name="merge",
    reads="teachers, students and scores",
    writes="results.h5: /tables/<setting>-<arm>, /models, /provenance",
    plan=plan_merge,
    run=run_merge,
    uses_device=False,
    alias=RESULTS,
)
