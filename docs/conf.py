"""The documentation site: `make docs`."""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mollm  # noqa: E402

project = "mollm"
author = "the mollm authors"
copyright = "the mollm authors, Apache-2.0"
version = release = mollm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
default_role = "py:obj"  # names in docstrings stand in single backticks
viewcode_follow_imported_members = True
smartquotes_action = "D"  # dashes, no quotes: docstrings name values such as "mean"
highlight_language = "none"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebook; the site shows what is stored in it

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay readable; docstrings give shapes and units
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"mollm {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "github-dark"


# ---- docstrings: an indented block is an equation or a listing, and stays as it is

SECTION = re.compile(
    r"(Args|Keyword Args|Returns|Raises|Yields|Example|Examples|Attributes|Note):$"
)


def literal_blocks(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Marks indented blocks outside of Google sections as literal, and escapes the text."""
    result: list[str] = []
    in_section = literal = False
    for number, line in enumerate(lines):
        indented = line.startswith(" ")
        if line and not indented:
            in_section, literal = bool(SECTION.match(line)), False
        elif indented and not in_section and not literal and not lines[number - 1].strip():
            result += ["::", ""]
            literal = True
        code = literal or line.lstrip().startswith((">>>", "..."))
        result.append(line if code else escaped(line))
    if what in ("attribute", "data", "property"):
        result.insert(0, "")  # else napoleon takes what stands before a colon for a type
    lines[:] = result


def escaped(line: str) -> str:
    """Bars and stars are no markup outside of code; those that lead a line are napoleon's."""
    parts = re.split(r"(`[^`]*`|^ *\*+)", line)
    return "".join(p if re.match(r"`| *\*", p) else re.sub(r"([|*])", r"\\\1", p) for p in parts)


# ---- settings: their help texts stand with the fields, and nowhere else


def settings(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Lists the fields that a dataclass adds to its base, or gives another default."""
    if name != "mollm.MOLLMConfig" or not is_dataclass(obj):
        return
    lines += ["", "Keyword Args:"]
    for field in fields(obj):
        if field.name in obj.__annotations__:
            default = {} if field.default is MISSING else field.default
            lines.append(f"    {field.name}: {field.metadata['help']} (default: ``{default!r}``)")


# ---- equations as MathML: browsers draw it by themselves, without a script and without a network


def mathml(translator: HTML5Translator, node: nodes.math | nodes.math_block, display: str) -> str:
    """The equation of a node."""
    return latex2mathml.converter.convert(node.astext(), display=display)


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(translator, node, "inline"))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})</span>')
    translator.body.append(mathml(translator, node, "block") + "</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", settings, priority=100)  # both before napoleon
    app.connect("autodoc-process-docstring", literal_blocks, priority=200)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
