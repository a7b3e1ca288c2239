import functools

import keras
import numpy as np
import pytest

import robust_keras as rk
from robust_keras import threats
from robust_keras.attacks.apgd import apgd, apgd_targeted
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.square import square
from robust_keras.data import sources
from robust_keras.evaluation import evaluate as evaluation
from robust_keras.evaluation import plan, saved_state
from robust_keras.models import any_network, searching
from robust_keras.models.wide_resnet import wide_resnet

LINF = threats.threat(norm="Linf", epsilon="2/255")
ATTACKS = [
    functools.partial(apgd, threat=LINF, num_steps=6, num_restarts=2),
    functools.partial(apgd_targeted, threat=LINF, num_steps=6, num_targets=2),
    functools.partial(square, threat=LINF, num_queries=20),
]


@pytest.fixture(scope="module")
def trained():
    """A network of digits, and a source of 48 of them."""
    x, y = sources.load("digits", split="train").images, sources.load("digits", split="train").labels
    x, y = x[:512], y[:512]
    keras.utils.set_random_seed(0)
    network = wide_resnet(depth=10, width=1, num_classes=10, input_shape=x.shape[1:], activation="silu")
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(x / 255.0, y, batch_size=64, epochs=6, verbose=0)
    return network, sources.Source("digits", x[:48], y[:48].astype(np.int32), 10)


def evaluate(trained, dtype, **options):
    network, source = trained
    settings = {"attacks": ATTACKS, "threat": LINF, "batch_size": 16, "diagnose": False, "progress": False}
    logits_fn = any_network.as_logits_fn(network)
    return evaluation.evaluate(logits_fn, source, search_dtype=dtype, **{**settings, **options})


def test_what_bfloat16_leaves_is_searched_again_and_no_verdict_is_weaker(trained):
    high, low = evaluate(trained, "float32"), evaluate(trained, "bfloat16")
    robust, robust_after_low = high.examples["robust"], low.examples["robust"]
    assert 0 < robust.sum() < 40 and not (robust_after_low & ~robust).any()
    named = [(each["name"], each["parameters"].get("search_dtype")) for each in low.results["attacks"]]
    names = ["apgd-ce", "apgd-t", "square"]
    assert named == [(n, "bfloat16") for n in names] + [(n, "float32") for n in names]
    standing, doubtful = int(robust_after_low.sum()), low.results["attacks"][-1]["examples_attacked"]
    again = low.results["attacks"][3]
    assert again["examples_attacked"] >= standing and doubtful <= again["examples_attacked"]
    assert len(low.results["robust_accuracy_after"]) == 6
    assert all("search_dtype" not in each["parameters"] for each in high.results["attacks"])


def test_only_those_broken_in_bfloat16_alone_are_searched_in_full_again(trained):
    taken = {}

    class Verdicts(saved_state.Verdicts):
        def save(self, work):
            taken[self.position] = (self.steps.copy(), dict(self.notes))
            super().save(work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_state, "Verdicts", Verdicts)
        low = evaluate(trained, "bfloat16")
    steps, notes = taken[max(taken)]
    doubtful = notes["broken_in_bfloat16_alone"]
    attacked = low.results["attacks"][3]["examples_attacked"]
    # Two restarts of seven points each for the doubtful, one for all others, less for those that fell.
    assert steps[3] <= 7 * (attacked + len(doubtful))
    assert low.results["attacks"][5]["examples_attacked"] <= len(doubtful)


def test_what_rounding_breaks_is_not_broken():
    """A network that float32 gets right by less than bfloat16 can tell."""
    x = inputs = keras.Input((8, 8, 3))
    ones = keras.initializers.Constant(0.01)
    for _ in range(2):
        x = keras.layers.Conv2D(4, 1, kernel_initializer=ones)(x)
    features = keras.layers.GlobalAveragePooling2D()(x)
    kernel = np.zeros((4, 2), np.float32)
    kernel[0] = [1.0, -1.0]
    network = keras.Model(inputs, keras.layers.Dense(2)(features))
    network.layers[-1].set_weights([kernel, np.zeros(2, np.float32)])
    images = np.full((4, 8, 8, 3), 127, np.uint8)
    middle = float(network(images / np.float32(255))[0, 0])
    bias = np.array([0.0, 2.0 * middle * (1.0 - 1e-4)], np.float32)
    network.layers[-1].set_weights([kernel, bias])
    assert network(images / np.float32(255)).numpy().argmax(-1).tolist() == [0] * 4
    source = sources.Source("made", images, np.zeros(4, np.int32), 2)
    tiny = threats.threat(norm="Linf", epsilon=1e-6)
    attack = functools.partial(apgd, threat=tiny, num_steps=3)
    found = evaluate((network, source), "bfloat16", attacks=[attack], threat=tiny, allow_chance=True, batch_size=4)
    assert found.examples["robust"].all()


