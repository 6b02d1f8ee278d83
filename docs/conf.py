"""The site that ``make docs`` builds, warnings as errors: docs/_build/html/index.html.

Its source is the repository and its front page the README, so that links between documents are the same
here, on a forge and on disk. A link to a file that is no document is one to a copy of it; to a folder it is
its text.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import kfqn

project, author, version = "kfqn", "The kfqn developers", kfqn.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/notebook/*.md", "docs/*.ipynb", "benchmarks/*.md"]
html_title, html_theme = f"kfqn {version}", "furo"
html_extra_path = ["site"]  # the page that a folder or a server opens first leads to README.html
html_static_path, html_css_files = ["static"], ["site.css"]
suppress_warnings = ["toc.not_included"]  # entries of the notebook are in its own index
html_show_sourcelink = html_show_copyright = False
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is shown as it was committed; a test runs it
default_role = "py:obj"  # `Name` of a docstring: a link where it is on the API page, code elsewhere
autodoc_preserve_defaults = True
autodoc_mock_imports = ["accelerate", "lightning", "skorch", "transformers"]  # the site is built without
autodoc_inherit_docstrings = False  # what a part fills in is told where it is asked for
autodoc_member_order = "bysource"
maximum_signature_line_length = 88

CONTENTS = {
    "Use": (
        "docs/first_steps",
        "docs/coming_from",
        "docs/guide",
        "docs/distributed",
        "docs/api",
        "docs/api_parts",
    ),
    "Method": ("docs/method", "docs/parts", "docs/paper", "docs/decisions"),
    "What holds": ("docs/results", "docs/development", "benchmarks/README", "docs/notebook/README"),
    "Project": ("CHANGELOG", "CONTRIBUTING"),
}


def with_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """The front page leads to all others, in the margin."""
    if page == root_doc:
        for title, pages in CONTENTS.items():
            tree = ["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""]
            source[0] += "\n".join(tree)


def without_folders(app: Sphinx, document: nodes.document) -> None:
    """A link to a folder of the repository is its text."""
    for node in [*document.findall(addnodes.pending_xref)]:
        place = (Path(app.srcdir) / app.env.docname).parent / node["reftarget"]
        if node["reftype"] == "myst" and place.is_dir():
            node.replace_self(node.children)


def with_shapes(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """The stars of shapes, as in (*g, I, C), are no markup."""
    lines[:] = [re.sub(r"(`[^`]*`)|\*(?=[gT]\b)", lambda m: m[1] or r"\*", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect("source-read", with_contents)
    app.connect("doctree-read", without_folders)
    app.connect("autodoc-process-docstring", with_shapes)
