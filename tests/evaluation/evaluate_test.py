import functools
import json
import math
import time

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, noise, ownership, threats
from robust_keras.attacks import step_rules, transfer
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.attack import as_attack
from robust_keras.attacks.fab import fab
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.square import square
from robust_keras.data import sources
from robust_keras.evaluation import batching, gradient_masking, plan
from robust_keras.evaluation import evaluate as evaluation
from robust_keras.evaluation import results as reporting

EPSILON = threats.threat(norm="Linf", epsilon="8/255")

# The classifier reads one byte of an image: over 127.5 it is class 1, else 0.
FEATURES = np.array([129, 131, 140, 126, 124, 100, 140, 90, 133, 200])
LABELS = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 1], np.int32)
# How many bytes it takes to move each over: 1.5, 3.5, 12.5, 1.5, 3.5, 27.5, -, -, 5.5, 72.5; two are wrong already.
BROKEN_BY_2_4_6 = np.array([1, 2, -1, 1, 2, -1, 0, 0, 3, -1])


def make_source(features=FEATURES, labels=LABELS):
    """uint8 [N, 2, 2, 3]: the first byte is the feature, the second the index, the rest 100."""
    images = np.full((len(features), 2, 2, 3), 100, np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = features, np.arange(len(features))
    return sources.Source("made", images, np.asarray(labels, np.int32), 3)


def logits_fn(x, threshold=127.5):
    """Linear in the pixels, three classes of which the last never wins."""
    weights = np.zeros((12, 3), np.float32)
    weights[0, 1] = 255.0
    return tf.reshape(x, (-1, 12)) @ weights - tf.constant([0.0, threshold, 900.0])


def feature(value, like):
    """`value` [batch] at the first byte, zero elsewhere."""
    return tf.pad(value[:, None, None, None] / 255.0, [[0, 0], [0, 1], [0, 1], [0, 2]]) + tf.zeros_like(like)


def shift(logits_fn, x, labels, *, seeds, threat, by, calls=None):
    """Moves the feature by so many bytes towards the other class, and records whom it was called with."""
    if calls is not None:
        tf.numpy_function(lambda *call: calls.append(call), [tf.round(x[:, 0, 0, 1] * 255), x, labels, seeds], [])
    return x + feature(tf.where(labels == 0, by, -by), x)


def random_shift(logits_fn, x, labels, *, seeds, threat):
    """Moves the feature by up to seven bytes, and the last by up to one."""
    by = noise.uniform(seeds, (2,), 0.0, 7.0)
    last = tf.pad((by[:, 1] / 7 / 255)[:, None, None, None], [[0, 0], [1, 0], [1, 0], [2, 0]])
    return x + feature(tf.where(labels == 0, by[:, 0], -by[:, 0]), x) + last


def attack(fn=shift, threat=EPSILON, **options):
    return functools.partial(fn, threat=threat, **options)


def evaluate(attacks, source=None, logits_fn=logits_fn, threat=EPSILON, batch_size=4, **options):
    source = source or make_source()
    options.setdefault("diagnose", False)
    return evaluation.evaluate(
        logits_fn, source, attacks=attacks, threat=threat, batch_size=batch_size, progress=False, **options
    )


def without_seconds(results):
    records = {"attacks": results["attacks"], "baseline": [results["baseline"]] if "baseline" in results else []}
    stripped = {key: [{k: v for k, v in r.items() if k != "seconds"} for r in rs] for key, rs in records.items()}
    return {**results, **stripped}


def assert_same(one, other):
    assert without_seconds(one.results) == without_seconds(other.results)
    assert one.examples.keys() == other.examples.keys()
    for name, array in one.examples.items():
        np.testing.assert_array_equal(array, other.examples[name], err_msg=name)


@pytest.fixture(scope="module")
def sequence():
    """The evaluation by three attacks, and whom each was called with."""
    calls = [[], [], []]
    return evaluate([attack(by=by, calls=seen) for by, seen in zip((2.0, 4.0, 6.0), calls)]), calls


def test_sequence_of_attacks(sequence):
    (results, examples), calls = sequence
    assert results["num_examples"] == 10
    np.testing.assert_allclose(results["clean_accuracy"], 0.8)
    np.testing.assert_allclose(results["robust_accuracy"], 0.3)
    np.testing.assert_allclose(results["robust_accuracy_uint8"], 0.3)
    assert [record["attack"] for record in results["robust_accuracy_after"]] == ["shift"] * 3
    np.testing.assert_allclose([r["robust_accuracy"] for r in results["robust_accuracy_after"]], [0.6, 0.4, 0.3])
    assert [record["examples_attacked"] for record in results["attacks"]] == [8, 6, 4]
    assert [record["examples_broken"] for record in results["attacks"]] == [2, 2, 1]
    assert [record["parameters"]["by"] for record in results["attacks"]] == [2.0, 4.0, 6.0]

    np.testing.assert_array_equal(examples["broken_by"], BROKEN_BY_2_4_6)
    np.testing.assert_array_equal(examples["robust"], BROKEN_BY_2_4_6 == -1)
    np.testing.assert_array_equal(examples["label"], LABELS)
    np.testing.assert_array_equal(examples["index"], np.arange(10))
    np.testing.assert_array_equal(examples["clean_prediction"], FEATURES > 127.5)


def test_attacks_get_full_batches_of_what_stands(sequence):
    made = make_source()
    for k, seen in enumerate(sequence[1]):
        standing = np.flatnonzero((BROKEN_BY_2_4_6 < 0) | (BROKEN_BY_2_4_6 > k))
        assert len(seen) == math.ceil(len(standing) / 4)
        for indices, x, labels, seeds in seen:
            assert x.shape == (4, 2, 2, 3) and x.dtype == np.float32 and seeds.shape == (4, 2)
            np.testing.assert_array_equal(x, made.images[indices.astype(int)] / np.float32(255))
            np.testing.assert_array_equal(labels, LABELS[indices.astype(int)])
        assert set(np.concatenate([call[0] for call in seen])) == set(standing)


def test_adversarial_images_are_those_that_broke_and_clean_ones_elsewhere(sequence):
    made, examples = make_source(), sequence[0].examples
    clean = made.images.astype(np.float32) / np.float32(255)
    towards = np.where(LABELS == 0, 1, -1)
    for k, by in enumerate(BROKEN_BY_2_4_6):
        if by > 0:
            expected = made.images[k].astype(np.float64)
            expected[0, 0, 0] += towards[k] * 2 * by
            np.testing.assert_allclose(examples["adversarial"][k] * 255, expected, atol=1e-4)
            assert np.argmax(logits_fn(examples["adversarial"][k : k + 1])) == 1 - LABELS[k]
        else:  # Also what the clean image gets wrong, and what was attacked in vain.
            np.testing.assert_array_equal(examples["adversarial"][k], clean[k])


def test_order_changes_who_broke_what_and_not_the_outcome():
    results, examples = evaluate([attack(by=6.0), attack(by=2.0)])
    np.testing.assert_allclose([r["robust_accuracy"] for r in results["robust_accuracy_after"]], [0.3, 0.3])
    assert [(r["examples_attacked"], r["examples_broken"]) for r in results["attacks"]] == [(8, 5), (3, 0)]
    np.testing.assert_array_equal(examples["broken_by"], np.minimum(BROKEN_BY_2_4_6, 1))


def test_without_attacks():
    results, examples = evaluate([])
    assert results["attacks"] == results["robust_accuracy_after"] == []
    assert results["clean_accuracy"] == results["robust_accuracy"] == results["robust_accuracy_uint8"] == 0.8
    np.testing.assert_array_equal(examples["broken_by"] == 0, BROKEN_BY_2_4_6 == 0)


@pytest.fixture(scope="module")
def random_evaluation():
    return evaluate([attack(random_shift)], batch_size=10)


def test_batch_size_changes_nothing(random_evaluation):
    results = random_evaluation.results
    assert 0.3 <= results["robust_accuracy"] < 0.8
    for batch_size in (1, 3, 32):
        assert_same(evaluate([attack(random_shift)], batch_size=batch_size), random_evaluation)


def test_examples_attacked_before_change_nothing(random_evaluation):
    # Whom the second attack finds standing depends on the first; what it does to them does not.
    after = evaluate([attack(by=2.0), attack(random_shift)], batch_size=3).examples
    alone = random_evaluation.examples
    for k in np.flatnonzero(after["broken_by"] == 2):
        assert alone["broken_by"][k] == 1
        np.testing.assert_array_equal(after["adversarial"][k], alone["adversarial"][k])
    assert np.any(after["broken_by"] == 2)
    np.testing.assert_array_equal(after["robust"], alone["robust"] & (after["broken_by"] != 1))


def test_first_examples(random_evaluation):
    results, examples = evaluate([attack(random_shift)], num_examples=7)
    assert results["num_examples"] == 7
    assert examples.keys() == random_evaluation.examples.keys()
    for name, array in random_evaluation.examples.items():
        np.testing.assert_array_equal(examples[name], array[:7], err_msg=name)
    np.testing.assert_allclose(results["clean_accuracy"], 6 / 7)


def test_same_seed_same_result_and_another_seed_another(random_evaluation):
    assert_same(evaluate([attack(random_shift)], seed=0), random_evaluation)
    other = evaluate([attack(random_shift)], seed=1)
    assert other.results["seed"] == 1 and random_evaluation.results["seed"] == 0
    broken = (other.examples["broken_by"] == 1) & (random_evaluation.examples["broken_by"] == 1)
    assert broken.any()
    differ = other.examples["adversarial"] != random_evaluation.examples["adversarial"]
    assert np.all(differ.any((1, 2, 3))[broken])


def test_keys(random_evaluation):
    results, examples = random_evaluation
    # As DESIGN.md lists them; evaluate.py adds the three that it alone knows.
    assert results.keys() == {
        "num_examples",
        "clean_accuracy",
        "robust_accuracy",
        "robust_accuracy_uint8",
        "robust_accuracy_after",
        "norm",
        "epsilon",
        "epsilon_fraction",
        "attacks",
        "individual",
        "confidence_interval_95",
        "warnings",
        "seed",
    }
    assert results["attacks"][0].keys() == {
        "name",
        "parameters",
        "seconds",
        "examples_attacked",
        "examples_broken",
        "steps",
        "steps_without_packing",
    }
    assert results["robust_accuracy_after"][0].keys() == {"attack", "robust_accuracy"}
    assert (results["norm"], results["epsilon"], results["epsilon_fraction"]) == ("Linf", 8 / 255, "8/255")
    assert results["warnings"] == [] and results["seed"] == 0 and results["individual"] is False
    assert json.loads(json.dumps(results)) == results
    types = {name: (array.dtype, array.shape) for name, array in examples.items()}
    assert types == {
        "index": (np.int64, (10,)),
        "label": (np.int32, (10,)),
        "clean_prediction": (np.int32, (10,)),
        "robust": (np.bool_, (10,)),
        "broken_by": (np.int32, (10,)),
        "adversarial": (np.float32, (10, 2, 2, 3)),
        "adversarial_prediction": (np.int32, (10,)),
        "clean_margin": (np.float32, (10,)),
    }


def test_confidence_interval_is_that_of_the_robust_accuracy(sequence):
    # 3 of 10.
    np.testing.assert_allclose(sequence[0].results["confidence_interval_95"], [0.1077913, 0.6032219], atol=1e-6)


@pytest.mark.parametrize(
    "successes, trials, expected",
    [
        (8, 10, [0.4901625, 0.9433178]),
        (5, 10, [0.2365931, 0.7634069]),
        (0, 10, [0.0, 0.2775328]),
        (10, 10, [0.7224672, 1.0]),
        (1, 1, [0.2065493, 1.0]),
    ],
)
def test_wilson_interval(successes, trials, expected):
    interval = reporting.wilson_interval(successes, trials)
    np.testing.assert_allclose(interval, expected, atol=1e-6)
    # Its ends are the proportions from which the observed one is 1.96 standard deviations away.
    for end in interval:
        if 0 < end < 1 - 1e-6:
            deviation = math.sqrt(end * (1 - end) / trials)
            np.testing.assert_allclose(abs(successes / trials - end) / deviation, 1.959964, rtol=1e-5)


# Images outside the threat model: these break nothing, and nothing else is lost.


def outside(logits_fn, x, labels, *, seeds, threat, delta, index):
    """Adds `delta` to the example of that index: one that the last, padded batch holds."""
    return x + tf.where(tf.round(x[:, 0, 0, 1] * 255) == index, delta, 0.0)[:, None, None, None]


@pytest.mark.parametrize(
    "delta, count, warning",
    [
        (8.01 / 255, "outside_threat_model", "outside_threat_model"),
        (-80 / 255, "outside_threat_model", "outside_threat_model"),
        (math.nan, "non_finite_images", "non_finite_gradients"),
        (math.inf, "non_finite_images", "non_finite_gradients"),
    ],
)
def test_outside_the_ball(delta, count, warning):
    # Of example 9, the first byte is 200: 80 off, it is wrong.
    results, examples = evaluate([attack(by=2.0), attack(outside, delta=delta, index=9), attack(by=4.0)], batch_size=3)
    np.testing.assert_array_equal(examples["broken_by"], [1, 3, -1, 1, 3, -1, 0, 0, -1, -1])
    assert results["warnings"] == [warning]
    assert [record.get(count) for record in results["attacks"]] == [None, 1, None]
    assert f"warning: {warning} (1 of outside)" in reporting.summary(results).splitlines()
    json.dumps(results, allow_nan=False)


def test_on_the_sphere_is_inside():
    results = evaluate([attack(outside, delta=delta, index=9) for delta in (8 / 255, -8 / 255)]).results
    np.testing.assert_allclose(results["robust_accuracy"], 0.8)
    assert results["warnings"] == []


def test_nan_in_one_pixel():
    def poisoned(logits_fn, x, labels, *, seeds, threat):
        return x + feature(tf.where(labels == 0, math.nan, -2.0), x)

    results, examples = evaluate([attack(poisoned)])
    np.testing.assert_array_equal(examples["broken_by"] == 1, (BROKEN_BY_2_4_6 == 1) & (LABELS == 1))
    assert results["attacks"][0]["non_finite_images"] == 3 and np.isfinite(examples["adversarial"]).all()


@pytest.mark.parametrize("byte, delta", [(254, 2 / 255), (1, -2 / 255)])
def test_outside_the_range(byte, delta):
    made = make_source()
    made.images[9, 1, 1, 2] = byte
    assert evaluate([attack(outside, delta=delta, index=9)], made).results["attacks"][0]["outside_threat_model"] == 1
    # Up to black and white is inside.
    if byte == 254:
        results = evaluate([attack(outside, delta=delta / 2, index=9)], made).results
        assert results["robust_accuracy"] == 0.8 and results["warnings"] == []


def test_l2_ball():
    # Twelve pixels, each off by d: a distance of sqrt(12) d.
    threat = threats.threat(norm="L2", epsilon=0.1)
    inside, beyond = (attack(outside, threat, delta=factor * 0.1 / math.sqrt(12), index=9) for factor in (0.999, 1.001))
    records = evaluate([inside, beyond], threat=threat).results["attacks"]
    assert [record.get("outside_threat_model") for record in records] == [None, 1]


def test_counts_outlive_an_interruption(monkeypatch, tmp_path):
    options = {"save_directory": str(tmp_path), "save_every": 0, "batch_size": 4}
    attacks = [attack(outside, delta=math.nan, index=index) for index in (0, 9)]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            evaluate(attacks, **options)
    assert [record["non_finite_images"] for record in evaluate(attacks, **options).results["attacks"]] == [1, 1]


# What is refused.


@pytest.mark.parametrize("norm, epsilon", [("Linf", "7/255"), ("L2", "8/255"), ("Linf", 0.0314)])
def test_attack_on_another_threat_is_refused_before_any_runs(norm, epsilon):
    calls = []
    other = attack(threat=threats.threat(norm=norm, epsilon=epsilon), by=0.0)
    with pytest.raises(ValueError, match=f"Linf 8/255. Received: shift on {norm} {epsilon}"):
        evaluate([attack(by=2.0, calls=calls), other])
    assert calls == []


def test_equal_radii_may_be_typed_differently():
    same = threats.threat(norm="Linf", epsilon=8 / 255)
    np.testing.assert_allclose(evaluate([attack(threat=same, by=6.0)]).results["robust_accuracy"], 0.3)


def test_probabilities_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="--outputs=probabilities"):
        evaluate([], logits_fn=lambda x: tf.nn.softmax(logits_fn(x)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_on_clean_images(value):
    def broken(x):
        return logits_fn(x) + tf.where(x[:, 0, 0, :1] * 255 > 199, value, 0.0)

    with pytest.raises(ValueError, match="finite logits on clean images"):
        evaluate([], logits_fn=broken)


def test_non_finite_logits_are_not_right():
    def broken(x):
        return logits_fn(x) + tf.where(x[:, 0, 0, :1] * 255 < 100.5, math.nan, 0.0)

    def downwards(logits_fn, x, labels, *, seeds, threat):
        return x + feature(tf.where(labels == 0, -2.0, 0.0), x)

    examples = evaluate([attack(downwards)], make_source([102, 112, 200], [0, 0, 1]), broken).examples
    np.testing.assert_array_equal(examples["broken_by"], [1, -1, -1])


def test_non_finite_logits_under_attack_are_reported():
    def broken(x):
        return logits_fn(x) + tf.where(x[:, 0, 0, :1] * 255 > 201, math.nan, 0.0)

    def upwards(logits_fn, x, labels, *, seeds, threat):
        return x + feature(tf.where(labels == 1, 2.0, 0.0), x)

    results = evaluate([attack(upwards)], logits_fn=broken).results
    assert results["warnings"] == ["non_finite_logits"]
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize(
    "label",
    [3, -1],
)
def test_labels_outside_the_classes(label):
    labels = LABELS.copy()
    labels[4] = label
    with pytest.raises(ValueError, match=f"labels of the model's 3 classes. Received: {label}"):
        evaluate([], make_source(labels=labels))


@pytest.mark.parametrize("num_examples", [0, -1, 11])
def test_num_examples_out_of_range(num_examples):
    with pytest.raises(ValueError, match=f"from 1 to 10. Received: {num_examples}"):
        evaluate([], num_examples=num_examples)


# Rounding to bytes.


def test_what_works_only_unrounded_is_robust_in_bytes():
    # 128 - .4 = 127.6 is under 127.7 and is rounded back to 128; 129 - 1.6 = 127.4 is rounded to 127; 140 stands.
    rounding = functools.partial(logits_fn, threshold=127.7)
    made = make_source([128, 129, 140], [1, 1, 1])
    results, examples = evaluate([attack(by=0.4), attack(by=1.6)], made, rounding)
    np.testing.assert_array_equal(examples["broken_by"], [1, 2, -1])
    np.testing.assert_allclose(results["robust_accuracy"], 1 / 3)
    np.testing.assert_allclose(results["robust_accuracy_uint8"], 2 / 3)
    np.testing.assert_allclose(examples["adversarial"][:, 0, 0, 0] * 255, [127.6, 127.4, 140], atol=1e-4)


def test_what_works_only_rounded_is_not_robust_in_bytes():
    # 128 - .55 = 127.45 is over 127.4, 127 is not.
    results, examples = evaluate(
        [attack(by=0.55)], make_source([128, 140], [1, 1]), functools.partial(logits_fn, threshold=127.4)
    )
    np.testing.assert_array_equal(examples["broken_by"], [-1, -1])
    assert (results["robust_accuracy"], results["robust_accuracy_uint8"]) == (1.0, 0.5)


def test_rounding_out_of_the_ball_breaks_nothing():
    # 128 - 7.65 = 120.35 is over 120.2; rounded it is 120, eight bytes off: outside of .03 * 255 = 7.65.
    threat = threats.threat(norm="Linf", epsilon=0.03)
    results = evaluate(
        [attack(threat=threat, by=7.65)],
        make_source([128, 140], [1, 1]),
        functools.partial(logits_fn, threshold=120.2),
        threat,
    ).results
    assert (results["robust_accuracy"], results["robust_accuracy_uint8"]) == (1.0, 1.0)


@pytest.mark.parametrize("norm, epsilon", [("Linf", 0.03), ("L2", 0.1)])
def test_rounded_images_are_bytes_inside_the_ball(norm, epsilon):
    threat = threats.threat(norm=norm, epsilon=epsilon)
    made, seen = make_source(), []
    made.images[:, 0, 0, 1] += 50  # Away from black.

    def to_the_edge(logits_fn, x, labels, *, seeds, threat):
        direction = threat.steepest_step(noise.normal(seeds, (2, 2, 3)))
        return x + 0.9999 * threat.epsilon * direction

    def recording(x):
        tf.numpy_function(seen.append, [x], [])
        return logits_fn(x)

    evaluate([attack(to_the_edge, threat)], made, recording, threat)
    in_bytes = [np.float64(x) * 255 for x in seen[3:]]  # After three batches of clean images.
    rounded = np.concatenate([x for x in in_bytes if np.abs(x - np.round(x)).max() < 1e-3])
    clean = made.images[BROKEN_BY_2_4_6 != 0]
    assert rounded.shape == clean.shape
    delta = (rounded - clean).reshape(8, 12) / 255
    sizes = np.abs(delta).max(-1) if norm == "Linf" else np.sqrt((delta**2).sum(-1))
    assert sizes.max() <= epsilon * (1 + 1e-4) and sizes.min() > 0.8 * epsilon


# Nothing to attack.


def test_all_wrong_without_an_attack():
    calls = []
    results, examples = evaluate([attack(by=2.0, calls=calls)] * 2, make_source(labels=1 - (FEATURES > 127.5)))
    assert results["clean_accuracy"] == results["robust_accuracy"] == results["robust_accuracy_uint8"] == 0.0
    assert [(r["examples_attacked"], r["examples_broken"]) for r in results["attacks"]] == [(0, 0)] * 2
    assert calls == []
    assert not examples["broken_by"].any() and not examples["robust"].any()
    np.testing.assert_allclose(results["confidence_interval_95"], [0.0, 0.2775328], atol=1e-6)


def test_all_broken_before_the_last_attack():
    calls = []
    source = make_source([129, 126, 130], [1, 0, 1])
    results, examples = evaluate([attack(by=6.0), attack(by=2.0, calls=calls)], source)
    assert [r["robust_accuracy"] for r in results["robust_accuracy_after"]] == [0.0, 0.0]
    np.testing.assert_array_equal(examples["broken_by"], [1, 1, 1])
    assert [r["examples_attacked"] for r in results["attacks"]] == [3, 0]
    assert calls == []


# Each attack on every example.


def test_individual(sequence):
    calls = []
    by = (2.0, 6.0, 4.0)
    results, examples = evaluate([attack(by=by[0]), attack(by=by[1]), attack(by=by[2], calls=calls)], individual=True)
    assert results["individual"] is True
    assert [(r["examples_attacked"], r["examples_broken"]) for r in results["attacks"]] == [(8, 2), (8, 5), (8, 4)]
    np.testing.assert_allclose([r["robust_accuracy"] for r in results["robust_accuracy_after"]], [0.6, 0.3, 0.3])
    assert (results["robust_accuracy"], results["robust_accuracy_uint8"]) == (0.3, 0.3)
    assert {int(k) for indices, *_ in calls for k in indices} == set(np.flatnonzero(BROKEN_BY_2_4_6 != 0))
    np.testing.assert_array_equal(examples["robust"], sequence[0].examples["robust"])
    # The first attack that breaks it counts, and its image, whatever the later ones found.
    broken_by = np.minimum(BROKEN_BY_2_4_6, 2)
    np.testing.assert_array_equal(examples["broken_by"], broken_by)
    clean = make_source().images.astype(np.float64)
    moved = np.abs(examples["adversarial"] * 255.0 - clean)[:, 0, 0, 0]
    np.testing.assert_allclose(moved, np.array([0.0, *by, 0.0])[broken_by], atol=1e-4)


# A baseline.


@pytest.mark.parametrize("individual", [False, True])
def test_a_baseline_does_not_count(individual):
    calls = []
    options = {"baseline": attack(by=2.0), "individual": individual}
    results, examples = evaluate([attack(by=4.0, calls=calls), attack(by=1.0)], **options)
    baseline = results["baseline"]
    np.testing.assert_allclose(baseline.pop("robust_accuracy"), 0.6)
    assert baseline.keys() == results["attacks"][0].keys()
    assert (baseline["name"], baseline["parameters"]["by"]) == ("shift", 2.0)
    assert (baseline["examples_attacked"], baseline["examples_broken"]) == (8, 2)
    # What it broke is attacked again.
    assert [r["examples_attacked"] for r in results["attacks"]] == [8, 8 if individual else 4]
    assert [r["parameters"]["by"] for r in results["attacks"]] == [4.0, 1.0]
    assert {int(k) for indices, *_ in calls for k in indices} == set(np.flatnonzero(BROKEN_BY_2_4_6 != 0))
    np.testing.assert_allclose([r["robust_accuracy"] for r in results["robust_accuracy_after"]], [0.4, 0.4])
    np.testing.assert_allclose(results["robust_accuracy"], 0.4)
    # 40 %, and 60 % with the baseline.
    assert results["warnings"] == ["baseline_gap_above_5_points"]
    broken = (BROKEN_BY_2_4_6 == 1) | (BROKEN_BY_2_4_6 == 2)
    np.testing.assert_array_equal(examples["broken_by"] == 1, broken)
    moved = np.abs(examples["adversarial"] * 255.0 - make_source().images)[:, 0, 0, 0]
    np.testing.assert_allclose(moved, np.where(broken, 4.0, 0.0), atol=1e-4)
    line = "baseline shift alone: 60.00 %"
    assert line in reporting.summary({**results, "baseline": {**baseline, "robust_accuracy": 0.6}}).splitlines()


def test_what_only_the_baseline_breaks_stands():
    results, examples = evaluate([attack(by=2.0)], baseline=attack(by=6.0))
    np.testing.assert_allclose((results["robust_accuracy"], results["robust_accuracy_uint8"]), 0.6)
    np.testing.assert_allclose(results["baseline"]["robust_accuracy"], 0.3)
    assert results["warnings"] == ["baseline_beats_attacks"]
    np.testing.assert_array_equal(examples["robust"], (BROKEN_BY_2_4_6 < 0) | (BROKEN_BY_2_4_6 > 1))
    clean = make_source().images / np.float32(255)
    np.testing.assert_array_equal(examples["adversarial"][examples["robust"]], clean[examples["robust"]])


def test_a_baseline_alone():
    results, examples = evaluate([], baseline=attack(by=6.0))
    assert results["attacks"] == [] and results["robust_accuracy"] == 0.8 and results["warnings"] == []
    np.testing.assert_allclose(results["baseline"]["robust_accuracy"], 0.3)
    np.testing.assert_array_equal(examples["robust"], BROKEN_BY_2_4_6 != 0)


def test_a_baseline_on_another_threat_is_refused():
    with pytest.raises(ValueError, match="Linf 8/255. Received: shift on L2 1"):
        evaluate([attack(by=2.0)], baseline=attack(threat=threats.threat(norm="L2", epsilon=1), by=0.0))


# Interrupted and resumed.

MIXED = (
    attack(random_shift),
    attack(apgd, num_steps=12, num_restarts=2),
    attack(square, num_queries=25),
)


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, num_calls):
    """Every call of `advance` after so many raises."""
    left = [num_calls]
    for kind in (batching.Packing, batching.Batchwise):

        def advance(self, whole=kind.advance):
            if left[0] == 0:
                raise Interrupted
            left[0] -= 1
            return whole(self)

        monkeypatch.setattr(kind, "advance", advance)


def mixed(**options):
    return evaluate(MIXED, baseline=attack(by=1.0), batch_size=3, **options)


@pytest.fixture(scope="module")
def undisturbed():
    return mixed()


def test_undisturbed(undisturbed):
    # Every part has its share of what is to be resumed.
    broken = [record["examples_broken"] for record in undisturbed.results["attacks"]]
    assert broken[0] > 0 and sum(broken[1:]) > 0
    assert undisturbed.results["robust_accuracy"] > 0


@pytest.mark.oldest
@pytest.mark.parametrize("num_calls", [1, 6, 12])
def test_interrupted_and_resumed(monkeypatch, capsys, tmp_path, undisturbed, num_calls):
    options = {"save_directory": str(tmp_path / "state"), "save_every": 0}
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_calls)
        with pytest.raises(Interrupted):
            mixed(**options)
    assert "Resuming" not in capsys.readouterr().out
    resumed = mixed(**options)
    assert capsys.readouterr().out.startswith("Resuming from attack")
    assert_same(resumed, undisturbed)
    np.testing.assert_array_equal([r["seconds"] >= 0 for r in resumed.results["attacks"]], True)


