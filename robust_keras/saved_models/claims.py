"""What lies beside a SavedModel so that others can check it: claims with the images that show them, a program that
checks them, and a manifest of every file.

`verify.py` is the installed `verify` and what it is made of, joined to one file that needs TensorFlow and NumPy alone.
`manifest.json`, written last, has the size and the SHA-256 of every other file, the model's card among them.
"""

import ast
import os
import pathlib
import posixpath
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import array_files, foreign_files, own_folders, ownership, shown_text, storage
from robust_keras.saved_models import load, verify
from robust_keras.saved_models.opening import UNFINISHED
from robust_keras.saved_models.verifying import attacks, card, card_claims, checks, claim, files

gfile = tf.io.gfile
# What lies in a folder while it is written, and the manifest itself.
_NOT_LISTED = {UNFINISHED, ownership.lock_name(), files.MANIFEST}
# What a claim has of results.json.
_TOLD = ["num_examples", "clean_accuracy", "robust_accuracy", "robust_accuracy_after", "norm", "epsilon"]
_TOLD += ["epsilon_fraction", "attacks", "confidence_interval_95", "warnings", "seed", "dataset", "versions"]
# The share of verdicts that another machine's rounding may change.
_ROUNDED = 0.005


def attach(
    directory: str | os.PathLike,
    *,
    evaluation: str | None = None,
    load_images: Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]] | None = None,
) -> None:
    """Adds what a verifier needs to a folder with a SavedModel and its cards, and the manifest of it all.

    Args:
        directory: the export's folder, any `tf.io.gfile` path; what was attached before is replaced.
        evaluation: folder of a finished evaluation of this model, whose claims are to be checked; None for none.
        load_images: of the evaluation's `dataset`, as results.json has it, to its images, uint8 or float32 in [0, 1]
            `[num_examples, ...]`, and labels `[num_examples]`.

    Raises:
        ValueError: for a folder with links or special files, or an evaluation that is unfinished, or of another model
            or other images.
    """
    directory = str(directory)
    for name in (files.CLAIMS, files.EXAMPLES):
        if gfile.exists(posixpath.join(directory, name)):
            own_folders.remove(posixpath.join(directory, name))
    if evaluation is not None:
        if load_images is None:
            raise ValueError("Expected load_images with an evaluation. Received: none")
        _write_claim(directory, _claim(directory, evaluation, load_images))
    storage.write_text(posixpath.join(directory, files.PROGRAM), program())
    listed = [
        {"name": name, "bytes": gfile.stat(path).length, "sha256": storage.sha256(path)}
        for name, path in foreign_files.regular_files(directory)
        if name not in _NOT_LISTED
    ]
    storage.write_text(posixpath.join(directory, files.MANIFEST), files.manifest_text(listed))


def program() -> str:
    """`verify` as one file: its description, its parts without what they import from each other, and itself."""
    modules = (files, attacks, claim, shown_text, card, card_claims, checks, verify)
    parts = [pathlib.Path(str(module.__file__)).read_text() for module in modules]
    description = ast.get_docstring(ast.parse(parts[-1]), clean=False)
    return "\n\n".join([f'"""{description}"""\n', *(_body(source) for source in parts)])


def _body(source: str) -> str:
    """A module without its description and what it imports from this package."""
    lines = source.splitlines()
    first, *rest = ast.parse(source).body
    ours = [n for n in rest if isinstance(n, ast.ImportFrom) and str(n.module).startswith("robust_keras")]
    left_out = {k for node in (first, *ours) for k in range(node.lineno - 1, node.end_lineno or node.lineno)}
    return "\n".join(line for k, line in enumerate(lines) if k not in left_out).strip() + "\n"


def _claim(directory: str, evaluation: str, load_images: Callable) -> claim.Claim:
    results = storage.read_object(posixpath.join(evaluation, "results.json"))
    if not results or not results.get("dataset"):
        raise ValueError(f"Expected the folder of a finished evaluation by scripts/evaluate.py. Received: {evaluation}")
    keys = ("label", "broken_by", "robust", "adversarial")
    found = array_files.read(posixpath.join(evaluation, "examples.npz"), keys)
    images, labels = load_images(results["dataset"])
    if not np.array_equal(labels, found["label"]) or images.shape != found["adversarial"].shape:
        raise ValueError(f"Expected the images of the evaluation {evaluation}. Received: others")
    model = attacks.open_model(directory)
    clean = claim.as_floats(images)
    logits = model.logits(clean)
    was_right, still_wrong = found["broken_by"] != 0, model.is_wrong(found["adversarial"], labels)
    differ = (attacks.is_wrong(logits, labels) == was_right) | (still_wrong == found["robust"])
    if differ.mean() > _ROUNDED:
        raise ValueError(
            f"Expected an evaluation of this model. Received: {evaluation}, {differ.sum()} of whose {len(differ)} "
            "verdicts are others"
        )
    told = {"format": 1, "model_sha256": load.fingerprint(directory), **{name: results[name] for name in _TOLD}}
    index = claim.sample(found["broken_by"], told["model_sha256"], told["dataset"])
    made = claim.Claim(
        told=told,
        verdicts=found["broken_by"],
        positions=index,
        labels=labels[index],
        clean=images[index],
        adversarial=found["adversarial"][index[found["broken_by"][index] > 0]],
        logits=logits[index],
    )
    case = checks.Case(model, made, np.random.default_rng(0), 0)
    try:
        for check in (checks.check_logits, checks.check_signatures):
            check(case)
        if len(made.adversarial):
            checks.check_replay(case)
        if (local := foreign_files.local_path(directory)) is not None:
            card_claims.check_cards(made, pathlib.Path(local))
    except ValueError as error:
        raise ValueError(f"Expected a claim that its own check passes. Received: {error}") from error
    return made


def _write_claim(directory: str, made: claim.Claim) -> None:
    arrays = {name: value for name, value in made._asdict().items() if name != "told"}
    own_folders.make(posixpath.join(directory, posixpath.dirname(files.CLAIMS)))
    storage.write_arrays(posixpath.join(directory, files.EXAMPLES), arrays)
    storage.write_json(posixpath.join(directory, files.CLAIMS), made.told)
