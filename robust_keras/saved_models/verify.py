"""Checks a SavedModel against what is claimed of it, with TensorFlow and NumPy and nothing else.

    python exported/verify.py --num_attacked=100

This is the copy that came with the model: whoever can change the model can change this file too, and to load a model
is to run what its maker put into it. Run it in a sandbox, or on a model that you have inspected or whose signature you
have checked. `scripts/verify.py` of robust_keras is a copy of your own that inspects a model before it loads it.

It exits with 0 where every check has passed, 1 where one has failed, and 2 for bad usage. What is checked, and what
that does not show, is in `docs/claims.md` of robust_keras.
"""

import argparse
import functools
import os
import pathlib
import secrets
import sys
from collections.abc import Callable

import numpy as np

from robust_keras.saved_models.verifying.attacks import Model, open_model
from robust_keras.saved_models.verifying.checks import CHECKS, Case, check_again, check_images
from robust_keras.saved_models.verifying.claim import Claim, check_cards, check_claim, read_claim
from robust_keras.saved_models.verifying.files import check_manifest, check_signature


def verify(
    folder: pathlib.Path,
    *,
    num_attacked: int = 100,
    seed: int = 0,
    images: str | None = None,
    public_key: str | None = None,
    signature: str | None = None,
    check_graph: Callable[[str], None] | None = None,
    tell: Callable[[str], None] = print,
) -> bool:
    """Runs all checks, tells each, and returns whether all have passed.

    Args:
        folder: of the SavedModel.
        num_attacked: how many robust images are attacked.
        seed: of everything that is drawn.
        images: an npz file of other `images` and their `labels`.
        public_key: a PEM file, whose signature is checked.
        signature: the file of that signature; beside the folder by default.
        check_graph: raises ValueError where a model is not to be loaded.
        tell: takes each line.
    """
    run, claims, models = _Run(tell), list[Claim | None](), list[Model]()
    run.passes("manifest", check_manifest, folder)
    if public_key:
        run.passes("signature", check_signature, folder, public_key, signature or f"{folder}.sig")
    run.passes("reading", lambda: claims.append(read_claim(folder)))
    claim = claims[0] if claims else None
    if claim:
        run.passes("claim", check_claim, claim, folder)
    if claims:
        run.passes("cards", check_cards, claim, folder)
    if check_graph and not run.failed:
        run.passes("operations", check_graph, str(folder))
    if claim is None and not run.failed:
        tell("nothing is claimed of this model that could be checked: it was not run")
        return True
    if run.failed or not run.passes("loading", lambda: models.append(open_model(folder))) or claim is None:
        tell(f"failed: {', '.join(run.failed)}; the model was not run")
        return False
    case = Case(models[0], claim, np.random.default_rng(seed), num_attacked)
    for name, check in CHECKS.items():
        run.passes(name, check, case)
    if images:
        run.passes("images", check_images, case, images)
    run.passes("again", check_again, case)
    tell(f"failed: {', '.join(run.failed)}" if run.failed else "all checks passed")
    return not run.failed


class _Run:
    """Checks so far.

    Attributes:
        failed: names of those that have failed.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.failed: list[str] = []
        self._tell = tell

    def passes(self, name: str, check: Callable, *arguments: object) -> bool:
        """Runs a check and tells what it saw, on one line that steers no terminal."""
        try:
            seen, is_right = check(*arguments), True
        except Exception as error:  # A model may raise anything.
            seen, is_right = f"{'' if type(error) is ValueError else f'{type(error).__name__}: '}{error}", False
            self.failed.append(name)
        shown = " ".join(str(seen or "").split())[:300]
        shown = "".join(each if each.isprintable() else "?" for each in shown)
        self._tell(f"{'ok    ' if is_right else 'FAILED'} {name:<11} {shown}".rstrip())
        return is_right


def main(arguments: list[str] | None = None) -> int:
    """Checks the folder that is named, or in which this file lies, and returns the exit code."""
    for name, value in {"TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=pathlib.Path(__file__).parent, type=pathlib.Path)
    parser.add_argument("--num_attacked", type=int, default=100, help="how many images that are claimed robust")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of all that is drawn; a fresh one")
    parser.add_argument("--images", help="an npz file of `images` and `labels` that the maker has not chosen")
    parser.add_argument("--public_key", help="PEM file of the maker's key, by which to check")
    parser.add_argument("--signature", help="its signature; FOLDER.sig by default")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    if not folder.is_dir() or options["num_attacked"] < 1 or options["seed"] < 0:
        parser.error(f"Expected a folder, num_attacked >= 1 and seed >= 0. Received: {folder}, {options}")
    print(f"{folder}, seed {options['seed']}", flush=True)
    return 0 if verify(folder.resolve(), tell=functools.partial(print, flush=True), **options) else 1


if __name__ == "__main__":
    sys.exit(main())
