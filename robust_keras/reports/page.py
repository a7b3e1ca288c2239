"""A report as one page of HTML that needs nothing else: no script, no font, no picture from elsewhere.

    pathlib.Path("report.html").write_text(page.html(["runs/at", "runs/at/autoattack"]))

Whatever stands in a file is text in it. A policy in its head forbids the browser to ask for anything.
"""

import base64
import functools
import html as escapes
import itertools
import re
from collections.abc import Sequence
from typing import Any

from robust_keras.reports import blocks, document
from robust_keras.reports.contents import LoadImages
from robust_keras.reports.style import CSS
from robust_keras.shown_text import printable

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_MOST_WORDS, _MOST_CODE, _MOST_LISTING = 4000, 300, 60_000  # Characters.


def html(folders: Sequence[str], *, baselines: Sequence[str] = (), load_images: LoadImages | None = None) -> str:
    """The page of a report of runs and evaluations.

    Args:
        folders: of runs, with metrics.csv, or of finished evaluations, with results.json.
        baselines: folders of evaluations to compare those with, one for each.
        load_images: what returns the images that were evaluated, see `contents.LoadImages`; None for no pictures.

    Raises:
        ValueError: for folders of something else, or files that hold it.
    """
    return of(document.read(folders, baselines=baselines, load_images=load_images))


def of(report: blocks.Report) -> str:
    """The page of a report that was read."""
    ids = (f"part-{k}" for k in itertools.count(1))
    numbered = [(next(ids), block) for block in report.blocks]
    links = [f'<li><a href="#{name}">{_words(block.title)}</a></li>' for name, block in numbered]
    plots = itertools.count(1)
    body = "\n".join(_section(block, 2, name, plots) for name, block in numbered)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(report.title, 200)}</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{_text(report.title, 200)}</h1>
<nav aria-label="Sections"><ul>
{chr(10).join(links)}
</ul></nav>
</header>
<main id="content">
{body}
</main>
</body>
</html>
"""


def _section(section: blocks.Section, level: int, name: str, plots: Any) -> str:
    inner = "\n".join(
        _section(block, level + 1, f"{name}-{k}", plots) if isinstance(block, blocks.Section) else _block(block, plots)
        for k, block in enumerate(section.blocks, 1)
    )
    heading = f'<h{level} id="{name}">{_words(section.title)}</h{level}>'
    return f"<section>\n{heading}\n{inner}\n</section>"


@functools.singledispatch
def _block(block: Any, plots: Any) -> str:
    raise TypeError(f"Expected a block of a report. Received: {type(block).__name__}")


@_block.register
def _(block: blocks.Paragraph, plots: Any) -> str:
    return f'<p class="alert">{_words(block.words)}</p>' if block.is_alert else f"<p>{_words(block.words)}</p>"


@_block.register
def _(block: blocks.Items, plots: Any) -> str:
    return "<ul>" + "".join(f"<li>{_words(item)}</li>" for item in block.items) + "</ul>"


@_block.register
def _(block: blocks.Table, plots: Any) -> str:
    header, *lines = block.lines
    head = "".join(f'<th scope="col">{_words((cell,))}</th>' for cell in header)
    rows = []
    for k, (first, *cells) in enumerate(lines):
        shades = block.shades[k] if block.shades else (0,) * len(cells)
        data = "".join(f"<td{_classes(cell, shade)}>{_words((cell,))}</td>" for cell, shade in zip(cells, shades))
        rows.append(f'<tr><th scope="row">{_words((first,))}</th>{data}</tr>')
    kind = ' class="shaded"' if block.shades else ""
    label = escapes.escape(printable(block.caption, most=80))
    return (
        f'<div class="wide" role="group" tabindex="0" aria-label="{label}"><table{kind}>'
        f"<caption><span>{_text(block.caption)}</span></caption><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )


@_block.register
def _(block: blocks.Plot, plots: Any) -> str:
    return (
        f"<figure>{_inline(block.svg, block.alt, next(plots))}"
        f"<figcaption>{_text(block.caption)}</figcaption></figure>\n"
        f"<details><summary>The numbers of this plot: {_text(block.numbers.caption)}</summary>"
        f"{_block(block.numbers, plots)}</details>"
    )


@_block.register
def _(block: blocks.Pictures, plots: Any) -> str:
    found = []
    for picture in block.pictures:
        images = "".join(
            f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{_text(alt)}">'
            for alt, png in picture.images
        )
        found.append(f"<li>{images}{''.join(f'<div>{_words(words)}</div>' for words in picture.words)}</li>")
    return f'<p>{_text(block.caption)}</p>\n<ul class="grid">{chr(10).join(found)}</ul>'


@_block.register
def _(block: blocks.Listing, plots: Any) -> str:
    lines = "\n".join(printable(line, most=1000) for line in block.text[:_MOST_LISTING].splitlines())
    title = _text(block.title)
    return (
        f"<details><summary>{title}</summary>"
        f'<pre role="group" tabindex="0" aria-label="{title}">{escapes.escape(lines)}</pre></details>'
    )


def _classes(cell: str, shade: int) -> str:
    """How dark text is shaded, and whether it stays on one line, as numbers do."""
    kinds = [f"s{shade}"] * bool(shade) + ["short"] * (len(cell) < 20)
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _inline(svg: str, alt: str, number: int) -> str:
    """An SVG of matplotlib as an image of a page: with an alternative text, and identifiers of its own."""
    svg = re.sub(r'id="([^"]+)"', rf'id="plot{number}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#plot{number}-", svg)
    svg = re.sub(r'href="#', f'href="#plot{number}-', svg)
    box = re.search(r'viewBox="[\d. ]+"', svg)
    inner = svg[svg.index(">") + 1 :]
    return f'<svg role="img" aria-label="{_text(alt)}" {box[0] if box else ""}>{inner}'


def _words(words: Sequence[str]) -> str:
    return "".join(
        f"<code{_classes(word, 0)}>{_text(word, _MOST_CODE)}</code>" if isinstance(word, blocks.Code) else _text(word)
        for word in words
    )


def _text(text: str, most: int = _MOST_WORDS) -> str:
    return re.sub(r"(?<=\d) %", "&nbsp;%", escapes.escape(printable(text, most=most)))
