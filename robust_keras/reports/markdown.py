"""A report as Markdown: the page's words and tables; of plots the numbers, of pictures what is to say of them.

Whatever stands in a file is text in it: no link, no HTML, no heading.
"""

import functools
from collections.abc import Sequence
from typing import Any

from robust_keras.evaluation import report as tables
from robust_keras.reports import blocks, document
from robust_keras.reports.contents import LoadImages
from robust_keras.shown_text import as_code, as_text, printable


def text(folders: Sequence[str], *, baselines: Sequence[str] = (), load_images: LoadImages | None = None) -> str:
    """The report of runs and evaluations; arguments and errors are those of `page.html`."""
    return of(document.read(folders, baselines=baselines, load_images=load_images))


def of(report: blocks.Report) -> str:
    """The Markdown of a report that was read."""
    return "\n\n".join([f"# {as_text(report.title)}", *(_block(block, 2) for block in report.blocks)]) + "\n"


@functools.singledispatch
def _block(block: Any, level: int) -> str:
    raise TypeError(f"Expected a block of a report. Received: {type(block).__name__}")


@_block.register
def _(block: blocks.Section, level: int) -> str:
    return "\n\n".join([f"{'#' * level} {_words(block.title)}", *(_block(each, level + 1) for each in block.blocks)])


@_block.register
def _(block: blocks.Paragraph, level: int) -> str:
    return f"> {_words(block.words)}" if block.is_alert else _words(block.words)


@_block.register
def _(block: blocks.Items, level: int) -> str:
    return "\n".join(f"- {_words(item)}" for item in block.items)


@_block.register
def _(block: blocks.Table, level: int) -> str:
    return f"{as_text(block.caption)}:\n\n{tables.markdown(block.lines, most=1000)}"


@_block.register
def _(block: blocks.Plot, level: int) -> str:
    return f"{as_text(block.caption)}\n\n{_block(block.numbers, level)}"


@_block.register
def _(block: blocks.Pictures, level: int) -> str:
    shown = [f"- {', '.join(_words(words) for words in picture.words)}" for picture in block.pictures]
    return "\n".join([f"{as_text(block.caption)} The page shows them:\n", *shown])


@_block.register
def _(block: blocks.Listing, level: int) -> str:
    lines = [f"    {printable(line, most=1000)}" for line in block.text[:60_000].splitlines()]
    return "\n".join([f"{as_text(block.title)}:\n", *lines])


def _words(words: Sequence[str]) -> str:
    return "".join(as_code(word, most=300) if isinstance(word, blocks.Code) else as_text(word) for word in words)
