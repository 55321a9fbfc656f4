"""What a report says about a run besides its numbers: texts, stages, deviations from the paper."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from report_rows import student_name
from study import SECOND, Study

from kdhpc.cluster.display import duration
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Model, Sizes, Training
from kdhpc.experiment import arms
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.pipeline import LANGUAGE
from kdhpc.plan.shards import Plan
from kdhpc.storage.results import Results
from kdhpc.storage.run_folder import Record, RunFolder
from kdhpc.storage.token_shards import read_samples

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
NUM_TEXTS = 4
FIRST_SHARD = "00000"
"""Beginning of the name of an arm's first shard."""
MAX_CHARACTERS = 600
"""Most characters of a text that is shown."""
LineOf = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts, for a page."""

    title: str
    columns: LineOf
    rows: Sequence[LineOf]
    note: str = ""
    """How to read it."""


def table_of(title: str, rows: Sequence[Mapping[str, str]], note: str = "") -> Table:
    """Return a table with a column for each key; a row without it has an empty cell."""
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    cells = [tuple(row.get(name, "") for name in columns) for row in rows]
    return Table(title=title, columns=columns, rows=cells, note=note)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run folder."""

    config: LanguageConfig | None
    """None if the results do not say how they were made."""
    records: Mapping[str, Record]
    """By the key of the shard; empty if the results are outside of their run folder."""

    def first_of(self, arm: arms.ArmName) -> Record | None:
        """Return the shard of an arm with its first rows; None if it is not there."""
        keys = sorted(k for k in self.records if k.startswith("/".join((*arm, FIRST_SHARD))))
        return self.records[keys[0]] if keys else None

    def all_of(self, arm: arms.ArmName, num_rows: int | None = None) -> list[Record]:
        """Return the shards of an arm in order; none if one is missing.

        They are those of the config: a run that has grown has other shards of the same rows too.

        Args:
            arm: the arm.
            num_rows: return only the shards with the first rows; None for all of them.
        """
        if not self.records or self._plan is None:
            return []
        keys = [
            shard.key
            for shard in self._plan.arm(*arm)
            if num_rows is None or shard.row_range is None or shard.row_range[0] < num_rows
        ]
        records = [self.records[key] for key in keys if key in self.records]
        is_whole = len(records) == len(keys) and all(record.data.exists() for record in records)
        return records if is_whole else []

    @cached_property
    def _plan(self) -> Plan | None:
        return LANGUAGE.plan(self.config) if self.config else None


def run_folder(path: Path) -> Path | None:
    """Return the run folder that a file of results is in; None if it is outside of one."""
    folder = path.resolve().parents[1]
    return folder if (folder / "run.json").is_file() else None


def read_facts(results: Results, path: Path) -> RunFacts:
    """Read the records of the run that a file of results is in, if it is in one.

    Args:
        results: the results.
        path: their file.
    """
    values = presets.from_yaml(results.provenance.get("config", ""))
    config = presets.build(LanguageConfig, values) if values else None
    folder = run_folder(path)
    records = RunFolder(folder, LANGUAGE.folders).scan().records if folder else {}
    return RunFacts(config=config, records=records)


def texts(study: Study, size: str, facts: RunFacts) -> dict[str, list[str]]:
    """Return the first texts of the evaluation sets of truth and of the students of one seed.

    Args:
        study: the run.
        size: size of the students.
        facts: the run folder.

    Returns:
        By the name of the model; without those whose samples are not in the run folder.
    """
    truth = facts.first_of(arms.TRUTH_MODEL)
    if truth is None or not (truth.data / "tokenizer.json").is_file():
        return {}
    tokenizer = Tokenizer(truth.data)
    samplers: dict[str, arms.ArmName] = {"truth": arms.TRUTH_EVAL}
    for label in study.labels(size):
        student = next(iter(study.of(size, label).values()))
        samplers[student_name(label)] = (arms.SAMPLE_STUDENTS, student.name)
    found = {name: facts.first_of(arm) for name, arm in samplers.items()}
    return {name: _first_texts(r, tokenizer) for name, r in found.items() if r is not None}


def _first_texts(record: Record, tokenizer: Tokenizer) -> list[str]:
    samples = read_samples([record.data])[:NUM_TEXTS]
    rows = zip(samples.ids, samples.length, strict=True)
    return [readable(tokenizer.decode(ids[:length].tolist())) for ids, length in rows]


