"""Attacks a saved classifier and writes what was measured about it.

    python scripts/evaluate.py --saved_model=runs/at/saved_model --dataset=cifar10 \\
        --gin_file=gin/eval/autoattack.gin --num_examples=1000 --workdir=runs/at/autoattack

An interrupted evaluation goes on where it was when the same command is given again.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from robust_keras.commands import evaluated_images

if TYPE_CHECKING:
    from robust_keras.evaluation import folder


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
    security_curve: bool = False,
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
        security_curve: whether to add security.json, see `evaluation.security`, also to what has finished.
        input_range: see `saved_models.load.load_logits_fn`, like `input_layout`, `outputs` and `logits_output`.
        strategy: see `strategies.strategy`, 'auto' by default, like `tpu`.

    Returns:
        The results, a dictionary as in results.json.

    Raises:
        ValueError: for bad input, before any attack; for a folder of another evaluation, or in use by one.
    """
    from robust_keras.evaluation import folder
    from robust_keras.saved_models import load, opening

    reading: dict[str, Any] = {"input_range": list(input_range), "input_layout": input_layout}
    reading |= {"outputs": outputs, "logits_output": logits_output}
    model = {"path": saved_model, "sha256": load.fingerprint(saved_model), **reading}
    data = {"name": dataset, "split": split, "num_examples": num_examples}
    data |= {name: size for name, size in (("image_size", image_size), ("short_side", short_side)) if size is not None}
    subject = {"model": model, "dataset": data, "individual": individual}
    places = {"data_dir": data_dir, "cache_dir": cache_dir}
    load_images = functools.cache(functools.partial(evaluated_images.source, data, **places))
    opening.check(saved_model)
    load_model, of = functools.partial(load.load_logits_fn, saved_model, **reading), folder.Folder(workdir)
    attacks = configured(gin_files, gin_params, strategy=strategy, tpu=tpu)
    return measure(attacks, subject, of, load_model, load_images, security_curve=security_curve)


class Configured(NamedTuple):
    """What attacks any number of models, and where it computes.

    Attributes:
        evaluate: `evaluation.evaluate.evaluate` with its settings.
        config: these as gin text.
        within: the strategy.
        process: the number of this one.
    """

    evaluate: functools.partial
    config: str
    within: Any
    process: int


def configured(
    gin_files: Sequence[str], gin_params: Sequence[str], *, strategy: str | None, tpu: str | None
) -> Configured:
    """What `run` attacks with, and says where; arguments and errors as there."""
    from robust_keras.commands import configuration
    from robust_keras.engines import replicas, strategies

    strategy = strategy or "auto"
    within = strategies.strategy(strategy, tpu=tpu)  # Processes meet before anything else.
    with within.scope():
        process = replicas.process_index()
    configuration.parse(gin_files, gin_params)
    with within.scope():  # Other networks may be loaded here.
        evaluate = configuration.resolve(configuration.evaluate)
    if process == 0:
        print(strategies.announcement(strategy, tpu=tpu), file=sys.stderr, flush=True)
    return Configured(evaluate, configuration.operative_config(), within, process)


def measure(
    attacks: Configured,
    subject: dict[str, Any],
    of: "folder.Folder",
    load_model: Callable,
    load_images: Callable,
    *,
    security_curve: bool = False,
) -> dict[str, Any]:
    """Evaluates a model in a folder, or goes on there; errors as of `run`.

    Args:
        attacks: what with.
        subject: `model`, `dataset` and `individual`, as results.json has them.
        of: where.
        load_model: `() -> logits_fn`, called in the strategy's scope.
        load_images: `() -> data.sources.Source`, the same one each time.
        security_curve: see `run`.

    Returns:
        The results, a dictionary as in results.json.
    """
    from robust_keras import failures, ownership
    from robust_keras.commands import model_cards

    evaluate, process = attacks.evaluate, attacks.process
    writes = process == 0
    with failures.running(of.workdir, process=process), ownership.lock(of.workdir, what="an evaluation", writes=writes):
        if security_curve:
            _check_curve(evaluate, of, subject)
        if (results := _claim(of, subject, attacks.config, load_images, writes)) is not None:
            told = _checked(attacks, of, results, subject, load_model, load_images)
            if writes:
                print(told)
        else:
            if line := model_cards.another_threat(subject["model"]["path"], evaluate.keywords["threat"]):
                print(line, flush=True)
            results = _evaluate(attacks, of, subject, load_model, load_images)
        if security_curve:
            _add_curve(attacks, of, subject, load_model, load_images)
        return results


