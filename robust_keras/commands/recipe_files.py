"""The files of a recipe: they bind and include, and run nothing.

An include is a `.gin` file below `gin/`, or below the folder of the recipe, wherever links lead; no other file is
opened, so that no error can quote it. `import` may name what the command's `--import` has imported already. gin gets
the very texts that were looked through, not what an editor would show of them.
"""

import io
import os
import pathlib
import posixpath
from collections.abc import Iterable, Sequence

from gin import config_parser
from robust_keras.commands import gin_text
from robust_keras.foreign_files import open_regular, printable

MOST_BYTES = 1 << 18  # Of a file, and of a recipe, with the empty lines that stand in a part for those before it.
MOST_PARTS = 1000  # Of a recipe: the includes of includes.
_GIVEN = "the given bindings"
_imported: set[str] = set()  # What --import named.


class Part(io.StringIO):
    """Part of a gin file, with its name and the numbers of its lines."""

    def __init__(self, name: str, lines: list[str], first: int):
        super().__init__("\n" * first + "\n".join(lines))
        self.name = name


class _Parts(list[Part]):
    """The parts of a recipe, of so many characters together."""

    _left = MOST_BYTES

    def take(self, num_characters: int, name: str) -> None:
        """Raises ValueError where a recipe comes to more than it may; before it is read."""
        self._left -= num_characters
        if self._left < 0:
            most = f"{MOST_BYTES:,} characters of a recipe, the lines before each include counted again"
            raise ValueError(f"Expected at most {most}. Received: more in {printable(name)}")


def gin_directory() -> pathlib.Path:
    """The folder of the recipes: in the installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    return next(path for path in (package / "gin", package.parent / "gin") if path.is_dir())


def let_import(names: Iterable[str]) -> None:
    """Lets recipes import modules, which are imported already."""
    _imported.update(names)


def read(gin_files: Iterable[str | os.PathLike], gin_params: Sequence[str]) -> list[Part]:
    """The texts of files, in parts, each include replaced by the parts of what it includes; then the bindings.

    Args:
        gin_files: paths, taken as they are, or relative to the folder of the recipes (with or without `gin/`).
        gin_params: bindings.

    Raises:
        ValueError: naming the file, for one that is not there, is too large, or does more than it may.
    """
    parts = _Parts()
    for path in gin_files:
        _add(parts, _typed(os.fspath(path)), ())
    _add_text(parts, _GIVEN, "\n".join(gin_params), ())
    return parts


def _add(parts: _Parts, path: str, inside: tuple[str, ...]) -> None:
    if path in inside:
        raise ValueError(f"Expected files that do not include themselves. Received: {printable(path)}")
    try:
        with open_regular(path, follow=True, most_bytes=MOST_BYTES) as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = "no utf-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ValueError(f"Expected a gin file that can be read. Received: {printable(path)}, {why}") from error
    _add_text(parts, path, text, (*inside, path))


def _add_text(parts: _Parts, name: str, text: str, inside: tuple[str, ...]) -> None:
    parts.take(len(text), name)
    lines, first = _lines(text), 0
    for statement in gin_text.statements("\n".join(lines), name):
        if isinstance(statement, config_parser.ImportStatement):
            _check_import(statement, name)
        if isinstance(statement, (config_parser.IncludeStatement, config_parser.ImportStatement)):
            number = statement.location.line_num
            parts.take(first, name)
            _add_part(parts, Part(name, lines[first : number - 1], first))
            first = number
        if isinstance(statement, config_parser.IncludeStatement):
            _add(parts, _included(statement.filename, inside), inside)
    parts.take(first, name)
    _add_part(parts, Part(name, lines[first:], first))


def _add_part(parts: _Parts, part: Part) -> None:
    """Adds a text, which has to hold no more than bindings where gin reads it, too."""
    for statement in gin_text.statements(part.getvalue(), part.name):
        if isinstance(statement, (config_parser.IncludeStatement, config_parser.ImportStatement)):
            line = f"line {statement.location.line_num}"
            raise ValueError(
                f"Expected includes and imports on lines of their own in {printable(part.name)}. Received: {line}"
            )
    if len(parts) >= MOST_PARTS:
        raise ValueError(f"Expected at most {MOST_PARTS} parts of a recipe. Received: more in {printable(part.name)}")
    parts.append(part)


def _lines(text: str) -> list[str]:
    """The lines of a text as Python's tokenizer counts them: some characters break lines in editors alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _check_import(statement: config_parser.ImportStatement, name: str) -> None:
    if statement.module not in _imported or statement.is_from or statement.alias:
        raise ValueError(
            f"Expected bindings and includes alone in {printable(name)}; --import of the command imports modules. "
            f"Received: {printable(statement.format())}, line {statement.location.line_num}"
        )


def _typed(path: str) -> str:
    for candidate in (path, os.path.join(gin_directory(), path.replace("\\", "/").removeprefix("gin/"))):
        if os.path.isfile(candidate):
            return os.path.abspath(candidate)
    raise ValueError(f"Expected a gin file. Received: {printable(path)}, which there is not")


def _included(path: str, inside: tuple[str, ...]) -> str:
    """The file that an include names, below one of the folders that it may be in."""
    folders = [os.fspath(gin_directory()), *([os.path.dirname(inside[0])] if inside else [])]
    for folder in folders:
        candidate = os.path.join(folder, path)
        if not os.path.isfile(candidate):
            continue
        real = os.path.realpath(candidate)
        if any(os.path.commonpath([real, os.path.realpath(each)]) == os.path.realpath(each) for each in folders):
            if posixpath.splitext(real)[1] == ".gin":
                return real
    raise ValueError(
        f"Expected a .gin file below gin/, or below the folder of the recipe, for an include"
        f"{f' in {printable(inside[-1])}' if inside else ''}. Received: {printable(path)}"
    )
