"""Checks a SavedModel against what is claimed of it: its files, its claims, and a fresh attack.

    python scripts/verify.py --saved_model=exported --num_attacked=100

It exits with 0 where no check has failed, and with 1 where one has, or there is nothing to check or too little.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import os
import pathlib
import secrets
import sys

from absl import flags

from robust_keras.commands import exit_codes


def run(
    *,
    saved_model: str,
    num_attacked: int = 100,
    quick: bool = False,
    allow_no_claims: bool = False,
    seed: int | None = None,
    images: str | None = None,
    public_key: str | None = None,
    signature: str | None = None,
) -> bool:
    """Checks, prints each check, and returns whether none has failed.

    Args:
        saved_model: a local folder of an export.
        num_attacked: see `saved_models.verify.verify`, like all others.
        quick: see there.
        allow_no_claims: see there.
        seed: a fresh one by default, which is printed.
        images: see there.
        public_key: see there.
        signature: see there.

    Raises:
        ValueError: for what is no folder, or no number of images.
    """
    from robust_keras.saved_models import safety, verify

    if not os.path.isdir(saved_model):
        raise ValueError(f"Expected the folder of a SavedModel. Received: {saved_model}")
    if num_attacked < (1 if quick else verify.FEWEST):
        expected = "num_attacked >= 1" if quick else f"num_attacked >= {verify.FEWEST}, or --quick"
        raise ValueError(f"Expected {expected}. Received: {num_attacked}")
    seed = secrets.randbits(31) if seed is None else seed
    print(f"{saved_model}, seed {seed}", flush=True)
    return verify.verify(
        pathlib.Path(saved_model).resolve(),
        num_attacked=num_attacked,
        quick=quick,
        allow_no_claims=allow_no_claims,
        seed=seed,
        images=images,
        public_key=public_key,
        signature=signature,
        check_graph=functools.partial(safety.check, trusted=safety.is_trusted()),
        tell=functools.partial(print, flush=True),
    )


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("saved_model", None, "A folder with a SavedModel, claims and a manifest.", flag_values=values)
    flags.DEFINE_integer("num_attacked", 100, "How many images that are claimed robust.", flag_values=values)
    flags.DEFINE_bool("quick", False, "Let fewer than 30 attacked images pass.", flag_values=values)
    flags.DEFINE_bool("allow_no_claims", False, "Let a folder without claims pass.", flag_values=values)
    flags.DEFINE_integer("seed", None, "Of all that is drawn; a fresh one by default.", 0, flag_values=values)
    flags.DEFINE_string(
        "images", None, "An npz file of `images` and `labels` that the maker has not chosen.", flag_values=values
    )
    flags.DEFINE_string("public_key", None, "PEM file of the maker's key, by which to check.", flag_values=values)
    flags.DEFINE_string("signature", None, "Its signature; FOLDER.sig by default.", flag_values=values)
    launcher.define_trust(values)
    flags.mark_flag_as_required("saved_model", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    if not run(
        saved_model=values.saved_model,
        num_attacked=values.num_attacked,
        quick=values.quick,
        allow_no_claims=values.allow_no_claims,
        seed=values.seed,
        images=values.images,
        public_key=values.public_key,
        signature=values.signature,
    ):
        sys.exit(exit_codes.FAILED)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
