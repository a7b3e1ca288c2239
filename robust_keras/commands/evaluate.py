"""Attacks a saved classifier and writes what was measured about it.

    python scripts/evaluate.py --saved_model=runs/at/saved_model --dataset=cifar10 \\
        --gin_file=gin/eval/autoattack.gin --num_examples=1000 --workdir=runs/at/autoattack

An interrupted evaluation goes on where it was when the same command is given again.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import json
import posixpath

from absl import flags


def run(
    *,
    saved_model,
    dataset,
    gin_files,
    workdir,
    gin_params=(),
    split="test",
    data_dir=None,
    num_examples=None,
    individual=False,
    input_range=(0.0, 1.0),
    input_layout="NHWC",
    outputs="logits",
    logits_output=None,
    strategy=None,
    tpu=None,
):
    """Evaluates, and writes `workdir`/config.gin, examples.npz and results.json.

    Args:
        saved_model: a SavedModel's folder or a `.keras` file.
        dataset: as `data.sources.load` takes it.
        gin_files: what to attack with, read in order.
        workdir: where results go.
        gin_params: further bindings.
        split: 'test' or 'train'.
        data_dir: where data sets are.
        num_examples: how many examples, the first ones; None for all.
        individual: whether each attack runs on every correctly classified example.
        input_range: see `saved_models.load.load_logits_fn`, like the three after it.
        input_layout: see there.
        outputs: see there.
        logits_output: see there.
        strategy: see `strategies.strategy`, 'auto' by default.
        tpu: see there.

    Returns:
        The results, a dictionary as in results.json.

    Raises:
        ValueError: for bad input, before any attack; and where an attack leaves its threat model.
    """
    import tensorflow as tf

    from robust_keras import storage
    from robust_keras.commands import configuration
    from robust_keras.data import sources
    from robust_keras.engines import replicas, strategies
    from robust_keras.evaluation import results as evaluation
    from robust_keras.saved_models import export, load

    strategy = strategies.strategy(strategy or "auto", tpu=tpu)  # Processes meet before anything else.
    with strategy.scope():
        is_writer = replicas.process_index() == 0
    configuration.parse(gin_files, gin_params)
    with strategy.scope():  # Other networks may be loaded here.
        evaluate = configuration.resolve(configuration.evaluate)
    config = configuration.operative_config()
    results_path = posixpath.join(workdir, "results.json")
    reading = {
        "input_range": list(input_range),
        "input_layout": input_layout,
        "outputs": outputs,
        "logits_output": logits_output,
    }
    subject = {
        "model": {"path": saved_model, "sha256": load.fingerprint(saved_model), **reading},
        "dataset": {"name": dataset, "split": split, "num_examples": num_examples},
        "individual": individual,
    }
    state = posixpath.join(workdir, "state")  # Of an evaluation under way.
    subject_path = posixpath.join(state, "subject.json")
    results, begun = _read(results_path), _read(subject_path)
    configuration.claim(workdir, config, holds_results=bool(results or begun), write=is_writer)
    for saved in filter(None, (results, begun)):
        if different := [key for key, value in subject.items() if saved.get(key) != value]:
            raise ValueError(
                f"Expected a workdir of this evaluation. Received: {workdir} of another, with {different[0]} = "
                f"{saved.get(different[0])}, not {subject[different[0]]}"
            )
    if results:
        if begun and is_writer:  # Interrupted after its last line but one.
            tf.io.gfile.rmtree(state)
        print(f"Already finished: {results_path}")
        print(evaluation.summary(results))
        return results

    source = sources.load(dataset, split, data_dir=data_dir)
    if is_writer:
        tf.io.gfile.makedirs(state)
        with tf.io.gfile.GFile(subject_path, "w") as file:
            file.write(json.dumps(subject))
    with strategy.scope():
        logits_fn = load.load_logits_fn(
            saved_model,
            input_range=input_range,
            input_layout=input_layout,
            outputs=outputs,
            logits_output=logits_output,
        )
        results, examples = evaluate(
            logits_fn,
            source,
            num_examples=num_examples,
            individual=individual,
            model_identity={"sha256": subject["model"]["sha256"], **reading},
            save_directory=state,
        )
    results = {**results, **subject, "versions": export.versions()}
    if not is_writer:
        return results
    storage.write_arrays(posixpath.join(workdir, "examples.npz"), examples, compressed=True)
    # Written last: results.json marks a finished evaluation.
    with tf.io.gfile.GFile(results_path, "w") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    tf.io.gfile.rmtree(state)
    print(evaluation.summary(results))
    print(f"Results: {results_path}")
    return results


def _read(path):
    """What a JSON file holds; None where there is none, or an empty one, which an interrupted write left behind."""
    import tensorflow as tf

    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path) as file:
        text = file.read()
    return json.loads(text) if text else None


def define_flags(values):
    flags.DEFINE_string("saved_model", None, "A SavedModel's folder or a .keras file.", flag_values=values)
    flags.DEFINE_string("dataset", None, "Data set by name, such as cifar10, digits or npz:FILE.", flag_values=values)
    flags.DEFINE_string("split", "test", "Its part: test or train.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where data sets are, or are to be downloaded to.", flag_values=values)
    flags.DEFINE_multi_string("gin_file", None, "Attacks, such as gin/eval/pgd40.gin.", flag_values=values)
    flags.DEFINE_multi_string(
        "gin_param", [], "Binding, such as \"EPSILON = '4/255'\"; any number of times.", flag_values=values
    )
    flags.DEFINE_integer("num_examples", None, "How many examples, the first ones; all by default.", flag_values=values)
    flags.DEFINE_bool("individual", False, "Run each attack on every correctly classified example.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where results.json and examples.npz go.", flag_values=values)
    launcher.define_reading(values)
    launcher.define_strategy(values)
    flags.mark_flags_as_required(["saved_model", "dataset", "gin_file", "workdir"], flag_values=values)


def main(values):
    run(
        saved_model=values.saved_model,
        dataset=values.dataset,
        gin_files=values.gin_file,
        workdir=values.workdir,
        gin_params=values.gin_param,
        split=values.split,
        data_dir=values.data_dir,
        num_examples=values.num_examples,
        individual=values.individual,
        **launcher.reading(values),
        strategy=values.strategy,
        tpu=values.tpu,
    )


def command():
    launcher.launch(main, define_flags, __doc__)
