"""How the documentation is built: ``make docs`` writes it to build/docs.

The sources are the pages as they lie in the repository, so that each link that works there works on the site too. That
is why the root of the sources is the root of the repository, and `include_patterns` names what becomes a page.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.domains.python import PyObject
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

project = "microbatch"
author = "The microbatch developers"
copyright = author  # noqa: A001 - Sphinx's own name for it
release = version = importlib.metadata.version("microbatch")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
]

# The inventory of torch lies on the network: `DOCS_INTERSPHINX=1 make docs` asks for it, and nothing else needs it.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

# -- pages ------------------------------------------------------------------------------------------------------------

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
highlight_language = "text"
linkcheck_ignore = [r"https://github\.com/OWNER/.*"]

# -- docstrings ---------------------------------------------------------------------------------------------------

default_role = "py:obj"  # `Step` is a link where there is a Step
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Cost", "notes_style"), ("Source", "notes_style")]
# The integrations are described also where their frameworks are not installed.
autodoc_mock_imports = [
    "accelerate",
    "deepspeed",
    "lightning",
    "pytorch_lightning",
    "sentence_transformers",
    "transformers",
    "trl",
]

# -- the site -----------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"microbatch {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # index.html, which leads from the root of the site to docs/index.html
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
html_theme_options = {"navigation_with_keys": True}


def write_links(*event: Any) -> None:
    """Turn the paths of pages in a docstring into links, and leave out what only names laws of the tests."""
    lines: list[str] = event[-1]
    text = re.sub(r"``(docs/[\w/-]+)\.md``", r":doc:`/\1`", "\n".join(lines))
    text = re.sub(r"^Source:\n +Laws? [^\n]*\n?", "", text, flags=re.MULTILINE)
    # What stands before a colon there is no type: with a colon before it, napoleon takes none out.
    text = re.sub(r"^((?:Returns|Yields):\n +)(?=\S)", r"\1: ", text, flags=re.MULTILINE)
    lines[:] = text.splitlines()


class CommandHelp(SphinxDirective):
    """The help of one command, as the terminal shows it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Run the command with --help."""
        command = [sys.executable, "-m", "microbatch", self.arguments[0], "--help"]
        environment = os.environ | {"COLUMNS": "96", "NO_COLOR": "1", "PYTHONPATH": str(ROOT / "src")}
        text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout  # noqa: S603
        return [nodes.literal_block("", text.strip(), language="text")]


def setup(app: Any) -> None:
    """Read docstrings before napoleon does, and call the attributes of a class by this name."""
    app.connect("autodoc-process-docstring", write_links, priority=400)
    app.add_directive("command-help", CommandHelp)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