def about_texts(study: Study, size: str, facts: RunFacts) -> list[str]:
    """Return which texts `texts` returns, in one line."""
    seeds = sorted({next(iter(study.of(size, label))) for label in study.labels(size)})
    prompt = f" Each starts with {_prompt(facts.config)}." if facts.config else ""
    return [
        f"The first {NUM_TEXTS} sequences of each evaluation set: of truth, and of the students of "
        f"seed {', '.join(map(str, seeds))}; they were not chosen.{prompt} A text is cut at "
        f"{MAX_CHARACTERS} characters. {UNKNOWN} is the replacement character: bytes that are no "
        "character, or a character that cannot be shown."
    ]


def readable(text: str) -> str:
    """Return a text that a page can show: no control characters, and not too long."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else UNKNOWN for c in text)
    return shown if len(shown) <= MAX_CHARACTERS else f"{shown[:MAX_CHARACTERS]} ..."


def stages(facts: RunFacts) -> Table:
    """Return what each stage of the run has made, and with how much work."""
    ranks = _ranks(facts.config) if facts.config else {}
    rows: list[LineOf] = []
    total = 0.0
    for stage in LANGUAGE.stages:
        records = [r for key, r in facts.records.items() if key.startswith(f"{stage.name}/")]
        seconds = sum(record.seconds * ranks.get(record.key, 1) for record in records)
        total += seconds
        if records:
            rows.append((LANGUAGE.folders[stage.name], f"{len(records)}", f"{seconds / 3600:.2f}"))
    num_shards = str(len(facts.records))
    title = f"Stages, with the work of published shards ({duration(total)} on one rank)"
    columns = ("stage", "shards", "rank-hours")
    rows.append(("total", num_shards, f"{total / 3600:.2f}"))
    return Table(title=title, columns=columns, rows=rows)


def _ranks(config: LanguageConfig) -> dict[str, int]:
    """Return the number of ranks of each shard."""
    shards = LANGUAGE.plan(config).shards
    return {key: shard.arm.nodes * shard.arm.ranks_per_node for key, shard in shards.items()}


def provenance(study: Study, facts: RunFacts) -> list[LineOf]:
    """Return names and values of what the numbers were made with."""
    given = study.results.provenance
    lists = {name: json.loads(given[name]) for name in ("hosts", "code") if name in given}
    versions = json.loads(given.get("versions", "{}"))
    digests = [
        str(record.stats["logical_digest"])
        for key, record in facts.records.items()
        if key.startswith(f"{arms.MERGE}/") and record.recipe == study.results.recipe
    ]
    named = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Python": given.get("python", ""),
        "hosts": ", ".join(lists.get("hosts", [])),
        "code": _versions_of_code(lists.get("code", [])),
        "merged at": given.get("merged_at", ""),
        "logical digest": digests[0] if digests else "",
        "parameters": parameters(study.results),
    }
    return [(name, value) for name, value in named.items() if value]


def _versions_of_code(digests: Sequence[str]) -> str:
    several = ": stages may have run under different versions of the code"
    return ", ".join(digests) + (several if len(digests) > 1 else "")


def parameters(results: Results) -> str:
    """Return the sizes of the models: truth, teacher, and each size of student."""
    sizes: dict[str, str] = {}
    for facts in results.models.values():
        name = facts["kind"] if facts["kind"] != "student" else f"student {facts['size']}"
        if "parameters" in facts:
            sizes.setdefault(str(name), f"{name} {int(facts['parameters']):,}")
    order = ("truth", SECOND, "teacher", "student")
    return ", ".join(sorted(sizes.values(), key=lambda text: order.index(text.split()[0])))


def deviations(config: LanguageConfig) -> list[str]:
    """Return in what a run differs from the paper and its released code, besides its sizes."""
    return [
        *_of_lengths(config),
        *_of_students(config),
        *_of_training(config),
        "Token ids are kept between stages; the released code decodes texts and tokenises them "
        "again (decision 5).",
        *_of_scoring(config),
    ]


def _of_lengths(config: LanguageConfig) -> Iterator[str]:
    if config.eos == "mask":
        yield (
            "Sequences have explicit lengths, and the end token is neither trained on nor scored; "
            "the released code pads with it and masks the padding, to the same effect (decision 2)."
        )
    else:
        yield (
            "The end token is trained on and scored; in the released code it is masked, so its "
            "models never learn to stop (decision 2)."
        )


def _of_students(config: LanguageConfig) -> Iterator[str]:
    at = ", ".join(f"{temperature:g}" for temperature in config.decode_temperatures)
    control = f" The temperatures T {at} are a control, and named." if at else ""
    yield (
        "Students are sampled at temperature 1; in the released code one flag sets the tau of the "
        f"student's teacher and the temperature of its own sampling (decision 3).{control}"
    )


def _of_training(config: LanguageConfig) -> Iterator[str]:
    trained = [config.teacher, *config.students.values()]
    if any(model.model is None for model in trained):
        yield (
            "New models start from the architecture's own initialisation; in the released code "
            "RMSNorm keeps its pretrained gains (decision 4)."
        )
    both = [settings for model in trained for settings in (model.training, model.fine_tuning)]
    settings = [training for training in both if training is not None]
    kinds = {f"ZeRO-{training.zero_stage} with {training.dtype}" for training in settings}
    if kinds - {"ZeRO-2 with float16"}:
        yield (
            f"Training uses {' and '.join(sorted(kinds))}; the released code ZeRO-2 with float16 "
            "and a static loss scale."
        )


def _of_scoring(config: LanguageConfig) -> Iterator[str]:
    if config.scoring.dtype != "float32":
        yield (
            f"Scoring runs the bodies of models in {config.scoring.dtype}, logits and log-softmax "
            "in float32; in the released code everything is float32."
        )


def sizes(config: LanguageConfig) -> Table:
    """Return where the sizes of a run differ from those of the preset `paper`."""
    paper = presets.build(LanguageConfig, presets.compose(["paper"]))
    ours, theirs = _sizes(config), _sizes(paper)
    rows = [(n, ours[n], theirs[n]) for n in ours if ours[n] != theirs[n]]
    title = "Sizes that differ from the paper's" if rows else "The sizes are the paper's"
    return Table(title=title, columns=("size", "this run", "paper"), rows=rows)


def _sizes(config: LanguageConfig) -> dict[str, str]:
    sampling, students = config.sampling, config.students.values()
    cut = f" ({config.truth.vocabulary:,} ids)" if config.truth.vocabulary else ""
    return {
        "truth": f"{config.truth.model}{cut}",
        "taus": ", ".join(f"{tau:g}" for tau in sorted(config.taus)),
        "truncations": ", ".join(sampling.truncations) or "none",
        "seeds": str(config.seeds),
        "prompt": _prompt(config),
        "tokens of a sequence": f"{config.length:,}",
        "sequences in D and each D'": f"{sampling.train_sequences:,}",
        "sequences that are scored": f"{sampling.eval_sequences:,}",
        "teacher": _design(config.teacher, config.sizes.get("teacher")),
        "students": ", ".join(
            _design(model, config.sizes.get(f"students.{size}"))
            for size, model in config.students.items()
        ),
        "passes of the teacher": _passes(config.teacher),
        "passes of the students": ", ".join(dict.fromkeys(map(_passes, students))),
    }


def _prompt(config: LanguageConfig) -> str:
    """Return what sequences start with, in words."""
    if config.prompts is None:
        return f"the prompt {config.prompt!r}"
    return f"one of {config.eval_prompts:,} prompts of {config.prompts}"


def _design(model: Model, sizes: Sizes | None) -> str:
    """Return what a model is made of, in words; sizes are those of an `architecture`."""
    if model.shape is not None:
        return f"{model.shape.layers} layers of {model.shape.hidden}"
    if model.architecture is None:
        return f"{model.model}"
    what = f" with {sizes.layers} layers of {sizes.hidden}" if sizes else ""
    return f"{model.architecture['model_type']}{what}"


def _passes(model: Model) -> str:
    if (training := model.training) is None:
        return "none"
    passes = " then ".join(
        _epochs(settings) for settings in (training, model.fine_tuning) if settings is not None
    )
    return passes if model.fine_tuning is None else f"{passes} from the direct student's weights"


def _epochs(training: Training) -> str:
    taken = training.stop_after_epochs or training.epochs
    return f"{taken:g}" + (f" of {training.epochs:g}" if taken != training.epochs else "")
