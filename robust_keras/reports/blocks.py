"""What a report consists of, whether it becomes a page or Markdown: its words, tables, plots and pictures."""

from typing import NamedTuple


class Code(str):
    """Text that stands in a file, such as a model's name: shown as it is, and as nothing else."""


class Paragraph(NamedTuple):
    """A paragraph.

    Attributes:
        words: pieces of text that follow each other, some of them `Code`.
        is_alert: whether it speaks against the numbers.
    """

    words: tuple[str, ...]
    is_alert: bool = False


class Items(NamedTuple):
    """A list.

    Attributes:
        items: each the words of one, see `Paragraph`.
    """

    items: tuple[tuple[str, ...], ...]


class Table(NamedTuple):
    """A table.

    Attributes:
        caption: what it shows.
        lines: of cells of text, some of them `Code`; the first is the header, and the first cell of each names it.
        shades: of each line but the header, of each cell but the first, how dark it is, 0 to 9; empty for none.
    """

    caption: str
    lines: tuple[tuple[str, ...], ...]
    shades: tuple[tuple[int, ...], ...] = ()


class Plot(NamedTuple):
    """A plot.

    Attributes:
        svg: what `plots` made.
        alt: what one sees in it, with its numbers.
        caption: what it shows.
        numbers: all that is drawn, as a table.
    """

    svg: str
    alt: str
    caption: str
    numbers: Table


class Picture(NamedTuple):
    """Images of one example.

    Attributes:
        words: what there is to say of it, a line each.
        images: (alternative text, PNG) each.
    """

    words: tuple[tuple[str, ...], ...]
    images: tuple[tuple[str, bytes], ...]


class Pictures(NamedTuple):
    """A grid of pictures.

    Attributes:
        caption: what they show.
        pictures: see `Picture`.
    """

    caption: str
    pictures: tuple[Picture, ...]


class Listing(NamedTuple):
    """Text of a file, to be unfolded.

    Attributes:
        title: what it is.
        text: of several lines.
    """

    title: str
    text: str


class Section(NamedTuple):
    """A section.

    Attributes:
        title: words, see `Paragraph`.
        blocks: of the above, and sections.
    """

    title: tuple[str, ...]
    blocks: tuple


class Report(NamedTuple):
    """A report.

    Attributes:
        title: text.
        blocks: of the above, and sections.
    """

    title: str
    blocks: tuple
