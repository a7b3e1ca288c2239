"""The radius of a step's attack while it grows: exact, in the program, of the step alone, and of the attack alone."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, noise, storage, threats
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.step_rules import adam
from robust_keras.attacks.transfer import transfer
from robust_keras.training import epsilon_warm_up
from robust_keras.training.adversarial_model import AdversarialModel
from tests.training.train_test import NUM_STEPS, rows, tiny_run

LINF = threats.threat(norm="Linf", epsilon="8/255")
RADII = {"Linf": "8/255", "L2": "60/255", "L1": 6.0}
SEEDS = noise.example_seeds(3, 0, tf.range(8))


def attacked(network, images, threat, **settings):
    attack = functools.partial(pgd, threat=threat, loss_fn=losses.cross_entropy, num_steps=3, **settings)
    compiled = tf.function(lambda x, seeds: attack(network, x, tf.zeros(8, tf.int32), seeds=seeds))
    return compiled(images, SEEDS).numpy()


def part_of(whole, share):
    return threats.part_of(whole, tf.constant(share, tf.float32))


@pytest.mark.parametrize(
    "settings", [{"step_size": 0.02}, {}, {"step_size": 0.02, "step_rule": adam()}], ids=["steps", "default", "adam"]
)
@pytest.mark.parametrize("norm", RADII)
def test_the_whole_radius_is_the_attack_itself_to_the_bit(tiny_model, tiny_images, norm, settings):
    whole = threats.threat(norm=norm, epsilon=RADII[norm])
    expected = attacked(tiny_model, tiny_images, whole, **settings)
    assert np.abs(expected - tiny_images).max() > 1e-3
    np.testing.assert_array_equal(attacked(tiny_model, tiny_images, part_of(whole, 1.0), **settings), expected)


@pytest.mark.parametrize("step_size", [0.25, None])
@pytest.mark.parametrize("norm", RADII)
def test_a_part_of_the_radius_is_the_attack_of_that_radius_with_steps_as_much_shorter(
    tiny_model, tiny_images, norm, step_size
):
    whole = threats.threat(norm=norm, epsilon=RADII[norm])
    half = threats.threat(norm=norm, epsilon=whole.epsilon / 2)
    size = step_size and step_size * whole.epsilon
    of_half = {"step_size": size and size / 2}
    if size is None and norm == "Linf":  # Whose sizes are pixels; elsewhere they are diameters of the ball.
        of_half = {"step_size": lambda k: tf.gather([0.05, 0.005, 0.00005], k), "step_rule": adam()}
    expected = attacked(tiny_model, tiny_images, half, **of_half)
    found = attacked(tiny_model, tiny_images, part_of(whole, 0.5), step_size=size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    distances = half.distance(found, tiny_images).numpy()
    assert (distances <= half.epsilon * (1 + 1e-5)).all() and distances.max() > 0.9 * half.epsilon


def to_the_edge(logits_fn, x, labels, *, threat, seeds):
    """An attack of one's own, whose only size is that of the threat model."""
    return threat.project(x + 2 * threat.epsilon, x)


def radius(logits_fn, x, x_adv, labels, targets):
    """Reports how far the attack went."""
    return threats.linf_distance(x_adv, x) + 0.0 * tf.reduce_sum(logits_fn(x_adv), axis=-1)


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(logs["loss"])


def trained(network, traced=None, *, epsilon_warmup_steps=4, accumulation_steps=1, **compiled):
    """The radii of steps on grey images, and that of a validation after them."""

    def attack(logits_fn, x, labels, *, threat, seeds):
        if traced is not None:
            traced.append(threat)
        return to_the_edge(logits_fn, x, labels, threat=threat, seeds=seeds)

    model = AdversarialModel(
        network,
        objective=radius,
        attack=functools.partial(attack, threat=LINF),
        validation_attack=functools.partial(to_the_edge, threat=LINF),
        epsilon_warmup_steps=epsilon_warmup_steps,
        accumulation_steps=accumulation_steps,
    )
    model.compile("sgd", **compiled)
    data = np.full((24, 8, 8, 3), 0.5, np.float32), np.arange(24) % 4
    callback = Losses()
    history = model.fit(*data, batch_size=4, verbose=0, callbacks=[callback], validation_data=data)
    return [float(value) for value in callback.seen], history.history["val_loss"]