def test_seconds_add_up(monkeypatch, tmp_path):
    slow = attack(by=2.0, calls=type("Slow", (), {"append": staticmethod(lambda _: time.sleep(0.3))}))
    options = {"save_directory": str(tmp_path), "save_every": 0, "batch_size": 4}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            evaluate([slow], **options)
    # Two batches of .3 seconds each, one before and one after.
    assert evaluate([slow], **options).results["attacks"][0]["seconds"] >= 0.6


def test_finished_and_asked_again(tmp_path):
    # Interrupted after the last save: nothing is attacked again.
    class Calls(list):  # A setting by its name, whatever it holds.
        pass

    options = {"save_directory": str(tmp_path)}
    calls = Calls()
    sequence = [attack(by=2.0, calls=calls), attack(by=4.0)]
    one = evaluate(sequence, **options)
    num_calls = len(calls)
    other = evaluate(sequence, **options)
    assert len(calls) == num_calls
    assert other.results == one.results
    assert_same(one, other)


def test_what_was_diagnosed_is_kept(monkeypatch, tmp_path):
    figures = {
        "logits_spread": 0.0,
        "zero_gradients": 0.25,
        "gradient_mismatch": 0.0,
        "margin": -1.0,
        "margin_5_steps": 1.0,
        "margin_50_steps": 1.0,
    }
    looks = []

    def diagnose(logits_fn, x, labels, seeds, *, threat, attacks, batch_size, takes_other_sizes):
        looks.append((len(x), labels.numpy().tolist()))
        assert [attack.name for attack in attacks] == ["shift"] and (batch_size, takes_other_sizes) == (4, True)
        moved = shift(None, x, labels, seeds=seeds, threat=threat, by=4.0)
        return gradient_masking.Diagnosis(figures, [x.numpy(), moved.numpy()])

    monkeypatch.setattr(gradient_masking, "diagnose", diagnose)
    options = {"diagnose": True, "save_directory": str(tmp_path), "save_every": 0}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            evaluate([attack(by=2.0)], **options)
    results = evaluate([attack(by=2.0)], **options).results
    # At the examples that are classified correctly, once.
    assert looks == [(8, LABELS[BROKEN_BY_2_4_6 != 0].tolist())]
    differ = {"examples": 8, "examples_broken": 4, "broken_by_diagnosis_alone": 2, "broken_by_attacks_alone": 0}
    assert results["diagnosis"] == figures | differ and results["warnings"] == ["zero_gradients"]


