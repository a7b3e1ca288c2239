"""Turns weights that others trained into a SavedModel: of the authors' own, RobustBench's and others' checkpoints.

    python scripts/import_checkpoint.py --published=cifar10_linf_wrn28-10_with --output=imported
    python scripts/import_checkpoint.py --checkpoint=model.pt --dataset=cifar10 --activation=silu --output=imported

Reads PyTorch's .pt, Haiku's .npy and safetensors without any of these libraries, and runs nothing that is in them.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import os
import shlex
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from robust_keras.saved_models.weights_in import checkpoint, networks, published, selection

DOWNLOADS = "downloads"


def run(
    *,
    output: str,
    checkpoint: str | None = None,
    published: str | None = None,
    dataset: str | None = None,
    activation: str | None = None,
    architecture: str | None = None,
    key: str | None = None,
    download_dir: str = DOWNLOADS,
    evaluation: str | None = None,
    data_dir: str | None = None,
) -> None:
    """Imports.

    Args:
        output: a new folder for a SavedModel, or a path that ends in `.keras`.
        checkpoint: the file. With `published` too, it is that model's, downloaded by other means.
        published: one of the authors' models by name, which is downloaded.
        dataset: 'cifar10', 'cifar100' or 'mnist': how the network treats images.
        activation: see `models.activations`; no checkpoint says it.
        architecture: such as WRN-28-10, which is then checked.
        key: where in the file the weights are, if there are several.
        download_dir: where downloads go.
        evaluation: folder of an evaluation of the same weights, imported before, whose numbers the SavedModel claims.
        data_dir: where the evaluated images are, see `data.sources.load`.

    Raises:
        ValueError: for bad input, and a file that is not what it should be; nothing has been written then.
    """
    from robust_keras.commands import evaluated_images
    from robust_keras.saved_models import export
    from robust_keras.saved_models.weights_in import checkpoint as checkpoints
    from robust_keras.saved_models.weights_in import networks, selection
    from robust_keras.saved_models.weights_in import published as by_authors

    if not checkpoint and not published:
        raise ValueError("Expected --checkpoint=FILE or --published=NAME. Received: neither")
    known = by_authors.find(published) if published else None
    dataset = _agreed("dataset", dataset, known and known.dataset)
    activation = _agreed("activation", activation, known and known.activation)
    architecture = _agreed("architecture", architecture, known and known.architecture, is_needed=False)
    _check_output(output, evaluation)
    if not checkpoint and known:
        checkpoint = _downloaded(known, download_dir)
    with checkpoints.opened(str(checkpoint)) as opened:
        found = selection.find(opened, key)
        made = networks.architecture(found, str(dataset), str(activation))
        if architecture and made.name.lower() != architecture.lower():
            raise ValueError(f"Expected a {architecture}, as the flag or the name says. Received: a {made.name}")
        network = networks.load(found, made)
    card = _card(os.path.basename(str(checkpoint)), opened, found, made, str(dataset), known)
    if output.endswith(".keras"):
        export.export_keras(network, output)
    else:
        images = evaluated_images.loader(data_dir=data_dir)
        export.export(network, output, card=card, evaluation=evaluation, load_images=images)
    print(_summary(found, made, str(dataset), output))
    print(_how_to_measure(output, str(dataset), known))


def _downloaded(known: "published.Published", download_dir: str) -> str:
    from robust_keras.saved_models.weights_in import download

    found = download.fetch(known.url, download_dir)
    recorded = "as recorded" if found.is_known else f"recorded in {found.path}.json: nobody has published it"
    print(f"{found.path}: {found.num_bytes:,} bytes, SHA-256 {found.sha256} ({recorded})", flush=True)
    return found.path


def _agreed(name: str, given: str | None, known: str | None, *, is_needed: bool = True) -> str | None:
    """What a flag and the table of published models say."""
    if given and known and given.lower() != known.lower() and (name, given.lower()) != ("activation", "swish"):
        raise ValueError(f"Expected --{name}={known}, as of the published model. Received: {given}")
    if is_needed and not (given or known):
        hint = "; no checkpoint says it, most of these networks have silu" if name == "activation" else ""
        raise ValueError(f"Expected --{name}. Received: none{hint}")
    return known or given


def _check_output(output: str, evaluation: str | None) -> None:
    """Before a download, what the end of it would stop at."""
    import tensorflow as tf

    if tf.io.gfile.exists(output) and (output.endswith(".keras") or not tf.io.gfile.isdir(output)):
        raise ValueError(f"Expected a new file or folder. Received: {output}")
    if evaluation and output.endswith(".keras"):
        raise ValueError(f"Expected --evaluation with a SavedModel alone. Received: {output}, a Keras file")


def _card(
    name: str,
    opened: "checkpoint.Checkpoint",
    found: "selection.Found",
    made: "networks.Architecture",
    dataset: str,
    known: "published.Published | None",
) -> dict[str, Any]:
    """What the model card says of where the weights are from."""
    from robust_keras import threats
    from robust_keras.commands import model_cards
    from robust_keras.foreign_files import printable

    card: dict[str, Any] = {
        "source": {
            "file": printable(name),
            "sha256": opened.sha256,
            "size": opened.num_bytes,
            "format": opened.format,
            "key": printable(found.key),
            **({"url": known.url} if known else {}),
        },
        "architecture": made.name,
        "activation": made.settings["activation"],
        "dataset": dataset,
        "normalization": {each: made.settings[each] for each in ("mean", "std", "padding")},
    }
    if known:
        norm, epsilon = known.threat
        card["published"] = {
            "name": known.name,
            "clean_accuracy": round(known.clean / 100, 4),
            "robust_accuracy": round(known.robust / 100, 4),
            "norm": norm,
            "epsilon": epsilon,
            "attacks": "AutoAttack",
            "num_examples": 10_000,
            "paper": known.paper,
        }
        threat = threats.threat(norm=norm, epsilon=epsilon)
        card["threat_model"] = {"norm": norm, "epsilon": threat.epsilon, "epsilon_fraction": threat.epsilon_fraction}
    return model_cards.of_run(card)


def _summary(found: "selection.Found", made: "networks.Architecture", dataset: str, output: str) -> str:
    dropped = f", {len(found.dropped)} of no use to it left out" if found.dropped else ""
    return (
        f"Imported a {made.name} of {made.settings['num_classes']} classes, {made.settings['activation']}, "
        f"for {dataset}, all of its {len(found.tensors)} tensors{dropped}: {output}"
    )


def _how_to_measure(output: str, dataset: str, known: "published.Published | None") -> str:
    norm, epsilon = known.threat if known else ("Linf", "8/255")
    folder = f"{output.rstrip('/').removesuffix('.keras')}_autoattack"
    command = (
        f"python scripts/evaluate.py --saved_model={shlex.quote(output)} --dataset={dataset} "
        f"--gin_file=gin/eval/autoattack.gin --gin_param=\"NORM = '{norm}'\" --gin_param=\"EPSILON = '{epsilon}'\" "
        f"--workdir={shlex.quote(folder)}"
    )
    if known is None:
        return f"To measure it: {command}"
    stated = f"{known.clean:.2f} % clean, {known.robust:.2f} % under AutoAttack in {norm} {epsilon}"
    return f"Published, {known.paper}: {stated}, on all test images.\nTo measure it: {command}"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("checkpoint", None, "File of weights: .pt, .npy or .safetensors.", flag_values=values)
    flags.DEFINE_string(
        "published", None, "One of the authors' models by name, such as cifar10_linf_wrn28-10_with.", flag_values=values
    )
    flags.DEFINE_string("dataset", None, "What it was trained on: cifar10, cifar100 or mnist.", flag_values=values)
    flags.DEFINE_string(
        "activation", None, "Of the network, such as silu or relu; no file says it.", flag_values=values
    )
    flags.DEFINE_string("architecture", None, "Such as WRN-28-10, where it is to be checked.", flag_values=values)
    flags.DEFINE_string(
        "key", None, "Where in the file the weights are, such as ema, if in several.", flag_values=values
    )
    flags.DEFINE_string(
        "output", None, "A new folder for a SavedModel, or a path that ends in .keras.", flag_values=values
    )
    flags.DEFINE_string("download_dir", DOWNLOADS, "Where downloads go.", flag_values=values)
    flags.DEFINE_string(
        "evaluation", None, "Folder of an evaluation of an earlier import, which is then claimed.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Where the evaluated images are.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(
        output=values.output,
        checkpoint=values.checkpoint,
        published=values.published,
        dataset=values.dataset,
        activation=values.activation,
        architecture=values.architecture,
        key=values.key,
        download_dir=values.download_dir,
        evaluation=values.evaluation,
        data_dir=values.data_dir,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
