"""A field of the config accepts values inside its bounds and refuses those outside."""

import dataclasses
import functools
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

from kdhpc.config import presets
from kdhpc.config.bounds import Pattern, out_of_bounds
from kdhpc.config.language import Component, LanguageConfig
from kdhpc.config.run import RunConfig, check_run
from kdhpc.errors import InputError
from kdhpc.models.sizes import sizes_of_shape
from kdhpc.pipeline import LANGUAGE, MIXTURE
from kdhpc.plan.stages import AnyPipeline

PIPELINES: dict[str, AnyPipeline] = {"tiny": LANGUAGE, "mixture": MIXTURE}
"""The pipeline of each preset."""
ITEMS = {
    "students": "small",
    "truth.components": "sums",
    "settings": "paper",
    "slurm.stages": "merge",
    "throughput": "score",
    "speeds": "360M sampling",
    "slurm.sbatch": "gres",
    "slurm.gate.sbatch": "gres",
    "sizes": "teacher",
    **{
        f"{key}.architecture": "hidden_size"
        for key in (
            "truth",
            "truth.second_judge",
            "teacher",
            "students.small",
        )
    },
    "slurm.stages.merge.sbatch": "gres",
}
"""One item of every dictionary, under the key of the dictionary."""
UNBOUNDED = {"seed"}
"""Numbers that may have any value."""


@dataclass(frozen=True)
class Field:
    """A value somewhere in a config."""

    preset: str
    path: tuple[str, ...]
    kind: type
    marks: tuple[object, ...]
    items: int = 0
    """Number of items of the tuple, if the value is one of them; otherwise 0."""

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def config_with(self, value: object) -> RunConfig:
        """Return the config of the preset with this value in the field."""
        inside: object = "word" if self.kind is str else 0.5  # within the bounds of any item
        changed = (*[inside] * (self.items - 1), value) if self.items else value
        return cast(RunConfig, replaced(valid(self.preset), self.path, changed))


@functools.cache
def valid(preset: str) -> RunConfig:
    """Return the config of a preset, with an item in every dictionary."""
    words = [preset, "slurm.stages.merge.mem_gb=1.0", "slurm.srun=[-v]"]
    words += [f"{key}.gres=gpu" for key in ITEMS if key.endswith("sbatch")]
    words += ["slurm.gate.srun=[-v]", "slurm.stages.merge.srun=[-v]"]
    if preset == "tiny":
        words[1:1] = ["real_data", "truth.second_judge.training={}"]
        shape = "{layers: 1, hidden: 8, heads: 1, kv_heads: 1, ffn: 8}"
        speed = "{work: sampling, flops_per_token: 7e8, tokens_per_s: 6e4}"
        words += ["throughput.score=9.0", f"speeds={{360M sampling: {speed}}}"]
        words += [f"truth.second_judge.shape={shape}"]
    pipeline = PIPELINES[preset]
    config: Any = pipeline.checked(presets.build(pipeline.config, presets.compose(words)))
    if preset == "tiny":
        # A teacher is never fine-tuned, but it has the fields, whose bounds come first.
        for key in (("teacher",), ("students", "small")):
            config = replaced(config, (*key, "fine_tuning"), config.teacher.training)
        # A corpus as truth has no components, but it has their fields.
        components = {"sums": Component(corpus="addition")}
        config = replaced(config, ("truth", "components"), components)
        config = replaced(config, ("sizes",), {"teacher": sizes_of_shape(config.teacher.shape)})
    return cast(RunConfig, config)


def replaced(part: Any, path: tuple[str, ...], value: object) -> Any:
    """Return a config, or a part of one, with another value at a path."""
    if not path:
        return value
    name, *rest = path
    if isinstance(part, dict):
        return part | {name: replaced(part[name], tuple(rest), value)}
    changed = replaced(getattr(part, name), tuple(rest), value)
    return dataclasses.replace(part, **{name: changed})


def fields_of(hint: Any, preset: str, path: tuple[str, ...] = ()) -> Iterator[Field]:
    """Yield every field below a type that is a number or is marked."""
    arguments = [kind for kind in get_args(hint) if kind is not type(None)]
    if dataclasses.is_dataclass(hint):
        for name, kind in get_type_hints(hint, include_extras=True).items():
            yield from fields_of(kind, preset, (*path, name))
    elif get_origin(hint) is Annotated:
        kind, *marks = arguments
        single = [
            m for mark in marks for m in (mark if isinstance(mark, GroupedMetadata) else [mark])
        ]
        yield Field(preset, path, kind, tuple(single))
    elif get_origin(hint) is dict:
        yield from fields_of(arguments[1], preset, (*path, ITEMS[".".join(path)]))
    elif get_origin(hint) is tuple:
        for item in fields_of(arguments[0], preset, path):
            yield dataclasses.replace(item, items=2)
    elif hint in {int, float}:
        yield Field(preset, path, hint, ())
    elif get_origin(hint) is not None:
        for kind in arguments:
            if isinstance(kind, type) or get_origin(kind) is not None:
                yield from fields_of(kind, preset, path)


