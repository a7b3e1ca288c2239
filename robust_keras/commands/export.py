"""Exports the weights of a run, also while the run goes on: as a SavedModel, or a Keras, TFLite or ONNX file.

python scripts/export.py --workdir=runs/at --weights=best --output=exported
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

from collections.abc import Sequence

from absl import flags

FORMATS = ("saved_model", "keras", "tflite", "onnx")


def run(
    *,
    workdir: str,
    output: str,
    weights: str = "best",
    format: str | None = None,
    evaluation: str | None = None,
    gradient: bool = False,
    licence: str | None = None,
    class_names: Sequence[str] | None = None,
    data_dir: str | None = None,
) -> None:
    """Exports.

    Args:
        workdir: folder of a run.
        output: a new folder for a SavedModel, or a new file.
        weights: 'best', 'last' or 'last_averaged'.
        format: one of `FORMATS`; None for the one that the output ends in, as in `.onnx`, else a SavedModel.
        evaluation: folder of an evaluation of these weights, for the SavedModel's card and its claims.
        gradient: whether the SavedModel gets a signature `gradient`.
        licence: of the weights, for the card.
        class_names: for the card; None for those of a well-known data set.
        data_dir: where the evaluation's data set is, see `data.sources.load`.

    Raises:
        ValueError: where the run has no such weights yet, the output exists, the evaluation is of other weights, or
            something is asked for that a file has no place for.
    """
    from robust_keras.commands import evaluated_images, model_cards
    from robust_keras.saved_models import converters, export

    format = format or _ending(output)
    given = {"evaluation": evaluation, "gradient": gradient, "licence": licence, "class_names": class_names}
    if format != "saved_model" and (names := [f"--{name}" for name, value in given.items() if value]):
        raise ValueError(f"Expected {', '.join(names)} with a SavedModel alone. Received: {output}, a {format} file")
    network, card = export.network_of_run(workdir, weights)
    said = ""
    if format == "saved_model":
        card = model_cards.of_run(card, licence=licence, class_names=class_names)
        load_images = evaluated_images.loader(data_dir=data_dir)
        export.export(network, output, card=card, gradient=gradient, evaluation=evaluation, load_images=load_images)
    elif format == "keras":
        export.export_keras(network, output)
    else:
        write = {"tflite": converters.export_tflite, "onnx": converters.export_onnx}[format]
        said = f", its logits within {write(network, output):.1g} of the network's, relative to the largest"
    print(f"Exported {weights} weights of step {card['step']}: {output}{said}")


def _ending(output: str) -> str:
    ending = output.rpartition(".")[2]
    return ending if ending in FORMATS[1:] else FORMATS[0]


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
    flags.DEFINE_enum(
        "weights",
        "best",
        ["best", "last", "last_averaged"],
        "The best on the validation images, or those of the newest checkpoint, raw or averaged.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "A new folder for a SavedModel, or a file that ends in .keras, .tflite, .onnx.",
        flag_values=values,
    )
    flags.DEFINE_enum("format", None, FORMATS, "Of the output; what its name ends in by default.", flag_values=values)
    flags.DEFINE_string(
        "evaluation", None, "Folder of an evaluation of these weights, for card and claims.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Where the evaluation's data set is.", flag_values=values)
    flags.DEFINE_bool("gradient", False, "Add a signature that returns gradients by the images.", flag_values=values)
    flags.DEFINE_string("licence", None, "Licence of the weights, for the model card.", flag_values=values)
    flags.DEFINE_list("class_names", None, "Names of the classes in order, for the model card.", flag_values=values)
    launcher.define_import(values)
    launcher.define_trust(values)
    flags.mark_flags_as_required(["workdir", "output"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(
        workdir=values.workdir,
        output=values.output,
        weights=values.weights,
        format=values.format,
        evaluation=values.evaluation,
        gradient=values.gradient,
        licence=values.licence,
        class_names=values.class_names,
        data_dir=values.data_dir,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