# A state that is not this evaluation's.


def interrupted(monkeypatch, directory, **options):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            evaluate([attack(by=2.0), attack(by=4.0)], save_directory=str(directory), save_every=0, **options)


def other_images():
    made = make_source()
    made.images[9, 1, 1, 1] += 1
    return made


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"source": other_images()}, "images"),
        ({"source": make_source(labels=np.where(np.arange(10) == 9, 0, LABELS))}, "images"),
        ({"attacks": [attack(by=2.0), attack(by=4.1)]}, "attacks"),
        ({"attacks": [attack(by=2.0), attack(random_shift)]}, "attacks"),
        ({"seed": 1}, "attacks"),
        ({"individual": True}, "attacks"),
        ({"model_identity": "other"}, "model"),
        ({"source": other_images(), "model_identity": {"sha256": "1"}}, "images and model"),
    ],
)
def test_the_state_of_another_evaluation_is_refused(monkeypatch, tmp_path, changes, named):
    interrupted(monkeypatch, tmp_path, model_identity={"sha256": "0"})
    before = sorted(path.name for path in tmp_path.iterdir())
    options = {"model_identity": {"sha256": "0"}, "attacks": [attack(by=2.0), attack(by=4.0)], **changes}
    with pytest.raises(ValueError, match=f"state of this evaluation. Received: {tmp_path}, that of other {named}$"):
        evaluate(save_directory=str(tmp_path), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    # Its own goes on, whatever the layout of the batches.
    options = {**options, "source": None, "individual": False, "seed": 0, "model_identity": {"sha256": "0"}}
    options["attacks"] = [attack(by=2.0), attack(by=4.0)]
    assert evaluate(save_directory=str(tmp_path), batch_size=3, **options).results["robust_accuracy"] == 0.4


def test_a_save_directory_in_use_is_refused(tmp_path):
    with ownership.lock(tmp_path, what="another call"), pytest.raises(ownership.FolderInUse):
        evaluate([attack(by=2.0)], save_directory=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    evaluate([attack(by=2.0)], save_directory=str(tmp_path))


def test_the_state_of_other_numbers_is_refused(monkeypatch, tmp_path):
    # A state of an older version does not say what it is of, and shows by its size.
    monkeypatch.setattr(plan.Plan, "identity", lambda self, examples, model: {})
    interrupted(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="of 3 attacks on 10 examples. Received: .*step-0000000.*of shape .2, 10."):
        evaluate([attack(by=2.0)] * 3, save_directory=str(tmp_path))
    with pytest.raises(ValueError, match="of 2 attacks on 7 examples"):
        evaluate([attack(by=2.0)] * 2, save_directory=str(tmp_path), num_examples=7)


def test_a_setting_of_a_newer_version_does_not_matter(monkeypatch, tmp_path):
    interrupted(monkeypatch, tmp_path)

    def shift_with_option(*args, option=None, **settings):
        return shift(*args, **settings)

    shift_with_option.__name__ = "shift"
    newer = [functools.partial(shift_with_option, threat=EPSILON, by=by) for by in (2.0, 4.0)]
    assert as_attack(newer[0]).parameters == {"by": 2.0, "option": None}
    by_name = {"by": 2.0, "calls": None}
    assert as_attack(attack(by=2.0)).parameters == by_name
    assert evaluate(newer, save_directory=str(tmp_path)).results["robust_accuracy"] == 0.4


# Whether the settings fit the model.


@pytest.mark.parametrize("shape", [(10, 1), (10, 3)])
def test_labels_as_keras_gives_them_and_one_hot(sequence, shape):
    labels = LABELS[:, None] if shape[1] == 1 else np.eye(3, dtype=np.float32)[LABELS]
    assert labels.shape == shape
    made = make_source()._replace(labels=labels)
    assert_same(
        evaluate([attack(by=by) for by in (2.0, 4.0, 6.0)], made), evaluate([attack(by=by) for by in (2.0, 4.0, 6.0)])
    )


def test_as_many_labels_as_images():
    made = make_source()
    with pytest.raises(ValueError, match="a label for each image. Received: 9 for 10"):
        evaluate([], made._replace(labels=LABELS[:9]))
    with pytest.raises(ValueError, match="Expected"):
        evaluate([], made._replace(labels=np.zeros((10, 2), np.int32)))


def test_a_straight_through_cast_is_said():
    named = functools.partial(logits_fn)
    assert evaluate([], logits_fn=named).results["warnings"] == []
    named.straight_through_cast = True
    assert evaluate([], logits_fn=named).results["warnings"] == ["straight_through_cast"]


@pytest.mark.parametrize("size", [1, 4])
def test_a_model_that_takes_one_size_of_batch(size):
    # Of 16 slots, Packing would take fewer once few runs are left.
    def fixed(x):
        return logits_fn(tf.ensure_shape(x, (size, 2, 2, 3)))

    fixed.batch_size = size
    attacks = [attack(by=2.0), attack(apgd, num_steps=5), attack(square, num_queries=20)]
    found = evaluate(
        attacks, logits_fn=fixed, batch_size=size, diagnose=size > 1
    )  # `gradient_masking_test` diagnoses with one.
    assert_same(found, evaluate(attacks, batch_size=size, diagnose=size > 1))
    assert found.results["robust_accuracy"] < 0.5
    with pytest.raises(ValueError, match=f"evaluate.batch_size = {size}: .* Received: 3"):
        evaluate(attacks, logits_fn=fixed, batch_size=3)


def large_logits(x):
    """Of two classes, a hundred for each byte."""
    feature = 100 * (x[:, 0, 0, :1] * 255 - 127.5)
    return tf.concat([-feature, feature], axis=1)


def test_a_weak_attack_does_not_look_like_a_strong_model():
    attacks = [attack(apgd, num_steps=10)]
    baseline = attack(pgd, loss_fn=losses.margin, num_steps=10, step_size="2/255")
    results = evaluate(attacks, logits_fn=large_logits, baseline=baseline, diagnose=True).results
    # What lies near the threshold falls to the random start.
    assert results["robust_accuracy"] >= 0.6 and results["baseline"]["robust_accuracy"] <= 0.3
    assert results["warnings"] == ["zero_gradients", "baseline_beats_attacks"]
    assert results["diagnosis"]["zero_gradients:apgd-ce"] == 1.0 and results["diagnosis"]["zero_gradients:pgd"] == 0.0
    assert "warning: zero_gradients (apgd-ce)" in reporting.summary(results).splitlines()


def test_a_model_that_looks_at_other_images_is_told():
    def centred(x):
        return logits_fn(x - tf.reduce_mean(x, axis=0, keepdims=True) + 0.5)

    accuracies = set()
    for batch_size in (2, 5):
        results = evaluate([], logits_fn=centred, batch_size=batch_size, diagnose=True).results
        accuracies.add(results["clean_accuracy"])
        assert "batch_dependent_model" in results["warnings"] and results["diagnosis"]["batch_dependence"] > 0.01
    assert len(accuracies) == 2


def test_a_model_with_a_root_loses_nothing():
    # The last byte is 0 in half of the images: there the gradient of the root is infinite, and 0 times that no number.
    def rooted(x):
        return logits_fn(x) + 0.01 * tf.sqrt(x[:, 1, 1, 2:])

    made = make_source()
    made.images[::2, 1, 1, 2] = 0
    attacks = [attack(apgd, num_steps=10), attack(square, num_queries=10)]
    found = evaluate(attacks, made, rooted, diagnose=True)
    assert "non_finite_gradients" in found.results["warnings"]
    assert np.isfinite(found.examples["adversarial"]).all()
    json.dumps(found.results, allow_nan=False)


def test_what_was_found_outlives_an_attack_that_fails(tmp_path):
    class Calls(list):
        pass

    calls, fails = Calls(), [True]

    def failing(logits_fn, x, labels, *, seeds):
        if fails[0]:
            raise RuntimeError("out of memory")
        return shift(logits_fn, x, labels, seeds=seeds, threat=EPSILON, by=4.0)

    attacks = [attack(by=2.0, calls=calls), failing]
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(attacks, save_directory=str(tmp_path), save_every=1e9)
    num_calls, fails[0] = len(calls), False
    results, examples = evaluate(attacks, save_directory=str(tmp_path), save_every=1e9)
    assert len(calls) == num_calls > 0
    np.testing.assert_array_equal(examples["broken_by"], [1, 2, -1, 1, 2, -1, 0, 0, -1, -1])


# Other settings.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_and_images_of_other_types(dtype):
    made = make_source()
    with pytest.raises(ValueError, match=f"integer labels. Received: uint8 and {np.dtype(dtype)}"):
        evaluate([], made._replace(labels=made.labels.astype(dtype)))
    with pytest.raises(ValueError, match="uint8 or float images and integer labels. Received: int64 and int32"):
        evaluate([], made._replace(images=made.images.astype(np.int64)))
    with pytest.raises(ValueError, match=r"images within the bounds \(0, 1\). Received: values from "):
        evaluate([], made._replace(images=made.images.astype(dtype)))
    # Of whole bytes, it is the evaluation of these bytes.
    attacks = [attack(by=by) for by in (2.0, 4.0)]
    assert_same(evaluate(attacks, made._replace(images=(made.images / 255).astype(dtype))), evaluate(attacks, made))


def chance_source(num_examples, num_correct):
    """All are class 1 to the model."""
    return make_source(np.full(num_examples, 200), np.arange(num_examples) < num_correct)


def test_clean_accuracy_at_chance():
    # Of three classes and 60 examples: 1/3 + 1.645 sqrt(2/9 / 60) = 43.34 %; 26 of 60 are 43.33 %.
    calls = []
    attacks = [attack(by=2.0, calls=calls)]
    with pytest.raises(ValueError, match=r"above chance, 43.34 % or more of 60 .*Received: 43.33 %.*bounds="):
        evaluate(attacks, chance_source(60, 26))
    assert calls == []
    assert evaluate(attacks, chance_source(60, 27)).results["clean_accuracy"] == 0.45
    assert evaluate(attacks, chance_source(60, 26), allow_chance=True).results["num_examples"] == 60


@pytest.mark.parametrize("num_examples", [1, 49])
def test_few_examples_tell_nothing_of_chance(num_examples):
    assert evaluate([], chance_source(num_examples, 0)).results["clean_accuracy"] == 0.0
    with pytest.raises(ValueError, match="chance"):
        evaluate([], chance_source(50, 0))


def of_probabilities(x):
    """Logarithms of the two probabilities, from 0 at a byte of 117.5 to 1 at 137.5."""
    p = tf.clip_by_value((x[:, 0, 0, :1] * 255 - 117.5) / 20, 0.0, 1.0)
    return tf.math.log(tf.maximum(tf.concat([1.0 - p, p], axis=1), np.finfo(np.float32).tiny))


def test_saturated_probabilities():
    named = functools.partial(of_probabilities)
    named.outputs = "probabilities"
    results = evaluate([], logits_fn=named).results
    assert results["saturated_examples"] == 5  # 140, 100, 140, 90, 200.
    assert results["warnings"] == ["saturated_probabilities"]
    results = evaluate([], make_source([129, 118, 137], [1, 0, 1]), named).results
    assert results["saturated_examples"] == 0 and results["warnings"] == []
    assert "saturated_examples" not in evaluate([], logits_fn=of_probabilities).results


def test_settings_that_an_attack_refuses_are_refused_before_any_runs():
    calls = []
    with pytest.raises(ValueError, match="num_queries"):
        evaluate([attack(by=2.0, calls=calls), attack(square, num_queries=0)])
    assert calls == []


def test_parameters_are_the_same_in_every_process():
    def surrogate(x):
        return logits_fn(x)

    surrogate.name = "other"
    inner = functools.partial(
        pgd, threat=EPSILON, loss_fn=losses.margin, num_steps=1, step_size=functools.partial(tf.cast, dtype="x")
    )
    text = json.dumps(as_attack(attack(transfer.transfer, surrogate=surrogate, attack=inner)).parameters)
    assert "0x" not in text
    assert "num_steps=1" in text and "margin" in text and "other" in text


def test_a_diagnosis_without_numbers_leaves_valid_json():
    def undefined(x):
        return logits_fn(x) + tf.where(x[:, 0, 0, :1] * 255 < 195, math.nan, 0.0)

    # The attacks of the diagnosis go there.
    results = evaluate([], make_source([200, 202], [1, 1]), undefined, diagnose=True).results
    json.dumps(results, allow_nan=False)


# With a real attack and network.


@pytest.mark.oldest
def test_pgd_on_a_network(tiny_model):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 8, 8, 3)).astype(np.uint8)
    predictions = np.argmax(tiny_model(images / np.float32(255), training=False), axis=-1)
    labels = np.where(np.arange(11) == 4, (predictions + 1) % 4, predictions)  # One is wrong.
    source = sources.Source("made", images, labels.astype(np.int32), 4)
    three_steps = functools.partial(
        pgd,
        threat=EPSILON,
        loss_fn=losses.cross_entropy,
        num_steps=3,
        step_size="4/255",
        step_rule=step_rules.steepest(),
    )
    network = functools.partial(tiny_model, training=False)
    results, examples = evaluate([three_steps], source, network)
    assert results["attacks"][0]["name"] == "pgd"
    assert results["attacks"][0]["parameters"] == {
        "loss_fn": "cross_entropy",
        "num_steps": 3,
        "step_size": "4/255",
        "step_rule": "steepest",
        "num_restarts": 1,
        "random_start": True,
    }
    json.dumps(results)
    np.testing.assert_allclose(results["clean_accuracy"], 10 / 11)
    assert results["robust_accuracy"] < 0.7
    adversarial = examples["adversarial"]
    assert np.abs(adversarial - images / np.float32(255)).max() <= 8 / 255 + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    right = np.argmax(network(adversarial), axis=-1) == labels
    np.testing.assert_array_equal(right, examples["robust"])
    rounded = np.round(adversarial * 255) / np.float32(255)
    expected = np.mean(np.argmax(network(rounded), axis=-1) == labels)
    np.testing.assert_allclose(results["robust_accuracy_uint8"], expected)


