"""Says what is in a model, without loading it: what it takes and returns, what it is made of, and what is refused.

    python scripts/inspect_model.py downloaded/saved_model
    python scripts/inspect_model.py downloaded/saved_model --json

The exit code is 1 where something is refused. Commands load such a model with --trust_model.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import json
import sys

from absl import flags


def run(path: str, *, as_json: bool = False) -> bool:
    """Prints what is in a model.

    Args:
        path: a SavedModel's folder or a `.keras` file.
        as_json: whether to print what `safety.inspection.describe` returns.

    Returns:
        Whether nothing of it is refused.

    Raises:
        ValueError: where there is nothing.
    """
    from robust_keras.saved_models.safety import inspection

    told = inspection.describe(path)
    if as_json:
        print(json.dumps(told, indent=2))  # Of ASCII alone, so that nothing in it steers a terminal.
    else:
        print("\n".join(inspection.lines(told)))
    return not told["refused"]


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "model", None, "A SavedModel's folder or a .keras file; --model= may be left out.", flag_values=values
    )
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    if values.model is None:
        raise ValueError("Expected a model. Received: none")
    if not run(values.model, as_json=values.json):
        sys.exit(1)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__, plain="model")
