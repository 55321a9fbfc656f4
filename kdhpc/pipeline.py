"""The experiment, in order. Read this first.

Each stage reads what the ones before it wrote; `python launch/sweep.py --dry-run` prints the same
order with its shards, and a run's folders are numbered by it.
"""

from kdhpc.config.language import LanguageConfig
from kdhpc.config.mixture import MixtureConfig, mixture_problems
from kdhpc.experiment.estimates import batches_that_fit
from kdhpc.experiment.inputs import prepare, problems
from kdhpc.experiment.stages.merge import MERGE, run_partial
from kdhpc.experiment.stages.mixture import FIT_STUDENTS, FIT_TEACHERS, MERGE_MIXTURE
from kdhpc.experiment.stages.sample import SAMPLE_STUDENTS, SAMPLE_TEACHER, SAMPLE_TRUTH
from kdhpc.experiment.stages.score import SCORE
from kdhpc.experiment.stages.train import TRAIN_ON_TRUTH, TRAIN_STUDENTS, TRUTH
from kdhpc.plan.stages import Pipeline

LANGUAGE = Pipeline(
    name="language",
    config=LanguageConfig,
    stages=(
        TRUTH,  # p*: trained on a corpus, converted, or brought in
        SAMPLE_TRUTH,  # D and truth's evaluation set
        TRAIN_ON_TRUTH,  # the teacher p' from scratch, and the direct students
        SAMPLE_TEACHER,  # D'_tau for every tau
        TRAIN_STUDENTS,  # a student p'' on each D'_tau
        SAMPLE_STUDENTS,  # evaluation sets of students and teachers
        SCORE,  # log p* over model samples, log p'' over truth's
        MERGE,  # results.h5
    ),
    check=problems,
    prepare=prepare,
    estimate=batches_that_fit,
    merge_partial=run_partial,
)

MIXTURE = Pipeline(
    name="mixture",
    config=MixtureConfig,
    stages=(
        FIT_TEACHERS,  # p*, D, the teacher p' on it, and the direct student
        FIT_STUDENTS,  # a student p'' on points of each sharpened teacher, scored
        MERGE_MIXTURE,  # results.h5
    ),
    check=mixture_problems,
)

PIPELINES = {pipeline.name: pipeline for pipeline in (LANGUAGE, MIXTURE)}