FIELDS = [
    field for preset, pipeline in PIPELINES.items() for field in fields_of(pipeline.config, preset)
]
BOUNDED = [field for field in FIELDS if field.marks]


def beside(limit: object, direction: int, kind: type) -> float:
    """Return the next number of a kind above or below another."""
    assert isinstance(limit, int | float)
    return limit + direction if kind is int else math.nextafter(limit, direction * math.inf)


def around(field: Field) -> Iterator[tuple[object, bool]]:
    """Yield values at and beyond each bound, and whether the bound accepts them."""
    for mark in field.marks:
        match mark:
            case Ge(low):
                yield low, True
                yield beside(low, -1, field.kind), False
            case Gt(low):
                yield beside(low, 1, field.kind), True
                yield low, False
            case Le(high):
                yield high, True
                yield beside(high, 1, field.kind), False
            case Lt(high):
                yield beside(high, -1, field.kind), True
                yield high, False
            case Pattern():
                yield "gpu-2.large", True
                for text in ("", "two words", "line\nbreak", "it's", 'a"', "a\\"):
                    yield text, False
            case _:
                pytest.fail(f"{field.key}: this test knows no value outside of {mark}")
    if field.kind is float:
        for value in (math.nan, math.inf, -math.inf):
            yield value, False


def test_every_number_has_bounds() -> None:
    unbounded = {field.key for field in FIELDS if not field.marks}
    assert unbounded == UNBOUNDED


def test_bounds_are_found_at_every_depth() -> None:
    keys = {field.key for field in BOUNDED}
    assert keys >= {
        "threads", "slurm.mem_gb", "slurm.account", "slurm.gate.time_min",
        "slurm.stages.merge.partition", "taus", "throughput.score", "truth.shape.layers",
        "truth.second_judge.training.epochs", "truth.components.sums.weight",
        "teacher.training.betas", "students.small.training.stop_after_epochs",
        "settings.paper.em_starts",
    }  # fmt: skip


@pytest.mark.parametrize("field", BOUNDED, ids=lambda field: f"{field.preset}: {field.key}")
def test_a_value_just_outside_its_bound_is_refused_by_its_whole_key(field: Field) -> None:
    pipeline = PIPELINES[field.preset]
    for value, fits in around(field):
        config = field.config_with(value)
        problems = list(out_of_bounds(config, pipeline.config))
        if fits:
            assert problems == []
            continue
        [problem] = problems
        assert problem.startswith(f"{field.key}=")
        assert ": expected " in problem
        assert "\n" not in problem
        with pytest.raises(InputError) as refused:
            pipeline.checked(config)
        assert str(refused.value) == problem


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("students.small.training.batch_sequences=0", "at least 1"),
        ("slurm.max_submit=1", "at least 2"),
        ("slurm.mem_gb=0.0", "more than 0"),
        ("slurm.mem_gb=inf", "more than 0 and finite"),
        ("teacher.training.warmup_fraction=1.5", "at least 0 and at most 1"),
        ("slurm.stages.merge.gpus_per_node=-1", "at least 0"),
    ],
)
def test_a_line_says_key_value_and_what_is_expected(words: str, line: str) -> None:
    config = presets.build(LanguageConfig, presets.compose(["tiny", words]))
    assert list(out_of_bounds(config, LanguageConfig)) == [f"{words}: expected {line}"]


def test_an_item_that_is_out_of_bounds_is_named_with_its_list() -> None:
    words = ["tiny", "teacher.training.betas=[0.9,1.0]"]
    config = presets.build(LanguageConfig, presets.compose(words))
    assert list(out_of_bounds(config, LanguageConfig)) == [
        "teacher.training.betas=[0.9, 1.0]: expected every item to be at least 0 and less than 1, "
        "got 1.0"
    ]


def test_fields_of_every_run_are_checked_first_and_can_be_checked_alone() -> None:
    words = ["tiny", "length=0", "slurm.time_min=0", "name=a/b"]
    config = presets.build(LanguageConfig, presets.compose(words))
    with pytest.raises(InputError, match=r"slurm.time_min=0: expected at least 1"):
        LANGUAGE.checked(config)
    words = ["tiny", "length=0", "name=a/b"]
    config = presets.build(LanguageConfig, presets.compose(words))
    with pytest.raises(InputError, match="name='a/b': expected the name of one folder"):
        LANGUAGE.checked(config)
    check_run(presets.build(LanguageConfig, presets.compose(["tiny", "length=0"])))


def test_a_mark_that_no_check_knows_is_an_error() -> None:
    with pytest.raises(TypeError, match="no check knows"):
        list(out_of_bounds(3, Annotated[int, "even"], "key"))


def test_the_cluster_file_of_the_first_day_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "first-day.md").read_text()
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    configs = Path(shutil.copytree(presets.CONFIGS_DIR, tmp_path / "configs"))
    (configs / "cluster" / "mysite.yaml").write_text(text)
    monkeypatch.setattr(presets, "CONFIGS_DIR", configs)
    config = presets.build(LanguageConfig, presets.compose(["tiny", "cluster=mysite"]))
    slurm = LANGUAGE.checked(config).slurm
    assert (slurm.time_min, slurm.stages["train-on-truth"].time_min) == (120, 1440)
