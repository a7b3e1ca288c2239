"""Measures any Keras model on arrays or a dataset, without configuration files: `robust_keras.evaluate`.

>>> import keras, numpy as np, robust_keras as rk
>>> network = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
>>> network.set_weights([np.repeat([[-1.0, 1.0]], 64, axis=0), np.zeros(2)])
>>> x, y = np.full((4, 8, 8, 1), 128, np.uint8), [1, 1, 1, 1]
>>> result = rk.evaluate(network, (x, y), norm="Linf", epsilon="8/255", attacks="pgd20", batch_size=4, progress=False)
>>> print(result)
4 examples, Linf 8/255
clean accuracy: 100.00 %
robust accuracy after pgd: 100.00 %
robust accuracy (an upper bound of the true one): 100.00 %, 95 % interval 51.01 to 100.00 %
>>> result.robust_accuracy, result.warnings, result.examples["adversarial"].shape
(1.0, [], (4, 8, 8, 1))
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras import bounds as pixel_bounds
from robust_keras import failures, losses, ownership, threats
from robust_keras.attacks import presets
from robust_keras.attacks.attack import Attack
from robust_keras.engines import replicas
from robust_keras.evaluation import data_forms, examples, folder, kept_verdicts, security, security_file, verification
from robust_keras.evaluation import evaluate as evaluation
from robust_keras.evaluation import plan as plans
from robust_keras.evaluation.results import Evaluation
from robust_keras.models import any_network
from robust_keras.saved_models import export, load, safety

_OPTIONS = ("individual", "allow_chance", "jit_compile", "search_dtype", "diagnose", "progress", "save_every")


def evaluate(
    network: keras.Model | Callable | str | os.PathLike,
    data: Any,
    *,
    norm: str | None = None,
    epsilon: float | str | None = None,
    attacks: str | Attack | Callable | Sequence = "standard",
    baseline: bool = True,
    bounds: Sequence[float] | None = None,
    from_logits: bool | None = None,
    num_examples: int | None = None,
    workdir: str | os.PathLike | None = None,
    batch_size: int = 128,
    seed: int = 0,
    security_curve: bool = False,
    trust_model: bool = False,
    **options: Any,
) -> Evaluation:
    """Clean and robust accuracy of any classifier, as `scripts/evaluate.py` measures that of a saved one.

    Attacks run in order, each on what still stands. Every adversarial image is verified.

    Args:
        network: a `keras.Model`, a function of images, or the path of a SavedModel or a `.keras` file. An
            `AdversarialModel` stands for its network, its bounds and what it returns, which nothing may contradict,
            and for its norm and radius where none are given.
        data: `(x, y)`, or a `tf.data.Dataset` or `keras.utils.PyDataset` of such batches, or a `data.sources.Source`.
            Images `[N, ...]` are uint8, or floats of the `bounds`; labels integers `[N]` or `[N, 1]`, or one-hot rows.
        norm: 'Linf', 'L2' or 'L1'.
        epsilon: the radius as a fraction of the pixel range: a number, or an exact fraction such as '8/255'.
        attacks: 'standard', 'plus', 'rand' (AutoAttack), 'aa+mt' (the paper's), 'pgd40', 'pgd20', or a list of names
            such as 'apgd-ce' and of attacks of one's own, see `attacks.presets.choose`.
        baseline: whether PGD-40 runs beside 'standard', 'plus', 'rand' and 'aa+mt', as in the recipes, to compare with.
        bounds: `(low, high)`, the pixel values that the network takes for black and white; (0, 1) unless said.
        from_logits: whether it returns logits, as it does unless said; False where it returns probabilities.
        num_examples: how many examples, the first ones; None for all.
        workdir: where results.json and examples.npz go, and where an interrupted evaluation goes on; None for nowhere.
        batch_size: of every pass, over all replicas of the strategy in scope.
        seed: of the attacks' noise.
        security_curve: whether to measure robust accuracy at other radii, and the attacks, see `security.measure`.
        trust_model: whether the model of a path may do more than compute: you have looked at it.
        **options: of `evaluation.evaluate.evaluate`, such as `individual`, `allow_chance`, `progress`.

    Returns:
        An `Evaluation`: `robust_accuracy`, an upper bound of the true one, `warnings`, `examples` and so on.

    Raises:
        ValueError: in one line and before any attack, for a model, data or settings that do not fit together, and for a
            folder of another evaluation, or in use by one.
    """
    reading = any_network.read(network, bounds=bounds, from_logits=from_logits)
    threat = reading.against(norm, epsilon)
    subject = _subject(reading, data, num_examples, trust_model)
    plan = _plan(presets.choose(attacks, threat=threat), baseline, threat, seed, options)
    work = _Work(subject, plan, batch_size, security_curve, options)
    _try_out(work)
    return work.measured() if workdir is None else _in_folder(folder.Folder(os.fspath(workdir)), work)


class _Subject(NamedTuple):
    """What is evaluated: a network, how it is read, and on what."""

    network: Any
    logits_fn: Any
    source: data_forms.Collected
    is_trusted: bool

    def described(self, sha256: str | None = None) -> dict[str, Any]:
        """As results.json has it; `sha256` tells the network from others."""
        reading = {"input_range": list(self.logits_fn.input_range), "outputs": self.logits_fn.outputs}
        return {
            "model": {"path": self.logits_fn.name, "sha256": sha256, **reading},
            "dataset": {"name": self.source.name, "num_examples": len(self.source.labels)},
        }


class _Work(NamedTuple):
    """What is measured, and how."""

    subject: _Subject
    plan: plans.Plan
    batch_size: int
    has_curve: bool
    options: dict[str, Any]

    def measured(self) -> Evaluation:
        """The evaluation, with a security curve where one is wanted, without files."""
        found = _described(self.evaluate(), self.subject.described())
        return found.with_security(self.secure(found) if self.has_curve else None)

    def evaluate(self, **where: Any) -> Evaluation:
        plan = self.plan
        return evaluation.evaluate(
            self.subject.logits_fn,
            self.subject.source,
            attacks=plan.attacks[plan.first :],
            threat=plan.threat,
            baseline=plan.attacks[0] if plan.has_baseline else None,
            seed=plan.seed,
            batch_size=self.batch_size,
            **self.options,
            **where,
        )

    def secure(self, found: Evaluation) -> dict[str, Any]:
        """The security curve of what was evaluated."""
        options = {name: self.options[name] for name in ("jit_compile", "progress") if name in self.options}
        return security.measure(
            self.subject.logits_fn,
            self.subject.source,
            threat=self.plan.threat,
            evaluated=found.examples,
            batch_size=self.batch_size,
            seed=self.plan.seed,
            **options,
        )


def _subject(reading: any_network.Reading, data: Any, num_examples: int | None, is_trusted: bool) -> _Subject:
    network, bounds, from_logits, _ = reading
    with safety.trusting(is_trusted):
        logits_fn = load.as_logits_fn(network, bounds=bounds, from_logits=from_logits)
    return _Subject(network, logits_fn, data_forms.collected(data, num_examples, bounds), is_trusted)


def _plan(chosen: presets.Preset, baseline: bool, threat: threats.Threat, seed: int, options: dict) -> plans.Plan:
    if unknown := options.keys() - set(_OPTIONS):
        raise ValueError(f"Expected options out of {', '.join(_OPTIONS)}. Received: {', '.join(sorted(unknown))}")
    individual = options.get("individual", False)
    given = chosen.baseline if baseline else None
    dtype = options.get("search_dtype", "float32")
    return plans.make(chosen.attacks, given, threat, individual=individual, seed=seed, search_dtype=dtype)


def _try_out(work: _Work) -> None:
    """Looks at what shows on a few images: whether model, images, labels and attacks fit together."""
    subject, plan = work.subject, work.plan
    if work.has_curve:
        security.check_radius(plan.threat)
    evaluation.check_batch_size(subject.logits_fn, work.batch_size)
    images, labels = subject.source.images, subject.source.given_labels
    if images.ndim != 4 and any(attack.name == "square" for attack in plan.attacks):
        raise ValueError(
            "Expected images [N, height, width, channels] for the attack square; attacks=['apgd-ce', 'apgd-t', 'fab-t']"
            f" are those of the standard version without it. Received: {images.shape}"
        )
    if tf.distribute.has_strategy():  # Of TensorFlow, whose variables are read on its replicas.
        return
    size = getattr(subject.logits_fn, "batch_size", None) or min(len(images), 2)
    x = threats.check_images(pixel_bounds.to_unit(np.resize(images[:size], (size, *images.shape[1:]))), plan.threat)
    needs_gradients = any(attack.loss_fn is not None for attack in plan.attacks)
    logits = any_network.try_out(subject.logits_fn, x, needs_gradients=needs_gradients)
    losses.check_labels(labels, logits.shape[-1])


def _in_folder(of: folder.Folder, work: _Work) -> Evaluation:
    """Goes on with an evaluation, or begins it, in a folder that is no other's."""
    subject, plan = work.subject, work.plan
    described = subject.described(_digest(subject, work.batch_size))
    described["dataset"]["sha256"] = examples.digest(*subject.source.pair())
    records = [{"name": attack.name, "parameters": attack.parameters} for attack in plan.attacks]
    threat = {"norm": plan.threat.norm, "epsilon": plan.threat.epsilon, "seed": plan.seed}
    first = {"baseline": records[0] if plan.has_baseline else None, "attacks": records[plan.first :]}
    claimed = {**described, "individual": plan.individual, "plan": folder.plan_of({**first, **threat})}
    process = replicas.process_index()
    writes = process == 0
    with (
        failures.running(of.workdir, process=process),
        ownership.lock(of.workdir, what="an evaluation", writes=writes),
    ):
        known = security_file.subject_of(described, plan.threat, plan.seed)
        if work.has_curve:
            security_file.read(of.workdir, known)  # Which may be another one's.
        if results := folder.finished(of, claimed, writes=writes):
            found = Evaluation(results, folder.read_examples(of))
            given = subject.source.pair()
            num_kept = kept_verdicts.check_finished(of.workdir, *found, given, subject.logits_fn, plan)
            print(folder.told_of_finished(of, num_kept))
        else:
            folder.begin(of, claimed, writes=writes)
            where = {"model_identity": described["model"], "save_directory": of.state}
            found = _described(work.evaluate(**where), described)
            if writes:
                folder.finish(of, found.results, found.examples)
        if not work.has_curve:
            return found
        secure = functools.partial(work.secure, found)
        return found.with_security(security_file.read_or_measure(of.workdir, known, secure, writes=writes))


def _described(found: Evaluation, described: dict[str, Any]) -> Evaluation:
    return found._replace(results={**found.results, **described, "versions": export.versions()})


def _digest(subject: _Subject, batch_size: int) -> str:
    """What tells a network from others: of files, of weights and architecture, or of a function its predictions."""
    if isinstance(subject.network, (str, os.PathLike)):
        with safety.trusting(subject.is_trusted):
            return load.fingerprint(subject.network)
    if isinstance(subject.network, keras.Layer):
        return _digest_of_weights(subject.network)
    logits = verification.predict(replicas.over_replicas(subject.logits_fn), subject.source.images, batch_size)
    return hashlib.sha256(np.argmax(logits, axis=-1).astype(np.int32).tobytes()).hexdigest()


def _digest_of_weights(network: keras.Layer) -> str:
    digest = hashlib.sha256(json.dumps(_architecture(network)).encode())
    for weight in network.weights:
        value = np.asarray(weight)
        digest.update(f"{value.shape} {weight.dtype}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _architecture(layer: keras.Layer) -> list:
    """Classes and settings of a network's layers, without what differs each time it is made, as names do."""
    layers = getattr(layer, "layers", None)
    if layers:
        return [type(layer).__name__, [_architecture(each) for each in layers]]
    try:
        return [type(layer).__name__, _settings(layer.get_config())]
    except NotImplementedError:  # A layer that cannot be saved.
        return [type(layer).__name__]


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        dropped = ("name", "module", "registered_name", "shared_object_id", "build_config")
        return {str(key): _settings(each) for key, each in value.items() if key not in dropped}
    if isinstance(value, (list, tuple)):
        return [_settings(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
