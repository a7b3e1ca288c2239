"""Builds the documentation: `python -m sphinx -W docs docs/_build`, with the extra `docs` installed."""

import re

import robust_keras

project = "robust_keras"
version = release = robust_keras.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"  # It asks no other site for fonts or scripts.
html_title = f"robust_keras {version}"
html_copy_source = False
myst_heading_anchors = 3
autosummary_generate = True
# What a package has from its modules is described there.
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
suppress_warnings = ["ref.python"]  # Words before a colon under "Returns" are no names of types.
napoleon_use_ivar = True  # Fields of a NamedTuple are documented once.


def markdown_to_rst(app, what, name, obj, options, lines):
    """Docstrings are Markdown: code in single backticks, indented blocks of code, other signs that mean themselves."""
    blocks, texts = [], [[]]
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        in_block = bool(blocks) and texts[-1] == []
        starts = line.startswith("    ") and (what == "module" or not before) and not _indented_text(lines[:number])
        if (in_block and (line.startswith("    ") or not line)) or starts:
            if not in_block:
                blocks.append([])
                texts.append([])
            blocks[-1].append(line)
        else:
            texts[-1].append(line)
    converted = _text(texts[0])
    for block, text in zip(blocks, texts[1:]):
        converted += ["", "::", "", *block, "", *_text(text)]
    lines[:] = converted


def _indented_text(lines):
    """Whether the last line that is not empty is an indented one, as in the sections of a docstring."""
    return next((line.startswith(" ") for line in reversed(lines) if line), False)


def _text(lines):
    parts = re.split(r"(?<![`:])`([^`]+)`(?!`)", "\n".join(lines))
    text = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
    code = [f"``{' '.join(part.split())}``\\ " for part in parts[1::2]]
    return "".join(a + b for a, b in zip(text, [*code, ""])).split("\n")


def is_field(app, what, name, obj, skip, options):
    """Whether a member says no more than which field of a NamedTuple it is: the class describes its fields."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Docstrings are converted before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
    app.connect("autodoc-skip-member", is_field)