@pytest.mark.parametrize("stop_at", [5, *(pytest.param(stop_at, marks=pytest.mark.slow) for stop_at in (2, 7))])
def test_resuming(trained, tmp_path, stop_at, monkeypatch):
    expected = evaluate(trained, "bfloat16")
    save, calls = saved_state.Verdicts.save, []

    def interrupted(self, work):
        save(self, work)
        calls.append(None)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    options = {"save_directory": str(tmp_path / "state"), "save_every": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(saved_state.Verdicts, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(trained, "bfloat16", **options)
    found = evaluate(trained, "bfloat16", **options)
    for name, values in expected.examples.items():
        np.testing.assert_array_equal(found.examples[name], values)
    counted = [[a["examples_broken"], a["steps"]] for a in found.results["attacks"]]
    assert counted == [[a["examples_broken"], a["steps"]] for a in expected.results["attacks"]]
    with pytest.raises(ValueError, match="that of other attacks"):
        evaluate(trained, "float32", **options)


def test_functions_that_are_no_searches_run_once_in_float32_and_not_alone():
    attack = functools.partial(pgd, threat=LINF, loss_fn=rk.losses.cross_entropy, num_steps=2, step_size="12/255")
    with pytest.raises(ValueError, match="Expected AutoAttack or MultiTargeted with search_dtype = 'bfloat16'.*: pgd"):
        plan.make([attack], ATTACKS[0], LINF, search_dtype="bfloat16")
    beside = plan.make([attack, *ATTACKS], None, LINF, search_dtype="bfloat16")
    assert [each.name for each in beside.attacks].count("pgd") == 1 and "search_dtype" not in beside.attacks[
        0
    ].parameters
    made = plan.make(ATTACKS, attack, LINF, search_dtype="bfloat16")
    again = plan.make(made.attacks[1:], made.attacks[0], LINF, search_dtype="bfloat16")
    assert [a.parameters for a in again.attacks] == [a.parameters for a in made.attacks]


def test_refusals(trained):
    with pytest.raises(ValueError, match="Expected search_dtype out of float32, bfloat16. Received: 'float16'"):
        evaluate(trained, "float16")
    with pytest.raises(ValueError, match="Expected search_dtype = 'float32' where attacks run individually"):
        evaluate(trained, "bfloat16", individual=True)
    flat = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10)])
    with pytest.raises(ValueError, match="Expected a network that can be searched in bfloat16.* second convolution"):
        evaluate((flat, trained[1]), "bfloat16", allow_chance=True)


def test_from_python(trained):
    network, source = trained
    found = rk.evaluate(
        network,
        (source.images, source.labels),
        norm="Linf",
        epsilon="2/255",
        attacks=ATTACKS[:1],
        search_dtype="bfloat16",
        batch_size=16,
        progress=False,
    )
    assert [each["parameters"]["search_dtype"] for each in found.results["attacks"]] == ["bfloat16", "float32"]


def test_one_function_for_all_searches_of_a_type_compiled_whole_or_not(trained, monkeypatch):
    made = []

    def search_fn(logits_fn, dtype="float32"):
        made.append(dtype)
        return logits_fn

    monkeypatch.setattr(searching, "search_fn", search_fn)
    few = [functools.partial(square, threat=LINF, num_queries=1), functools.partial(apgd, threat=LINF, num_steps=1)]
    flat = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10)])
    for jit_compile, types in ((False, ["bfloat16", "float32"]), (True, ["bfloat16"])):
        evaluate((flat, trained[1]), "bfloat16", attacks=few, jit_compile=jit_compile, allow_chance=True)
        assert made == types
        made.clear()