@pytest.mark.oldest
@pytest.mark.parametrize(
    "searching, name",
    [
        (attack(apgd, num_steps=8), "apgd-ce"),
        (attack(apgd, loss_fn=losses.dlr, num_steps=8), "apgd-dlr"),
        (attack(fab, num_steps=8, num_restarts=1), "fab"),
        (attack(square, num_queries=60), "square"),
        (attack(multi_targeted, num_steps=8, num_restarts=1), "multi-targeted"),
    ],
)
def test_searches_on_a_network(make_tiny_model, searching, name):
    network = functools.partial(make_tiny_model(), training=False)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    clean = images / np.float32(255)
    labels = np.argmax(network(clean), axis=-1).astype(np.int32)
    labels[2] = (labels[2] + 1) % 4  # Is wrong.
    results, examples = evaluate([searching], sources.Source("made", images, labels, 4), network, batch_size=5)
    (record,) = results["attacks"]
    assert (record["name"], record["examples_attacked"]) == (name, 5)
    assert record["examples_broken"] == 5 - examples["robust"].sum() >= 2
    search = as_attack(searching).search
    assert record["steps_without_packing"] == 5 * search.num_runs(4) * search.num_steps
    assert 5 <= record["steps"] <= record["steps_without_packing"]
    if name == "square":
        assert record["steps"] < record["steps_without_packing"]
    adversarial, broken = examples["adversarial"], examples["broken_by"] == 1
    assert np.abs(adversarial - clean).max() <= 8 / 255 + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    np.testing.assert_array_equal(np.argmax(network(adversarial), axis=-1) == labels, examples["robust"])
    np.testing.assert_array_equal((adversarial != clean).any((1, 2, 3)), broken)
    json.dumps(results)


