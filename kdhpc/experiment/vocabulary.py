"""Cut a given truth to a part of its vocabulary, over which it is renormalised.

The cut model is an exact truth of its own: it is sampled, scored and learnt like any other. What it
lost is measured once, as the probability that the whole model gives to the ids that are kept.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.config.language import LanguageConfig, only_prompt
from kdhpc.errors import InputError
from kdhpc.experiment.prompts import Prompts, all_ids, prompts_of
from kdhpc.plan.shards import ADDED, digest
from kdhpc.types import Json

if TYPE_CHECKING:
    from torch import Tensor

    from kdhpc.models.loading import Loaded
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.token_shards import Samples

STREAM = "truth/vocabulary"
"""Random stream of the samples that decide which ids are kept; the cut model has one below it."""
BATCH_ROWS = 64
CHOOSE_ROWS = 256
"""Number of samples of the whole model that decide which ids are kept."""
MASS_ROWS = 64
"""Number of samples of each of the two models on which the kept probability is measured. Those of
the whole model are not among `CHOOSE_ROWS`, on which it would be too high."""
HEAD_TOKENS = 256
"""Number of positions whose probabilities are in memory at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Settings that determine to which ids the truth's vocabulary is cut."""

    num_ids: int
    fingerprint: str
    """Digest of the ids if a file lists them; empty if they are the likeliest."""
    seed: int
    prompt: str
    length: int
    """Number of tokens of each sample, the prompt included."""
    threads: int
    begin: str = dataclasses.field(default="tokenizer", metadata=ADDED)
    prompts: Prompts | None = dataclasses.field(default=None, metadata=ADDED)

    @staticmethod
    def of(config: LanguageConfig) -> "Cut | None":
        """Return how a run cuts the truth's vocabulary; None if it does not."""
        truth = config.truth
        if truth.vocabulary is None:
            return None
        return Cut(
            num_ids=truth.vocabulary,
            fingerprint=truth.vocabulary_fingerprint,
            seed=config.seed,
            prompt=only_prompt(config),
            length=config.length,
            threads=config.threads,
            begin=config.begin,
            prompts=Prompts.of(config, "train"),
        )


def read_ids(file: str) -> list[int]:
    """Read the ids of `truth.vocabulary_file`, one integer a line, and return them increasing.

    Raises:
        InputError: if the file is not readable, has no ids, or lists one twice.
    """
    name = f"truth.vocabulary_file={file}"
    try:
        ids = sorted(int(line) for line in Path(file).expanduser().read_text().split())
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: expected a file with one integer a line ({error})") from error
    if not ids or len({*ids}) < len(ids):
        raise InputError(f"{name}: has no ids, or one twice; expected one integer a line")
    return ids


def fingerprint_of(ids: Sequence[int]) -> str:
    """Return the digest of increasing ids as 64 hexadecimal digits."""
    return digest(list(ids))


def changed(file: str, fingerprint: str) -> str:
    """Return the error of a file whose ids are no longer those that a run was submitted with."""
    return (
        f"truth.vocabulary_file={file}: has changed since the run was submitted; expected the ids "
        f"with fingerprint {fingerprint[:12]}"
    )


def check(
    tokenizer: "Tokenizer", num_ids: int, ids: Sequence[int] | None, prompt: Sequence[int]
) -> None:
    """Check that a model can be cut to a number of ids, or to the ids of a file.

    Args:
        tokenizer: tokenizer of the whole model.
        num_ids: number of ids that are kept.
        ids: increasing ids of the file; None if the likeliest are kept.
        prompt: ids of all prompts.

    Raises:
        InputError: if the model lacks an id, or one is missing that every run needs.
    """
    needed = _needed(tokenizer, prompt)
    if ids is not None and not 0 <= ids[0] <= ids[-1] < tokenizer.size:
        raise InputError(
            f"truth.vocabulary_file: has ids from {ids[0]} to {ids[-1]}; expected those of the "
            f"model, from 0 to {tokenizer.size - 1}"
        )
    if missing := needed.difference(ids or needed):
        raise InputError(
            f"truth.vocabulary_file: lacks the id {min(missing)}; expected all of "
            f"{sorted(needed)}, which the prompt and the begin and end of a sequence need"
        )
    if not len(needed) <= num_ids <= tokenizer.size:
        raise InputError(
            f"truth.vocabulary={num_ids}: expected at least {len(needed)}, the ids of the prompt "
            f"and of the begin and end of a sequence, and at most the model's {tokenizer.size}"
        )


def _needed(tokenizer: "Tokenizer", prompt: Sequence[int]) -> set[int]:
    """Return the ids that are always kept: of the prompt, of all ends, of the begin if any."""
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    return {*prompt, tokenizer.eos, *tokenizer.other_ends, *begin}


