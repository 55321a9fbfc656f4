"""Make the small finished runs of a run format that every later commit must read and extend.

    python tests/make_format_runs.py

They are made once, when a format is new, and never again, because they must be what an earlier
commit wrote.
"""

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from commands import launch

from kdhpc.cluster.runs import FORMAT

DATA = Path(__file__).parent / "data"
CORPUS = "A rose is a rose.\n\nThe rest is silence, and the silence is long.\n\nThe end.\n\n"
RUNS = {
    "language": [
        "tiny", "taus=[1.0,0.6]", "sampling.train_sequences=64", "sampling.eval_sequences=32",
        "sampling.shard_sequences=32", "scoring.shard_sequences=16", "scoring.batch_rows=16",
        "truth.training.batch_sequences=8", "truth.training.epochs=4.0",
    ],
    "mixture": ["mixture", "seeds=2", "shard_seeds=1", "betas=[1,100]", "eval_points=100"],
}  # fmt: skip


def main() -> int:
    for name, words in RUNS.items():
        archive = DATA / f"format-{FORMAT}-{name}.tar.xz"
        if archive.exists():
            print(f"{archive}: exists; a run of an existing format is never made again")
            return 1
        with tempfile.TemporaryDirectory() as folder:
            if name == "language":
                corpus = Path(folder) / "corpus.txt"
                corpus.write_text(CORPUS * 20)
                words = [*words, f"truth.corpus={corpus}"]
            launch("sweep", *words, "cluster=local", f"runs_dir={folder}", f"name={name}")
            shutil.rmtree(Path(folder) / name / "code")
            with tarfile.open(archive, "w:xz") as file:
                file.add(folder, arcname=".")
        print(f"{archive}: {archive.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
