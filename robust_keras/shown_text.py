"""Text that somebody else made, as a terminal, a log, a table and a page of Markdown can show it.

It needs the standard library alone, since `verify.py` beside an export has it too.
"""

import re


def printable(text: object, *, most: int = 200) -> str:
    """Text of a file as a terminal, a log and a table can show it: on one line, without anything that steers.

    Control and format characters, line breaks and those that turn the direction of writing stand as escapes.

    Args:
        text: anything; what `str` makes of it counts.
        most: characters, after which it is cut.
    """
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text)[:most])
    return shown if len(str(text)) <= most else f"{shown}..."


def as_code(text: object, *, most: int = 200) -> str:
    """Text of a file in Markdown, as code: no markup, HTML or link in it means anything, and it stays on one line.

    Args:
        text: see `printable`, like `most`.
    """
    shown = printable(text, most=most).replace("`", "'")
    return f"`{shown or ' '}`"


def table_cell(text: object, *, most: int = 200) -> str:
    """Text of a file as a cell of a Markdown table: it ends no cell, and is no HTML and no link.

    Args:
        text: see `printable`, like `most`.
    """
    shown = printable(text, most=most)
    for mark, written in (("|", "\\|"), ("<", "&lt;"), ("](", "]\\(")):
        shown = shown.replace(mark, written)
    return shown


def as_text(text: object, *, most: int = 4000) -> str:
    """Text of a file among the words of a Markdown page: no mark in it means anything, and it stays on one line.

    Args:
        text: see `printable`, like `most`.
    """
    shown = printable(text, most=most).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]#|~>$])", r"\\\1", shown)