def test_an_untargeted_attack_aims_at_no_class():
    # Three classes are fewer than the nine targets that `fab` would take if it were targeted.
    untargeted, targeted = (attack(fab, num_steps=1, num_restarts=1, targeted=t) for t in (False, True))
    assert "fewer_target_classes" not in evaluate([untargeted]).results["warnings"]
    assert "fewer_target_classes" in evaluate([targeted]).results["warnings"]


def test_correct_under_attack():
    made = make_source()
    x = tf.constant(made.images, tf.float32) / 255.0
    seeds = noise.example_seeds(0, 0, tf.range(10))
    seen = []

    def checked(logits, images, labels, *, seeds):
        seen.append((logits, seeds))
        return shift(logits, images, labels, seeds=seeds, threat=EPSILON, by=4.0)

    clean, robust = evaluation.correct_under_attack(logits_fn, x, tf.constant(LABELS), seeds=seeds, attack=checked)
    np.testing.assert_array_equal(clean, BROKEN_BY_2_4_6 != 0)
    np.testing.assert_array_equal(robust, (BROKEN_BY_2_4_6 < 0) | (BROKEN_BY_2_4_6 == 3))
    assert len(seen) == 1 and seen[0][0] is logits_fn and seen[0][1] is seeds

    # An attack that repairs a wrong image doesn't make it robust.
    def repair(logits, images, labels, *, seeds):
        return images - feature(tf.where(labels == 0, 40.0, -40.0), images)

    _, robust = evaluation.correct_under_attack(logits_fn, x, tf.constant(LABELS), seeds=seeds, attack=repair)
    np.testing.assert_array_equal(robust, BROKEN_BY_2_4_6 != 0)