def _claim(of: "folder.Folder", subject: dict, config: str, load_images, writes: bool) -> dict[str, Any] | None:
    """Refuses a folder of another evaluation; the results of this one where it has finished."""
    from robust_keras.commands import workdirs
    from robust_keras.evaluation import folder

    workdirs.claim(of.workdir, config, holds_results=of.is_begun(), write=writes)
    digest = functools.partial(_digest, load_images, subject["dataset"]["num_examples"])
    return folder.finished(of, subject, writes=writes, digest=digest)


def _checked(attacks: Configured, of: "folder.Folder", results: dict, subject: dict, load_model, load_images) -> str:
    """Refuses finished results that do not hold; what to say of others."""
    from robust_keras.data import sources
    from robust_keras.evaluation import examples, folder, kept_verdicts, plan
    from robust_keras.evaluation import results as evaluation

    evaluate = attacks.evaluate
    try:
        given = examples.first(load_images(), subject["dataset"]["num_examples"])
    except sources.DataUnavailable:  # What has finished can be read wherever it is.
        return f"{folder.told_of_finished(of, None)}\n{evaluation.summary(results)}"
    settings: dict[str, Any] = {name: evaluate.keywords.get(name) for name in ("attacks", "baseline", "threat")}
    planned = plan.make(**settings, search_dtype=evaluate.keywords.get("search_dtype", "float32"))
    with attacks.within.scope():
        arrays = folder.read_examples(of)
        num_kept = kept_verdicts.check_finished(of.workdir, results, arrays, given, load_model(), planned)
    return f"{folder.told_of_finished(of, num_kept)}\n{evaluation.summary(results)}"


def _digest(load_images, num_examples: int | None) -> str:
    from robust_keras.evaluation import examples

    return examples.digest(*examples.first(load_images(), num_examples))


def _evaluate(attacks: Configured, of: "folder.Folder", subject: dict, load_model, load_images) -> dict[str, Any]:
    from robust_keras.commands import model_cards
    from robust_keras.evaluation import folder
    from robust_keras.evaluation import results as evaluation
    from robust_keras.saved_models import export

    writes = attacks.process == 0
    model, num_examples = dict(subject["model"]), subject["dataset"]["num_examples"]
    subject = {**subject, "dataset": {**subject["dataset"], "sha256": _digest(load_images, num_examples)}}
    folder.begin(of, subject, writes=writes)
    path = model.pop("path")
    with attacks.within.scope():
        results, examples = attacks.evaluate(
            load_model(),
            load_images(),
            num_examples=num_examples,
            individual=subject["individual"],
            model_identity=model,
            save_directory=of.state,
        )
    results = {**results, **subject, "versions": export.versions()}
    if writes:
        folder.finish(of, results, examples)
        print(evaluation.summary(results))
        if line := model_cards.published(path):
            print(line)
        print(f"Results: {of.results}")
    return results


def _check_curve(evaluate, of: "folder.Folder", subject: dict) -> None:
    """Refuses, before any work, a radius of zero and the security curve of another model, threat model or seed."""
    from robust_keras.evaluation import security, security_file

    security.check_radius(evaluate.keywords["threat"])
    described = {**subject, "dataset": {"sha256": None}}
    known = security_file.subject_of(described, evaluate.keywords["threat"], evaluate.keywords.get("seed", 0))
    security_file.read(of.workdir, {name: value for name, value in known.items() if name != "images"})


def _add_curve(attacks: Configured, of: "folder.Folder", subject: dict, load_model, load_images) -> None:
    """Adds security.json to a finished evaluation, and prints what it holds."""
    from robust_keras.engines import replicas
    from robust_keras.evaluation import folder, security, security_file

    settings, writes = attacks.evaluate.keywords, attacks.process == 0
    names = ("threat", "seed", "batch_size", "jit_compile", "progress")
    options = {name: settings[name] for name in names if name in settings}
    described = {**subject, "dataset": {"sha256": _digest(load_images, subject["dataset"]["num_examples"])}}
    known = security_file.subject_of(described, options["threat"], options.get("seed", 0))

    def measured():
        with attacks.within.scope():
            replicas.all_processes(0.0)  # The first one has written the examples.
            return security.measure(load_model(), load_images(), evaluated=folder.read_examples(of), **options)

    found = security_file.read_or_measure(of.workdir, known, measured, writes=writes)
    if writes:
        print(security_file.summary(found))


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
    flags.DEFINE_bool(
        "security_curve",
        False,
        "Add security.json: robust accuracy by radius and checks of the attacks.",
        flag_values=values,
    )
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
        security_curve=values.security_curve,
        **launcher.reading(values),
        strategy=values.strategy,
        tpu=values.tpu,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
