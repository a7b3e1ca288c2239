"""Attacks a saved classifier and writes what was measured about it.

    python scripts/evaluate.py --saved_model=runs/at/saved_model --dataset=cifar10 \\
        --gin_file=gin/eval/autoattack.gin --num_examples=1000 --workdir=runs/at/autoattack

An interrupted evaluation goes on where it was when the same command is given again.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import json
import posixpath
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags


class _Files(NamedTuple):
    """What an evaluation writes into its folder; `state` only lasts until it has finished."""

    workdir: str
    results: str
    examples: str
    state: str
    subject: str


def run(
    *,
    saved_model: str,
    dataset: str,
    gin_files: Sequence[str],
    workdir: str,
    gin_params: Sequence[str] = (),
    split: str = "test",
    data_dir: str | None = None,
    image_size: int | None = None,
    short_side: int | None = None,
    cache_dir: str | None = None,
    num_examples: int | None = None,
    individual: bool = False,
    input_range: Sequence[float] = (0.0, 1.0),
    input_layout: str = "NHWC",
    outputs: str = "logits",
    logits_output: str | None = None,
    strategy: str | None = None,
    tpu: str | None = None,
) -> dict[str, Any]:
    """Evaluates, and writes `workdir`/config.gin, examples.npz and results.json.

    Args:
        saved_model: a SavedModel's folder or a `.keras` file.
        dataset: as `data.sources.load` takes it.
        gin_files: what to attack with, read in order.
        workdir: where results go.
        gin_params: further bindings.
        split: 'test', 'train' or 'validation'.
        data_dir: where data sets are.
        image_size: see `data.sources.load`, like `short_side` and `cache_dir`.
        num_examples: how many examples, the first ones; None for all.
        individual: whether each attack runs on every correctly classified example.
        input_range: see `saved_models.load.load_logits_fn`, like `input_layout`, `outputs` and `logits_output`.
        strategy: see `strategies.strategy`, 'auto' by default, like `tpu`.

    Returns:
        The results, a dictionary as in results.json.

    Raises:
        ValueError: for bad input, before any attack; for a folder of another evaluation, or in use by one.
    """
    from robust_keras.saved_models import load

    reading = {
        "input_range": list(input_range),
        "input_layout": input_layout,
        "outputs": outputs,
        "logits_output": logits_output,
    }
    model = {"path": saved_model, "sha256": load.fingerprint(saved_model), **reading}
    data = {"name": dataset, "split": split, "num_examples": num_examples}
    sizes = {"image_size": image_size, "short_side": short_side}
    data |= {name: size for name, size in sizes.items() if size is not None}
    subject = {"model": model, "dataset": data, "individual": individual}
    places = {"data_dir": data_dir, "cache_dir": cache_dir}
    return _run(subject, _files(workdir), gin_files, gin_params, places, strategy or "auto", tpu)


def _run(subject: dict, files: _Files, gin_files, gin_params, places, strategy, tpu) -> dict[str, Any]:
    from robust_keras import failures, ownership
    from robust_keras.commands import configuration
    from robust_keras.engines import replicas, strategies

    within = strategies.strategy(strategy, tpu=tpu)  # Processes meet before anything else.
    with within.scope():
        process = replicas.process_index()
    configuration.parse(gin_files, gin_params)
    with within.scope():  # Other networks may be loaded here.
        evaluate = configuration.resolve(configuration.evaluate)
    folder, writes = files.workdir, process == 0
    with failures.running(folder, process=process), ownership.lock(folder, what="an evaluation", writes=writes):
        if (finished := _claim(files, subject, configuration.operative_config(), writes)) is not None:
            return finished
        return _evaluate(evaluate, files, subject, places, within, writes)


def _files(workdir: str) -> _Files:
    names = ("results.json", "examples.npz", "state", "state/subject.json")
    return _Files(workdir, *(posixpath.join(workdir, name) for name in names))


def _claim(files: _Files, subject: dict, config: str, writes: bool) -> dict[str, Any] | None:
    """Refuses a folder of another evaluation; the results of this one where it has finished."""
    import tensorflow as tf

    from robust_keras import storage
    from robust_keras.commands import configuration
    from robust_keras.evaluation import results as evaluation

    results, begun = storage.read_json(files.results), storage.read_json(files.subject)
    configuration.claim(files.workdir, config, holds_results=bool(results or begun), write=writes)
    for path in (files.results, files.subject):
        _claim_subject(path, subject, writes=False)
    if not results:
        return None
    if begun and writes:  # Interrupted after its last line but one.
        tf.io.gfile.rmtree(files.state)
    print(f"Already finished: {files.results}")
    print(evaluation.summary(results))
    return results


def _claim_subject(path: str, subject: dict, *, writes: bool) -> None:
    """Claims a file that says, among other things, what is evaluated; a model is the same one wherever it is."""
    from robust_keras import ownership

    def complete(identity):
        return {**identity, "model": {**identity["model"], "path": None}}

    def parse(text):
        saved = json.loads(text)
        return {**{name: saved[name] for name in subject}, "model": dict(saved["model"])}

    compare = functools.partial(ownership.differences, complete=complete)
    ownership.claim(path, subject, what="this evaluation", writes=writes, parse=parse, compare=compare)


def _evaluate(evaluate, files: _Files, subject: dict, places: dict, within, writes: bool) -> dict[str, Any]:
    import tensorflow as tf

    from robust_keras import storage
    from robust_keras.data import sources
    from robust_keras.evaluation import results as evaluation
    from robust_keras.saved_models import export, load

    dataset, model = dict(subject["dataset"]), dict(subject["model"])
    num_examples = dataset.pop("num_examples")
    source = sources.load(**dataset, **places)
    _claim_subject(files.subject, subject, writes=writes)
    path = model.pop("path")
    reading = {name: value for name, value in model.items() if name != "sha256"}
    with within.scope():
        results, examples = evaluate(
            load.load_logits_fn(path, **reading),
            source,
            num_examples=num_examples,
            individual=subject["individual"],
            model_identity=model,
            save_directory=files.state,
        )
    results = {**results, **subject, "versions": export.versions()}
    if writes:
        storage.write_arrays(files.examples, examples, compressed=True)
        storage.write_json(files.results, results)  # Written last: it marks a finished evaluation.
        tf.io.gfile.rmtree(files.state)
        print(evaluation.summary(results))
        print(f"Results: {files.results}")
    return results


def _define_sizes(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "image_size", None, "Height and width that images of several sizes are resized to.", flag_values=values
    )
    flags.DEFINE_integer(
        "short_side", None, "Resizes the shorter side to this, and takes the middle of it.", flag_values=values
    )
    flags.DEFINE_string("cache_dir", None, "Where what has to be converted goes; beside the data.", flag_values=values)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("saved_model", None, "A SavedModel's folder or a .keras file.", flag_values=values)
    flags.DEFINE_string(
        "dataset", None, "Data set by name, such as cifar10, digits, npz:FILE or images:FOLDER.", flag_values=values
    )
    flags.DEFINE_string("split", "test", "Its part: test, train or validation.", flag_values=values)
    _define_sizes(values)
    launcher.define_recipe(values, "Attacks, such as gin/eval/pgd40.gin")
    flags.DEFINE_integer("num_examples", None, "How many examples, the first ones; all by default.", flag_values=values)
    flags.DEFINE_bool("individual", False, "Run each attack on every correctly classified example.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where results.json and examples.npz go.", flag_values=values)
    launcher.define_reading(values)
    launcher.define_strategy(values)
    flags.mark_flags_as_required(["saved_model", "dataset", "workdir"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(
        saved_model=values.saved_model,
        dataset=values.dataset,
        gin_files=values.gin_file,
        workdir=values.workdir,
        gin_params=values.gin_param,
        split=values.split,
        data_dir=values.data_dir,
        image_size=values.image_size,
        short_side=values.short_side,
        cache_dir=values.cache_dir,
        num_examples=values.num_examples,
        individual=values.individual,
        **launcher.reading(values),
        strategy=values.strategy,
        tpu=values.tpu,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