def test_summary(sequence):
    results = {**sequence[0].results, "confidence_interval_95": [0.1, 0.6], "warnings": ["a_flag"]}
    assert reporting.summary(results).splitlines() == [
        "10 examples, Linf 8/255",
        "clean accuracy: 80.00 %",
        "robust accuracy after shift: 60.00 %",
        "robust accuracy after shift: 40.00 %",
        "robust accuracy after shift: 30.00 %",
        "robust accuracy (an upper bound of the true one): 30.00 %, 95 % interval 10.00 to 60.00 %",
        "warning: a_flag",
    ]


@pytest.mark.oldest
def test_replicas_share_the_work_and_find_the_same(mirrored, make_tiny_model):
    def found(strategy):
        with strategy.scope():
            network = make_tiny_model()
            images = np.random.default_rng(3).integers(0, 256, (27, 8, 8, 3)).astype(np.uint8)
            labels = np.argmax(make_tiny_model()(images / np.float32(255), training=False), -1).astype(np.int32)
            labels[:5] = (labels[:5] + 1) % 4
            threat = threats.threat(norm="Linf", epsilon="2/255")
            baseline = attack(pgd, threat, loss_fn=losses.margin, num_steps=3, step_size="1/255")
            return evaluate(
                [
                    attack(apgd, threat, num_steps=15, num_restarts=2),
                    attack(square, threat, num_queries=50),
                ],
                sources.Source("made", images, labels, 4),
                lambda x: network(x, training=False),
                threat,
                baseline=baseline,
                batch_size=6,
                diagnose=True,
            )

    one, two = found(tf.distribute.get_strategy()), found(mirrored)
    assert 0 < one.results["robust_accuracy"] < one.results["clean_accuracy"] < 1
    for name in ("robust", "broken_by", "clean_prediction"):
        np.testing.assert_array_equal(two.examples[name], one.examples[name])
    np.testing.assert_allclose(two.examples["adversarial"], one.examples["adversarial"], atol=1e-5)
    for name in ("robust_accuracy", "robust_accuracy_uint8", "warnings"):
        assert two.results[name] == one.results[name]
    assert two.results["baseline"]["examples_broken"] == one.results["baseline"]["examples_broken"]
    for name, figure in one.results["diagnosis"].items():
        np.testing.assert_allclose(two.results["diagnosis"][name], figure, rtol=1e-4, atol=1e-5)


