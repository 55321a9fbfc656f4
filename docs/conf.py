"""Build a site from the Markdown files of the project: `make docs`.

The pages are those that a reader of the repository sees. A link to a file that is no page becomes a
download, and a link or an anchor that leads nowhere ends the build.
"""

from sphinx.application import Sphinx

project = "kdhpc"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "slurm/README.md"]
html_theme = "furo"
html_title = "kdhpc"
html_extra_path = ["index.html"]
myst_heading_anchors = 3
nitpicky = True

CONTENTS = {
    "README": """
```{toctree}
:hidden:
:caption: For users

docs/first-day
docs/own-pipeline
docs/training
docs/models
docs/mixture
docs/statistics
docs/results
docs/downstream
docs/reliability
docs/performance
docs/gpu
slurm/README
```
```{toctree}
:hidden:
:glob:
:caption: What we found

docs/experiments/*
docs/results/*/README
docs/results/*/journal
docs/log
```
```{toctree}
:hidden:
:caption: For contributors

CONTRIBUTING
docs/decisions/README
CHANGELOG
```
""",
    "docs/decisions/README": """
```{toctree}
:glob:

0*
```
""",
}
"""Menus by the page that they follow; only a site needs them."""


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Add the menu of a page to its text."""
    source[0] += CONTENTS.get(name, "")
