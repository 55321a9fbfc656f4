"""Plans are pure and complete, and they grow without changing what exists."""

import dataclasses
import json
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.experiment.estimates import batches_that_fit
from kdhpc.pipeline import LANGUAGE
from kdhpc.plan.shards import ADDED, cut, fields_of, settings_of

SIZES = st.integers(1, 500)


def tiny(*overrides: str) -> LanguageConfig:
    return LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(["tiny", *overrides])))


@given(num_rows=SIZES, per_shard=SIZES)
def test_shards_cover_every_row_once_and_in_order(num_rows: int, per_shard: int) -> None:
    shards = list(cut(num_rows, per_shard))
    assert [row for _, (start, stop) in shards for row in range(start, stop)] == [*range(num_rows)]
    assert len({name for name, _ in shards}) == len(shards)


@given(num_rows=SIZES, more=SIZES, per_shard=SIZES)
def test_an_arm_that_grows_changes_no_shard(num_rows: int, more: int, per_shard: int) -> None:
    before, after = dict(cut(num_rows, per_shard)), dict(cut(num_rows + more, per_shard))
    assert all(after[name] == row_range for name, row_range in before.items() if name in after)


def test_every_shard_reads_only_what_is_planned_before_it() -> None:
    seen: set[str] = set()
    for shard in LANGUAGE.plan(tiny()).shards.values():
        assert seen.issuperset(shard.reads)
        seen.add(shard.key)


def test_adding_a_tau_changes_no_recipe_but_the_merge() -> None:
    before = LANGUAGE.plan(tiny()).shards
    after = LANGUAGE.plan(tiny("taus=[1.0,0.6,0.7]")).shards
    lost = [key for key in before if key not in after]
    assert [key.split("/")[0] for key in lost] == ["merge"]
    assert all(after[key].recipe == before[key].recipe for key in before if key in after)


def test_more_evaluation_sequences_change_no_model_and_no_full_shard() -> None:
    before = LANGUAGE.plan(tiny()).shards
    after = LANGUAGE.plan(tiny("sampling.eval_sequences=128")).shards
    changed = [key for key in before if key in after and after[key].recipe != before[key].recipe]
    assert changed == []


def test_resources_and_shard_sizes_are_in_no_arm_recipe() -> None:
    before = LANGUAGE.plan(tiny())
    after = LANGUAGE.plan(tiny("slurm.mem_gb=99", "sampling.shard_sequences=32"))
    for stage in LANGUAGE.stages[:-1]:
        for name, shards in before.arms(stage.name).items():
            assert after.arm(stage.name, name)[0].arm.recipe == shards[0].arm.recipe


def test_what_determines_a_result_is_in_its_recipe() -> None:
    before = LANGUAGE.plan(tiny()).shards
    for override in ("seed=1", "sampling.batch_rows=64", "threads=2", "eos=mask", "prompt=A"):
        after = LANGUAGE.plan(tiny(override)).shards
        key = "sample-truth/train/00000"
        assert after[key].recipe != before[key].recipe, override


def test_rows_of_trained_models_are_not_those_of_the_truth() -> None:
    before = LANGUAGE.plan(tiny()).shards
    after = LANGUAGE.plan(tiny("sampling.trained_batch_rows=64")).shards
    key = "sample-truth/eval/00000"
    assert after[key].recipe == before[key].recipe
    [teacher, *_] = [key for key in before if key.startswith("sample-teacher/")]
    [student, *_] = [key for key in before if key.startswith("sample-students/")]
    for key in (teacher, student):
        assert after[key].recipe != before[key].recipe


@pytest.mark.parametrize("own", [(), ("sampling.trained_batch_rows=64",)])
def test_rows_that_do_not_fit_name_their_own_setting(own: tuple[str, ...]) -> None:
    config = tiny("sampling.batch_rows=64", "slurm.mem_gb=0.0001", *own)
    lines = "\n".join(batches_that_fit(config))
    named = re.findall(r"sampling (\w+): .* LOWER sampling\.(\w+)", lines)
    trained = "trained_batch_rows" if own else "batch_rows"
    assert named == [("truth", "batch_rows"), ("teacher", trained), ("small", trained)]


def test_checkpoint_intervals_are_in_no_recipe() -> None:
    before = LANGUAGE.plan(tiny()).shards
    after = LANGUAGE.plan(tiny("teacher.training.checkpoint_every_steps=3")).shards
    assert {k: s.recipe for k, s in before.items()} == {k: s.recipe for k, s in after.items()}


def test_two_seeds_and_a_truncation_give_each_student_its_own_teacher() -> None:
    config = dataclasses.replace(
        tiny("seeds=2"),
        sampling=dataclasses.replace(tiny().sampling, truncations=("top_k=50", "top_p=0.9")),
    )
    plan = LANGUAGE.plan(config)
    names = {name for name in plan.arms("train-students") if name.startswith("student-s1-")}
    assert names == {f"student-s1-small-{arm}" for arm in ("tau1", "tau0.6", "topk50", "topp0.9")}
    [student] = plan.arm("train-students", "student-s1-small-topk50")
    data = plan.arm("sample-teacher", "s1-topk50")[0]
    assert student.arm.inputs["data"] == data.arm.recipe
    assert data.reads == ("train-on-truth/teacher-s1/00000",)


@dataclass(frozen=True)
class Inner:
    width: int = 3


@dataclass(frozen=True)
class OlderSettings:
    seed: int
    inner: Inner


@dataclass(frozen=True)
class NewerSettings(OlderSettings):
    decay: float = field(default=0.5, metadata=ADDED)


def test_settings_survive_as_fields_and_back() -> None:
    settings = OlderSettings(seed=1, inner=Inner(width=7))
    fields = json.loads(json.dumps(fields_of(settings)))
    assert fields == {"seed": 1, "inner": {"width": 7}}
    assert settings_of(fields, OlderSettings) == settings


def test_a_field_that_was_added_later_changes_no_older_recipe() -> None:
    old = fields_of(OlderSettings(seed=1, inner=Inner()))
    assert fields_of(NewerSettings(seed=1, inner=Inner())) == old
    changed = NewerSettings(seed=1, inner=Inner(), decay=0.25)
    assert fields_of(changed) == {**old, "decay": 0.25}
    assert settings_of(old, NewerSettings).decay == 0.5
