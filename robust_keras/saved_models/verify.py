"""Checks a SavedModel against what is claimed of it, with TensorFlow and NumPy and nothing else.

    python exported/verify.py --num_attacked=100

This is the copy that came with the model: whoever can change the model can change this file too, and to load a model
is to run what its maker put into it. Run it in a sandbox, or on a model that you have inspected or whose signature you
have checked. `scripts/verify.py` of robust_keras is a copy of your own that inspects a model before it loads it.

It exits with 0 where no check has failed, 1 where one has, or there is nothing to check or too little, and 2 for bad
usage. What is checked, and what
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
from robust_keras.saved_models.verifying.card_claims import check_cards
from robust_keras.saved_models.verifying.checks import (
    CHECKS,
    FEWEST,
    Case,
    NothingShownError,
    check_again,
    check_images,
)
from robust_keras.saved_models.verifying.claim import Claim, check_claim, read_claim
from robust_keras.saved_models.verifying.files import check_manifest, check_signature


def verify(
    folder: pathlib.Path,
    *,
    num_attacked: int = 100,
    quick: bool = False,
    allow_no_claims: bool = False,
    seed: int = 0,
    images: str | None = None,
    public_key: str | None = None,
    signature: str | None = None,
    check_graph: Callable[[str], None] | None = None,
    tell: Callable[[str], None] = print,
) -> bool:
    """Runs all checks, tells each and what was not shown, and returns whether none has failed.

    Args:
        folder: of the SavedModel.
        num_attacked: how many robust images are attacked.
        quick: whether fewer than `FEWEST` are enough.
        allow_no_claims: whether a folder without claims passes, of which the files and the cards are checked alone.
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
        tell("nothing to check: nothing is claimed of this model, which was not run")
        return allow_no_claims
    if run.failed or not run.passes("loading", lambda: models.append(open_model(folder))) or claim is None:
        tell(f"failed: {', '.join(run.failed)}; the model was not run")
        return False
    case = Case(models[0], claim, np.random.default_rng(seed), num_attacked)
    for name, check in CHECKS.items():
        run.passes(name, check, case)
    if images:
        run.passes("images", check_images, case, images)
    run.passes("again", check_again, case)
    return run.end(quick)


class _Run:
    """Checks so far.

    Attributes:
        failed: names of those that have failed.
        nothing: names of those that could tell nothing.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.failed: list[str] = []
        self.nothing: list[str] = []
        self._tell = tell

    def passes(self, name: str, check: Callable, *arguments: object) -> bool:
        """Runs a check and tells what it saw, on one line that steers no terminal."""
        try:
            seen, mark = check(*arguments), "ok"
        except NothingShownError as error:
            seen, mark = error, "n/a"
            self.nothing.append(name)
        except Exception as error:  # A model may raise anything.
            seen, mark = f"{'' if type(error) is ValueError else f'{type(error).__name__}: '}{error}", "FAILED"
            self.failed.append(name)
        shown = " ".join(str(seen or "").split())[:300]
        shown = "".join(each if each.isprintable() else "?" for each in shown)
        self._tell(f"{mark:<6} {name:<11} {shown}".rstrip())
        return mark != "FAILED"

    def end(self, quick: bool) -> bool:
        """Tells what was shown and what was not, and returns whether the model passes."""
        nothing = f"nothing was shown by {', '.join(self.nothing)}" if self.nothing else ""
        if self.failed:
            self._tell(f"failed: {'; '.join(filter(None, [', '.join(self.failed), nothing]))}")
        elif "attack" in self.nothing and not quick:
            self._tell(f"failed: {nothing}; --quick lets fewer than {FEWEST} attacked images pass")
            return False
        else:
            self._tell(f"no check has failed; {nothing}" if nothing else "all checks passed")
        return not self.failed


def main(arguments: list[str] | None = None) -> int:
    """Checks the folder that is named, or in which this file lies, and returns the exit code."""
    for name, value in {"TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=pathlib.Path(__file__).parent, type=pathlib.Path)
    parser.add_argument("--num_attacked", type=int, default=100, help="how many images that are claimed robust")
    parser.add_argument("--quick", action="store_true", help=f"let fewer than {FEWEST} attacked images pass")
    parser.add_argument("--allow_no_claims", action="store_true", help="let a folder without claims pass")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of all that is drawn; a fresh one")
    parser.add_argument("--images", help="an npz file of `images` and `labels` that the maker has not chosen")
    parser.add_argument("--public_key", help="PEM file of the maker's key, by which to check")
    parser.add_argument("--signature", help="its signature; FOLDER.sig by default")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    fewest = 1 if options["quick"] else FEWEST
    if not folder.is_dir() or options["num_attacked"] < fewest or options["seed"] < 0:
        parser.error(f"Expected a folder, num_attacked >= {fewest} and seed >= 0. Received: {folder}, {options}")
    print(f"{folder}, seed {options['seed']}", flush=True)
    return 0 if verify(folder.resolve(), tell=functools.partial(print, flush=True), **options) else 1


if __name__ == "__main__":
    sys.exit(main())
