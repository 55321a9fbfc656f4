# PYTHON_ARGCOMPLETE_OK
"""Run a script of launch/ or analysis/ by its name, without a clone.

    python -m kdhpc COMMAND [ARGUMENT ...]
    kdhpc COMMAND [ARGUMENT ...]

`kdhpc sweep demo` is `python launch/sweep.py demo`. Without a command they are listed, and
`kdhpc COMMAND --help` explains one.
"""

import ast
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from kdhpc import __version__
from kdhpc.cluster import completion
from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.project import PROJECT_DIR

FOLDERS = ("launch", "analysis")
SHEBANG = "#!"
"""A file that begins with it is a script; other files are modules of the scripts beside them."""


def start() -> NoReturn:
    """Run what was typed, and end the process with its exit code."""
    command(main)


def main(arguments: list[str]) -> int:
    """Run a command, which ends the process with its own exit code, or list them.

    Raises:
        InputError: for an unknown command.
    """
    scripts = commands()
    answering = {name: path.parent.name == "launch" for name, path in scripts.items()}
    if (name := completion.command(answering)) is not None:
        arguments = [name]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing(scripts))
        return 0
    if arguments[0] not in scripts:
        raise InputError(f"{arguments[0]}: no such command; expected one of {', '.join(scripts)}")
    script = scripts[arguments[0]]
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    runpy.run_path(str(script), run_name="__main__")
    return 0


def commands() -> dict[str, Path]:
    """Return the scripts by name, those of launch/ first."""
    return {
        path.stem: path
        for folder in FOLDERS
        for path in sorted((PROJECT_DIR / folder).glob("*.py"))
        if path.read_text("utf-8").startswith(SHEBANG)
    }


def listing(scripts: dict[str, Path]) -> str:
    """Return the help: how a command is typed, and a line for each."""
    width = max(map(len, scripts))
    lines = [f"kdhpc {__version__}: kdhpc COMMAND [ARGUMENT ...], or --help after a command"]
    for folder in FOLDERS:
        lines.append("")
        for name, path in scripts.items():
            if path.parent.name == folder:
                text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
                summary = text.partition("\n")[0]
                lines.append(f"  {name.ljust(width)}  {summary}")
    return "\n".join(lines)


if __name__ == "__main__":
    start()
