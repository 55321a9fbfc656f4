#!/usr/bin/env python
"""Print the structure of the code in numbers, so that two commits can be compared.

python benchmarks/structure.py [FOLDER]

FOLDER is the package of this checkout (kdhpc) or of another. Every file counts as a module. Public
names are those of `__all__`, or else those defined at the top level without a leading underscore.
Functions include methods and nested functions. Complexity is measured by ruff. Cycles between files
are found by grimp; imports inside functions count, imports for type checkers only do not.
"""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import grimp
import numpy as np
import tables

MOST_COMPLEX = 10
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    """Read every module and print a table."""
    parser = tables.options(__doc__)
    default = Path(__file__).parents[1] / "kdhpc"
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=default)
    folder = parser.parse_args().folder.resolve()
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}
    if "__init__.py" not in texts:
        parser.error(f"{folder}: not a package")
    trees = {name: ast.parse(text) for name, text in texts.items()}
    packages = Counter(str((folder.name / Path(name)).parent) for name in texts)
    sizes = {name: len(text.splitlines()) for name, text in texts.items()}
    names = {name: len(public_names(tree)) for name, tree in trees.items()}
    functions = [
        node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    with_any = sum(map(mentions_any, functions))
    rows = {f"modules in {name}": count for name, count in sorted(packages.items())} | {
        "lines a module, median": f"{np.median(list(sizes.values())):g}",
        "lines a module, most": "{1} ({0})".format(*max(sizes.items(), key=lambda one: one[1])),
        "lines a function, median": f"{np.median(lengths):g}",
        "lines a function, 90 % have at most": f"{np.percentile(lengths, 90):g}",
        "public names a module, median": f"{np.median(list(names.values())):g}",
        "public names a module, most": "{1} ({0})".format(
            *max(names.items(), key=lambda one: one[1])
        ),
        f"functions of complexity above {MOST_COMPLEX}": num_complex(folder),
        "signatures with Any": f"{with_any} of {len(functions)} ({with_any / len(functions):.1%})",
        "cycles between files": "; ".join(cycles(folder)) or "none",
    }
    width = max(map(len, rows))
    for label, value in rows.items():
        print(f"{label:{width}}  {value}")
    return 0


def public_names(module: ast.Module) -> set[str]:
    """Return the names that a module offers to others."""
    defined: set[str] = set()
    for node in module.body:
        if isinstance(node, Function | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            leaves = [leaf for target in targets for leaf in ast.walk(target)]
            assigned = {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)}
            if "__all__" in assigned and node.value:
                return set(ast.literal_eval(node.value))
            defined |= assigned
    return {name for name in defined if not name.startswith("_")}


def mentions_any(function: Function) -> bool:
    """Return whether the type of an argument or of the result contains `Any`."""
    arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    types = [function.returns, *(argument.annotation for argument in arguments)]
    nodes = [node for declared in types if declared for node in ast.walk(declared)]
    return any("Any" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in nodes)


def num_complex(folder: Path) -> int:
    """Count the functions that ruff finds too complex, ignoring the checkout's own rules."""
    limit = ["--select", "C901", "--config", f"lint.mccabe.max-complexity={MOST_COMPLEX}"]
    own_rules = ["--isolated", "--no-cache", "--ignore-noqa", "--exit-zero"]
    command = [sys.executable, "-m", "ruff", "check", *own_rules, *limit, "--output-format", "json"]
    return len(json.loads(subprocess.check_output([*command, str(folder)])))


def cycles(folder: Path) -> list[str]:
    """Return the strongly connected components of the import graph that have several files."""
    sys.path.insert(0, str(folder.parent))
    graph = grimp.build_graph(folder.name, exclude_type_checking_imports=True, cache_dir=None)
    components = {
        frozenset(graph.find_upstream_modules(name) & graph.find_downstream_modules(name)) | {name}
        for name in graph.modules
    }
    return sorted(" ".join(sorted(part)) for part in components if len(part) > 1)


if __name__ == "__main__":
    sys.exit(main())
