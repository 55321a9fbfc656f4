"""Break kdhpc on purpose, in one way at a time, and check that the scenario for it fails.

    python tests/faults/mutations.py [NAME ...]

Each mutation is made in a copy of the tree. Exit code 0 if every one is caught.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
Edit = tuple[str, str, str]
"""A file, the text that is in it, and the text that replaces it."""

MUTATIONS: dict[str, tuple[list[Edit], str]] = {
    "publish becomes rename": (
        [("kdhpc/storage/files.py", "os.link(temporary, path)\n", "os.replace(temporary, path)\n")],
        "test_of_two_live_writers_the_first_wins",
    ),
    "the gate waits with afterok": (
        [("kdhpc/cluster/submission.py", "afterany:", "afterok:")],
        "test_a_process_killed_before_it_publishes_is_tried_again",
    ),
    "the map is rewritten on relaunch": (
        [
            (
                "kdhpc/cluster/ledger.py",
                "        return write_once(path, asdict(submission))\n",
                "        won = write_once(path, asdict(submission))\n"
                "        first = path.with_name('0001.json')\n"
                "        if won and path != first:  # the newest plan replaces the old one\n"
                "            again = {**read_once(first), 'tasks': submission.tasks}\n"
                "            first.unlink()\n"
                "            write_once(first, again)\n"
                "        return won\n",
            )
        ],
        "test_a_relaunch_while_half_the_array_is_queued_changes_no_queued_task",
    ),
    "the merge verifies nothing": (
        [("kdhpc/storage/work.py", "            self._verify(record)\n", "")],
        "test_damage_found_by_the_merge_is_not_merged",
    ),
    "a death ends the whole packed task": (
        [("kdhpc/cluster/batch_script.py", "--kill-on-bad-exit=0", "--kill-on-bad-exit=1")],
        "test_a_process_of_a_packed_task_dies_alone",
    ),
    "a user's hold is released": (
        [("kdhpc/cluster/observe.py", "forgotten = released is None or", "forgotten = True or")],
        "test_what_a_user_holds_stays_held",
    ),
    "--open-mode=append goes": (
        [
            (
                "kdhpc/cluster/batch_script.py",
                '            "propagate": "NONE",\n',
                '            "propagate": "NONE",\n            "open-mode": "truncate",\n',
            )
        ],
        "test_a_requeued_task_keeps_the_log_of_its_first_try",
    ),
}


def copy_of_the_tree(folder: Path) -> Path:
    """Copy tracked files, and untracked ones that git does not ignore; return the folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def play(name: str, edits: list[Edit], test: str) -> bool:
    """Return whether the scenario fails on the broken copy."""
    with tempfile.TemporaryDirectory(prefix="kdhpc-mutant-") as folder:
        tree = copy_of_the_tree(Path(folder))
        for file, old, new in edits:
            text = (tree / file).read_text()
            if text.count(old) != 1:
                sys.exit(f"{name}: {file} has {text.count(old)} times {old!r}; expected once")
            (tree / file).write_text(text.replace(old, new))
        started = time.monotonic()
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/faults", "-q", "-x", "-k", test],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "FAULTS": "all"},
            capture_output=True,
            text=True,
        )
    caught = (
        finished.returncode == 1 and f"{test}" in finished.stdout and "1 failed" in finished.stdout
    )
    why = [line for line in finished.stdout.splitlines() if line.startswith("E  ")][:1]
    seconds = time.monotonic() - started
    print(f"{'caught' if caught else 'MISSED'}  {name}  ({seconds:.0f} s; {test})", flush=True)
    print(f"        {' '.join(why)[:160] if caught else finished.stdout[-3000:]}", flush=True)
    return caught


def main() -> int:
    wanted = sys.argv[1:] or list(MUTATIONS)
    results = [play(name, *MUTATIONS[name]) for name in wanted]
    print(f"{sum(results)} of {len(results)} mutations caught")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