# (k + 1) / 4 of 8/255, then all of it.
GROWING = [2 / 255, 4 / 255, 6 / 255, 8 / 255, 8 / 255, 8 / 255]


@pytest.mark.parametrize(
    "layout", [{}, {"jit_compile": True}, {"accumulation_steps": 2}, {"steps_per_execution": 3}], ids=str
)
def test_the_radius_grows_by_the_step_and_validation_has_all_of_it(tiny_model, layout):
    traced = []
    radii, validated = trained(tiny_model, traced, **layout)
    last = layout.get("steps_per_execution", 1)
    assert radii == pytest.approx(GROWING[last - 1 :: last], rel=1e-5)
    assert validated == pytest.approx([8 / 255], rel=1e-5)
    assert len(traced) <= 2  # Not once a step.


def test_the_radius_grows_alike_on_two_devices(mirrored, make_tiny_model):
    with mirrored.scope():
        radii, _ = trained(make_tiny_model())
    assert radii == pytest.approx(GROWING, rel=1e-5)


def test_without_a_warm_up_every_step_has_the_full_radius(tiny_model):
    assert trained(tiny_model, epsilon_warmup_steps=0)[0] == pytest.approx([8 / 255] * 6, rel=1e-5)


def test_a_run_goes_on_with_the_radius_of_its_step(tmp_path):
    changes = {
        "attack": functools.partial(to_the_edge, threat=LINF),
        "objective": radius,
        "epsilon_warmup_steps": 5,
        "tau": None,
    }
    tiny_run(tmp_path / "whole", **changes)
    snapshot = storage.read(tmp_path / "whole" / "checkpoints", 3)
    storage.write(tmp_path / "again" / "checkpoints", 3, snapshot.arrays, snapshot.info)
    tiny_run(tmp_path / "again", **changes)
    radii = [float(row["loss"]) for row in rows(tmp_path / "whole")]
    assert radii == pytest.approx([min(1.0, (k + 1) / 5) * 8 / 255 for k in range(NUM_STEPS)], rel=1e-4)
    assert [row["loss"] for row in rows(tmp_path / "again")][3:] == [row["loss"] for row in rows(tmp_path / "whole")][
        3:
    ]


def test_pgd_of_a_radius_is_warmed_up_by_default(tiny_model, tiny_images):
    model = AdversarialModel(tiny_model, epsilon="8/255", epsilon_warmup_steps=4)
    model.compile("sgd")
    labels, targets = tf.zeros(8, tf.int32), tf.one_hot(tf.zeros(8, tf.int32), 4)
    for step, share in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0)):
        model.optimizer.iterations.assign(step)
        distances = LINF.distance(model.attacked(tiny_images, labels, targets, SEEDS), tiny_images).numpy()
        assert distances == pytest.approx(np.full(8, share * 8 / 255), rel=1e-4)


def surrogate(x):
    return x


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (None, "None"),
        (to_the_edge, "to_the_edge"),
        (functools.partial(to_the_edge), "to_the_edge"),
        (functools.partial(to_the_edge, threat=0.03), "to_the_edge"),
        (functools.partial(apgd, threat=LINF), "apgd"),
        (
            functools.partial(
                transfer, threat=LINF, surrogate=surrogate, attack=functools.partial(to_the_edge, threat=LINF)
            ),
            "transfer",
        ),
    ],
    ids=["none", "function", "unbound", "number", "search", "nested"],
)
def test_attacks_whose_radius_cannot_grow_are_refused(attack, name):
    with pytest.raises(ValueError, match=f"for epsilon_warmup_steps=5. Received: {name}$"):
        epsilon_warm_up.checked(5, attack)
    assert epsilon_warm_up.checked(0, attack) == 0


@pytest.mark.parametrize("num_steps", [-1, 2.0, "5", True])
def test_numbers_of_steps_that_are_none_are_refused(tiny_model, num_steps):
    with pytest.raises(ValueError, match=f"epsilon_warmup_steps as an integer >= 0. Received: {num_steps!r}"):
        AdversarialModel(tiny_model, epsilon="8/255", epsilon_warmup_steps=num_steps)