def test_a_batch_that_replicas_cannot_share_is_refused(mirrored):
    with mirrored.scope(), pytest.raises(ValueError, match="divides among 2 replicas. Received: 3"):
        evaluate([attack(by=2.0)], batch_size=3)


# What is no attack, no model or no images.


def returning(made):
    def of_ones_own(logits_fn, x, labels, *, seeds):
        return made(x)

    return of_ones_own


@pytest.mark.parametrize(
    "made, received",
    [
        (lambda x: None, "None"),
        (lambda x: [x], "a list"),
        (lambda x: tf.cast(x, tf.float64), "float64 (4, 2, 2, 3)"),
        (lambda x: tf.cast(x * 255, tf.uint8), "uint8 (4, 2, 2, 3)"),
        (lambda x: x[:2], "float32 (2, 2, 2, 3)"),
        (lambda x: x[..., :1], "float32 (4, 2, 2, 1)"),
        (lambda x: tf.reshape(x, (4, 12)), "float32 (4, 12)"),
        (lambda x: tf.boolean_mask(x, x[:, 0, 0, 1] > 0.5 / 255), "float32 (3, 2, 2, 3)"),  # In no batch but the first.
        (lambda x: tf.reduce_sum(x), "float32 ()"),
    ],
)
def test_an_attack_that_returns_no_images_like_those_given(made, received):
    with pytest.raises(ValueError) as error:
        evaluate([returning(made)])
    line = f"Expected float32 images (4, 2, 2, 3) from the attack of_ones_own. Received: {received}"
    assert str(error.value) == line
    x = tf.fill((4, 2, 2, 3), 0.5)
    if "(3," not in received:
        with pytest.raises(ValueError) as error:
            evaluation.correct_under_attack(logits_fn, x, tf.zeros(4, tf.int32), seeds=None, attack=returning(made))
        assert str(error.value) == line


