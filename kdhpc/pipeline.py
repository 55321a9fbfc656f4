"""The stages of both experiments, in order. Read this file first.

Each stage reads what the stages before it wrote. `python launch/sweep.py --dry-run` prints the same
order with its shards, and the folders of a run are numbered in this order.
"""

from kdhpc.config.language import LanguageConfig
from kdhpc.config.mixture import MixtureConfig, mixture_problems
from kdhpc.experiment.estimates import estimates
from kdhpc.experiment.inputs import prepare, problems
from kdhpc.experiment.stages.downstream import DOWNSTREAM
from kdhpc.experiment.stages.merge import MERGE, run_partial
from kdhpc.experiment.stages.mixture import FIT_STUDENTS, FIT_TEACHERS, MERGE_MIXTURE
from kdhpc.experiment.stages.sample import SAMPLE_STUDENTS, SAMPLE_TEACHER, SAMPLE_TRUTH
from kdhpc.experiment.stages.score import SCORE
from kdhpc.experiment.stages.train import TRAIN_ON_TRUTH, TRAIN_STUDENTS
from kdhpc.experiment.stages.truth import TRUTH
from kdhpc.plan.stages import Pipeline

LANGUAGE = Pipeline(
    name="language",
    config=LanguageConfig,
    stages=(
        TRUTH,  # trains, converts or copies the truth p*
        SAMPLE_TRUTH,  # samples D and truth's evaluation set from p*
        TRAIN_ON_TRUTH,  # trains the teacher p' and the direct students on D
        SAMPLE_TEACHER,  # samples D'_tau from the teacher, for every tau
        TRAIN_STUDENTS,  # trains a student p'' on each D'_tau
        SAMPLE_STUDENTS,  # samples evaluation sets from students and teachers
        SCORE,  # scores samples of models under p*, and samples of truth under every model
        DOWNSTREAM,  # evaluates finished models on tasks, if there are any
        MERGE,  # merges all scores into results.h5
    ),
    check=problems,
    prepare=prepare,
    estimate=estimates,
    merge_partial=run_partial,
)

MIXTURE = Pipeline(
    name="mixture",
    config=MixtureConfig,
    stages=(
        FIT_TEACHERS,  # draws D from p*, fits the teacher p' and the direct student to it
        FIT_STUDENTS,  # fits a student p'' to points of each sharpened teacher, and scores it
        MERGE_MIXTURE,  # merges everything into results.h5
    ),
    check=mixture_problems,
)

PIPELINES = {pipeline.name: pipeline for pipeline in (LANGUAGE, MIXTURE)}
