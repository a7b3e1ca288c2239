"""The working folder of a command: its default name, and the configuration in it that says whose it is."""

import functools
import os
import pathlib
import posixpath
from collections.abc import Sequence

import gin
from robust_keras import ownership
from robust_keras.commands import configuration


def claim(workdir: str | os.PathLike, config: str, *, holds_results: bool, write: bool = True) -> None:
    """Writes `config` to `workdir`/config.gin, or refuses a folder with the results of another run.

    Args:
        workdir: any `tf.io.gfile` path.
        config: an operative configuration, gin text.
        holds_results: whether the folder has anything that must not be mixed with another run.
        write: whether to write it; of several processes one does.

    Raises:
        ValueError: naming the bindings that differ.
    """
    path = posixpath.join(os.fspath(workdir), "config.gin")
    ownership.claim(
        path,
        configuration.recipe(config),
        what="this run",
        is_begun=holds_results,
        writes=write,
        parse=functools.partial(configuration.recipe, name=path),
        compare=configuration.compare,
        text=config,
    )


def default_workdir(gin_files: Sequence[str | os.PathLike]) -> str:
    """Where a run goes that is not told: runs/<the recipe's name>, with the name of each further file that changes
    what is trained, as in runs/trades+mini.
    """
    names, before = [], None
    for count, path in enumerate(gin_files, 1):
        configuration.bind(gin_files[:count])
        bound = configuration.recipe(gin.config_str())
        if before is None or configuration.compare(before, bound):
            names.append(pathlib.PurePath(path).stem)
        before = bound
    return f"runs/{'+'.join(names)}"