def test_an_attack_of_ones_own():
    found = evaluate([returning(lambda x: x.numpy() if tf.executing_eagerly() else x + 1 / 255)])
    assert found.results["attacks"][0]["name"] == "of_ones_own"


def test_images_without_channels():
    made = make_source()

    def of_colours(x):
        return logits_fn(tf.ensure_shape(x, (None, 2, 2, 3)))

    with pytest.raises(ValueError, match=r"^Expected a model of images \(2, 6\) in batches of 4. Received: .*$"):
        evaluate([attack(by=2.0)], made._replace(images=made.images.reshape(10, 2, 6)), logits_fn=of_colours)


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda x: logits_fn(x) @ tf.ones((4, 2)), "Expected a model of images"),
        (lambda x: tf.ensure_shape(x, (None, 32, 32, 3)), "Expected a model of images"),
        (lambda x: {"logits": logits_fn(x)}, "Expected a model of images"),
        (lambda x: x.numpy(), "Expected a model of images"),
        (lambda x: tf.reshape(logits_fn(x), (-1, 2, 1, 3)), "Expected logits"),
        (lambda x: logits_fn(x)[:, 0], "Expected logits"),
        (lambda x: logits_fn(x)[:, :1], "Expected logits"),
        (lambda x: logits_fn(x)[:1], "Expected logits"),
    ],
)
def test_a_model_of_other_images_is_one_line(model, reason):
    with pytest.raises(ValueError) as error:
        evaluate([attack(by=2.0)], logits_fn=model)
    assert str(error.value).startswith(reason) and "\n" not in str(error.value) and " Received: " in str(error.value)


@pytest.mark.parametrize(
    "wrap, flagged",
    [
        (lambda logits: logits, False),
        (lambda logits: 1e-12 * logits, True),
        (lambda logits: tf.tanh(logits / 10), True),
    ],
)
def test_an_attack_that_a_models_logits_blind_is_told(make_tiny_model, wrap, flagged):
    """APGD-CE alone; the same network in all three, of which it breaks fewer where differences of its loss are lost."""
    network = make_tiny_model()
    images = np.random.default_rng(3).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    labels = np.argmax(network(images / np.float32(255), training=False), -1).astype(np.int32)
    results = evaluate(
        [attack(apgd, num_steps=30)],
        sources.Source("made", images, labels, 4),
        lambda x: wrap(network(x, training=False)),
        batch_size=64,
        diagnose=True,
    ).results
    differ = results["diagnosis"]
    assert differ["examples"] == 64 and differ["broken_by_diagnosis_alone"] >= (5 if flagged else 0)
    assert results["warnings"] == (["diagnosis_beats_attacks"] if flagged else [])
    said = f"warning: diagnosis_beats_attacks ({differ['broken_by_diagnosis_alone']} of 64 images)"
    assert (said in reporting.summary(results).splitlines()) == flagged