def cut(
    whole_path: Path,
    out: Path,
    settings: Cut,
    *,
    ids_file: str | None,
    dtype: str,
    device: str,
    prompts_file: str | None = None,
) -> dict[str, Json]:
    """Choose the ids that are kept, save the cut model, and measure what it lost.

    Args:
        whole_path: checkpoint folder of the whole model.
        out: the new folder of the cut model.
        settings: to which ids it is cut.
        ids_file: file of the ids; None if the likeliest are kept.
        dtype: dtype in which both models are sampled.
        device: device of the config.
        prompts_file: where the prompts are, if there are several.

    Returns:
        `num_ids`; `mass_kept` and `mass_kept_own`, the probability that the whole model gives to
        the kept ids on average over the tokens of its own samples, and of the cut model's.

    Raises:
        InputError: if the model cannot be cut to these ids.
    """
    import numpy as np

    from kdhpc.models import huggingface, loading

    ids, mass_kept, num_whole = _choose(whole_path, settings, ids_file, dtype, device, prompts_file)
    loading.forget()  # two large models may not fit into memory
    huggingface.cut_vocabulary(whole_path, ids, out)
    cut_model, stream = loading.load(out, dtype, device), f"{STREAM}/own"
    own = _sample(cut_model, settings, stream, range(MASS_ROWS), prompts_file)
    own = dataclasses.replace(own, ids=np.array(ids, np.uint32)[own.ids])
    mass_kept_own = _mass(loading.load(whole_path, dtype, device), own, ids, settings)
    loading.forget()
    print(  # noqa: T201 (for the shard's log)
        f"{len(ids)} of {num_whole} ids keep {mass_kept:.3%} of the probability of a token on the "
        f"whole truth's samples, and {mass_kept_own:.3%} on those of the cut truth",
        flush=True,
    )
    return {"num_ids": len(ids), "mass_kept": mass_kept, "mass_kept_own": mass_kept_own}


def _choose(
    path: Path,
    settings: Cut,
    ids_file: str | None,
    dtype: str,
    device: str,
    prompts_file: str | None,
) -> tuple[list[int], float, int]:
    """Return the ids that are kept, the probability that they have, and the number of all ids.

    Raises:
        InputError: if the model in the folder `path` cannot be cut to these ids.
    """
    from kdhpc.models import loading
    from kdhpc.models.tokenizer import Tokenizer

    ids = None if ids_file is None else read_ids(ids_file)
    if ids_file is not None and ids is not None and fingerprint_of(ids) != settings.fingerprint:
        raise InputError(changed(ids_file, settings.fingerprint))
    tokenizer = Tokenizer(path)
    prompt = all_ids(tokenizer, prompt=settings.prompt, begin=settings.begin, source=prompts_file)
    check(tokenizer, settings.num_ids, ids, prompt)
    whole = loading.load(path, dtype, device)
    first = CHOOSE_ROWS if ids else 0
    rows = range(first, CHOOSE_ROWS + MASS_ROWS)
    samples = _sample(whole, settings, STREAM, rows, prompts_file)
    if ids is None:
        mean = _mean_probability(whole, samples[:CHOOSE_ROWS], settings)
        ids = _likeliest(mean, settings.num_ids, _needed(tokenizer, prompt))
    return ids, _mass(whole, samples[-MASS_ROWS:], ids, settings), tokenizer.size


def _likeliest(mean: "Tensor", num_ids: int, needed: set[int]) -> list[int]:
    """Return the needed ids and the likeliest others, increasing.

    Args:
        mean: [V] mean probability of each id.
        num_ids: number of ids to return, at least as many as are needed.
        needed: ids that are always kept.
    """
    import torch

    rank = mean.index_fill(0, torch.tensor(sorted(needed)), torch.inf)
    # A stable sort decides between equal probabilities by the id.
    chosen: list[int] = rank.argsort(descending=True, stable=True)[:num_ids].sort().values.tolist()
    return chosen


def _counting(loaded: "Loaded", settings: Cut) -> "Counting":
    """Return which tokens are measured: all after the prompt, the end of a sequence included."""
    from kdhpc.scoring.counting import Counting

    num_prompt = loaded.tokenizer.num_prompt(settings.prompt, settings.begin)
    return Counting.with_tokenizer(loaded.tokenizer, num_prompt=num_prompt, count_eos=True)


def _sample(
    loaded: "Loaded", settings: Cut, stream: str, rows: range, prompts_file: str | None
) -> "Samples":
    """Draw sequences from a model at temperature 1, in batches of `BATCH_ROWS`."""
    from kdhpc.sampling.sampler import Sampler, sample
    from kdhpc.selection import Selection

    sampler = Sampler(
        loaded.model,
        prompts=prompts_of(
            loaded.tokenizer,
            prompt=settings.prompt,
            begin=settings.begin,
            prompts=settings.prompts,
            source=prompts_file,
            seed=settings.seed,
        ),
        length=settings.length,
        batch_rows=BATCH_ROWS,
        selection=Selection(),
        draw="inverse_cdf",
        counting=_counting(loaded, settings),
    )
    return sample(sampler, rows=rows, seed=settings.seed, stream=stream)


def _mass(whole: "Loaded", samples: "Samples", ids: Sequence[int], settings: Cut) -> float:
    """Return the probability of some ids under the whole model, on average over the tokens."""
    return float(_mean_probability(whole, samples, settings)[list(ids)].sum())


def _mean_probability(loaded: "Loaded", samples: "Samples", settings: Cut) -> "Tensor":
    """Return the mean probability of each id over the tokens that count, [V] float64 on the CPU."""
    import numpy as np
    import torch

    from kdhpc.models.devices import exact_matmuls
    from kdhpc.scoring.scorer import lengths_of

    model, counting = loaded.model, _counting(loaded, settings)
    total = torch.zeros(model.vocab_size, dtype=torch.float64, device=model.device)
    num_tokens = 0
    with torch.inference_mode(), exact_matmuls():
        for start in range(0, len(samples), BATCH_ROWS):
            batch = samples[start : start + BATCH_ROWS]
            ids = torch.from_numpy(batch.ids.astype(np.int64)).to(model.device)
            counts = counting.of(ids, *lengths_of(batch, model.device))
            # The state before a token predicts it.
            states = model.hidden(ids)[:, :-1][counts[:, 1:]]
            for some in torch.split(states, HEAD_TOKENS):
                total += model.head(some).softmax(1).sum(0, dtype=torch.float64)
            num_tokens += len(states)
    return total.cpu() / num_tokens
