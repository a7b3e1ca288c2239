import collections
import functools
import io
import itertools
import zlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise, threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.attack import Attack, as_attack
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.evaluation import batching
from robust_keras.evaluation.examples import Examples

NEVER = 250
CLASSES = 6


@pytest.fixture(autouse=True)
def shrinks_at_once(monkeypatch):
    """Batches shrink as soon as they can, however few steps that saves."""
    monkeypatch.setattr(batching, "_WORTH_COMPILING", 0)


def script(falls):
    """uint8 [N, 2, 2, 3]: an example's number, and the run and the step at which it falls, twice."""
    images = np.zeros((len(falls), 2, 2, 3), np.uint8)
    for k, (first, second) in enumerate(falls):
        images[k, 0, 0], images[k, 0, 1, :2] = (k, *first), second
    return images


def scripted(num_steps=25, num_runs=1, name="scripted"):
    """Follows the script: an example is misclassified at one step (or two), neither before it nor after.

    What it proposes tells the run, the step and the number of steps that its own state has seen, beside noise.
    """

    def start(x, labels, clean_logits, seeds, run):
        return {"run": run, "seen": tf.zeros_like(run), "seeds": seeds, "target": tf.argmax(clean_logits, -1)}

    def step(logits_fn, x, labels, state, k):
        numbers = tf.cast(tf.round(x[:, 0] * 255), tf.int32)
        logits_fn(x)
        first = (numbers[:, 0, 1] == state["run"]) & (numbers[:, 0, 2] == k)
        second = (numbers[:, 1, 0] == state["run"]) & (numbers[:, 1, 1] == k)
        told = tf.stack([numbers[:, 0, 0], state["run"], k, state["seen"], labels, tf.cast(state["target"], k.dtype)])
        drawn = noise.uniform(noise.fold_in(state["seeds"], k), (2, 3))
        x_adv = tf.stack([tf.reshape(tf.cast(tf.transpose(told), tf.float32), (-1, 2, 3)), drawn], axis=1)
        return {**state, "seen": state["seen"] + 1}, x_adv, first | second

    return stepwise.Search(name, lambda num_classes: num_runs, num_steps, start, step)


def any_logits(x):
    return tf.tile(x[:, 0, 0, :1], (1, CLASSES))


def make(falls, search=None, batch_size=4, indices=None, logits_fn=any_logits, seed=3, **options):
    """A `Packing` of the examples that fall at (run, step) each, or that never do."""
    falls = [fall if isinstance(fall[0], tuple) else (fall, (NEVER, NEVER)) for fall in falls]
    images = script(falls)
    n = np.arange(len(falls))
    clean_logits = np.eye(CLASSES, dtype=np.float32)[(n + 2) % CLASSES]
    indices = n if indices is None else indices
    examples = Examples(images, (n % 5).astype(np.int32), clean_logits)
    batches = batching.Batches(batch_size, seed, **options)
    return batching.Packing(record(search or scripted()), logits_fn, examples, indices, batches)


def record(search):
    return Attack(search.name, None, {}, None, search)


def run(work):
    """Advances to the end: the image of every example that fell, each fallen once."""
    found = {}
    while (new := work.advance()) is not None:
        indices, images = new
        assert len(indices) == len(images)
        for index, image in zip(indices, images):
            assert index not in found
            found[int(index)] = image
    assert work.advance() is None
    assert work.steps_left == 0
    np.testing.assert_array_equal(np.flatnonzero(work.broken), sorted(found))
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for index, image in other.items():
        np.testing.assert_array_equal(one[index], image, err_msg=str(index))


# Fall at the first step, the last of a look, the first of one, the last of all; stand.
FALLS = [(0, 0), (0, 9), (NEVER, 0), (0, 10), (0, 24), (0, 3), (NEVER, 0), (0, 17), (0, 25), (0, 1), (0, 20)]


@pytest.fixture(scope="module")
def alone():
    """Of `FALLS`, every example alone: it has the only slot."""
    return run(make(FALLS, batch_size=1))


def test_alone(alone):
    assert sorted(alone) == [k for k, (r, step) in enumerate(FALLS) if r == 0 and step < 25]
    for k, image in alone.items():
        step = FALLS[k][1]
        np.testing.assert_array_equal(image[0].reshape(-1), [k, 0, step, step, k % 5, (k + 2) % CLASSES])
    # Noise is of the example and the step.
    noises = np.stack([image[1].reshape(-1) for image in alone.values()])
    assert len(np.unique(noises)) == noises.size


@pytest.mark.parametrize("batch_size", [3, 4, 64])
def test_batch_size_changes_nothing(alone, batch_size):
    assert_same(run(make(FALLS, batch_size=batch_size)), alone)


def test_order_changes_nothing(alone):
    order = np.random.default_rng(0).permutation(len(FALLS))
    assert_same(run(make(FALLS, batch_size=3, indices=order)), alone)


def test_only_the_chosen_examples_are_attacked(alone):
    chosen = [9, 0, 2, 7]
    found = run(make(FALLS, batch_size=3, indices=np.array(chosen)))
    assert_same(found, {k: alone[k] for k in (0, 7, 9)})


def test_seed_and_name_change_the_noise(alone):
    for other in (make(FALLS, batch_size=1, seed=4), make(FALLS, scripted(name="other"), batch_size=1)):
        found = run(other)
        assert found.keys() == alone.keys()
        for k, image in found.items():
            np.testing.assert_array_equal(image[0], alone[k][0])
            assert np.all(image[1] != alone[k][1])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_no_example(batch_size):
    work = make(FALLS, batch_size=batch_size, indices=np.zeros(0, int))
    assert work.steps_left == 0
    assert run(work) == {}
    assert work.steps_taken == 0


def test_one_example(alone):
    for k in (4, 6):
        work = make(FALLS, batch_size=8, indices=np.array([k]))
        assert work.steps_left == 25
        assert_same(run(work), {i: image for i, image in alone.items() if i == k})
        assert work.steps_taken == 25  # Slots that hold copies do not count.


RUNS = [(0, 4), (1, 0), (2, 24), (NEVER, 0), (2, 0), (1, 13), (0, 24)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_several_runs(batch_size):
    found = run(make(RUNS, scripted(num_runs=3), batch_size=batch_size))
    assert sorted(found) == [0, 1, 2, 4, 5, 6]
    for k, image in found.items():
        np.testing.assert_array_equal(image[0].reshape(-1)[:4], [k, *RUNS[k], RUNS[k][1]])


def test_runs_have_noise_of_their_own():
    falls = [((0, 5), (NEVER, 0)), ((1, 5), (NEVER, 0))]
    found = run(make(falls, scripted(num_runs=2), indices=np.array([0, 1])))
    same = run(make([falls[1]] * 2, scripted(num_runs=2)))
    # Example 1 of both falls in its second run; example 0 in its first and in its second.
    np.testing.assert_array_equal(found[1], same[1])
    assert np.all(found[0][1] != same[0][1])


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_an_example_that_falls_in_several_runs(batch_size):
    falls = [((0, 24), (2, 0)), ((1, 2), (2, 2)), ((0, 7), (1, 7)), (NEVER, 0)]
    found = run(make(falls, scripted(num_runs=3), batch_size=batch_size))
    assert sorted(found) == [0, 1, 2]
    for k, image in found.items():
        assert tuple(image[0].reshape(-1)[1:3]) in falls[k]
    # In the same look, the first run's.
    assert tuple(found[2][0].reshape(-1)[1:3]) == (0, 7)
    assert tuple(found[1][0].reshape(-1)[1:3]) == (1, 2)


def test_no_work_for_what_has_fallen():
    # Ten steps between two looks. Slots hold 0 and 1; 0 falls, and 2 takes its place; 1 is through, and 2 is left.
    work = make([(0, 0), (NEVER, 0), (NEVER, 0)], scripted(num_steps=20), batch_size=2)
    assert work.steps_left == 60
    taken, left = [], []
    while work.advance() is not None:
        taken.append(work.steps_taken)
        left.append(work.steps_left)
    assert taken == [20, 40, 50]
    assert left == [30, 10, 0]


def test_steps_of_examples_out_of_step():
    # A look comes after ten steps, or as soon as a run ends. Slots hold 0 and 1 for 10 steps: 0 falls. Then 2 and 1 for
    # 10, and for the last 5 of 1; then 2 alone for its last 10.
    work = make([(0, 3), (NEVER, 0), (NEVER, 0)], scripted(num_steps=25), batch_size=2)
    taken = [0]
    while work.advance() is not None:
        taken.append(work.steps_taken)
    assert taken == [0, 20, 40, 50, 60]


@pytest.mark.parametrize(
    "num_steps, left, expected",
    # FAB, APGD and Square near their ends, and runs that are short or of odd numbers of steps.
    [(100, 10, 10), (101, 11, 11), (101, 1, 1), (5001, 51, 51), (5001, 61, 50), (5, 5, 5), (12, 12, 12), (13, 13, 10)],
)
def test_a_call_takes_all_that_is_left_where_that_is_hardly_more(num_steps, left, expected):
    assert batching.chunk(num_steps, left) == expected


@pytest.mark.parametrize("num_steps, sizes", [(100, {10}), (101, {10, 11}), (201, {10, 11})])
def test_calls_do_not_become_short_as_runs_end(num_steps, sizes):
    random = np.random.default_rng(0)
    falls = [(0, int(step)) for step in random.integers(0, num_steps, 20)] + [(NEVER, 0)] * 5
    work, called = make(falls, scripted(num_steps)), []
    whole = work._advance

    def advance(x, labels, progress, steps):
        called.append(int(steps))
        return whole(x, labels, progress, steps)

    work._advance = advance
    run(work)
    assert set(called) == sizes
    # Nothing is computed that does not count.
    assert work.steps_taken <= 4 * sum(called)


def test_steps_are_few_where_examples_fall_early():
    falls = [(0, k % 7) for k in range(40)] + [(NEVER, 0)]
    work = make(falls, scripted(num_steps=200, num_runs=3), batch_size=8)
    assert work.steps_left == work.num_steps == 41 * 3 * 200
    assert len(run(work)) == 40
    # A look for each that falls; only the last one's other runs begin.
    assert work.steps_taken == 40 * 10 + 3 * 200


def test_other_runs_of_what_has_fallen_are_left_out():
    work = make([(0, 0)] * 4, scripted(num_steps=20, num_runs=5), batch_size=4)
    assert len(run(work)) == 4
    assert work.steps_taken == 40


def test_steps_left_never_rises():
    work = make(FALLS, scripted(num_runs=2), batch_size=3)
    left = [work.steps_left]
    while work.advance() is not None:
        left.append(work.steps_left)
        assert work.steps_taken + left[-1] <= left[0]
    assert left[0] == 2 * 25 * len(FALLS) and left[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(left))


@pytest.mark.parametrize("batch_size, sizes", [(8, [8, 7, 6, 5, 4, 3, 2, 1]), (3, [3, 2, 1]), (1, [1])])
def test_compiled_once_for_each_size(batch_size, sizes):
    traced, called = [], collections.Counter()

    def logits_fn(x):
        traced.append(x.shape[0])
        tf.numpy_function(lambda rows: called.update([len(rows)]), [x], [])
        return any_logits(x)

    # Falls at any step, and in the end one that stands alone.
    falls = [(0, (3 * k) % 22) for k in range(20)] + [(0, 0)] * 10 + [(NEVER, 0)]
    run(make(falls, batch_size=batch_size, logits_fn=logits_fn))
    assert traced == sorted(set(traced), reverse=True) and set(traced) <= set(sizes)
    assert traced[0] == batch_size and traced[-1] == 1
    assert called.keys() == set(traced) and called[batch_size] >= 30


@pytest.mark.parametrize("num_left, size", [(1, 1), (7, 7), (8, 8), (9, 5), (20, 7), (24, 8)])
def test_rounds_of_one_size(num_left, size):
    traced = []

    def logits_fn(x):
        traced.append(x.shape[0])
        return any_logits(x)

    work = make([(NEVER, 0)] * num_left, batch_size=8, logits_fn=logits_fn)
    run(work)
    assert traced[0] == size and work.steps_taken == work.num_steps


def copied(arrays):
    """What a file holds of them."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        return dict(saved)


def assert_resumable(make_work):
    """Saved before every call of `advance`, another object goes on to the same end from each of the points."""
    work, saved, news = make_work(), [], []
    saved.append(copied(work.save()))
    while (new := work.advance()) is not None:
        news.append(new)
        saved.append(copied(work.save()))
    assert len(saved) > 3
    other = make_work()
    for k, arrays in enumerate(saved):
        other.restore(arrays)
        for indices, images in news[k:]:
            again = other.advance()
            np.testing.assert_array_equal(again[0], indices)
            np.testing.assert_array_equal(again[1], images)
        assert other.advance() is None
        assert other.steps_taken == work.steps_taken
        if hasattr(work, "broken"):
            np.testing.assert_array_equal(other.broken, work.broken)
    return saved, news


@pytest.mark.parametrize("batch_size", [1, 3])
def test_resumed_at_every_point(batch_size):
    falls = [(0, 0), (NEVER, 0), (0, 24), (1, 3), ((0, 24), (1, 0)), (NEVER, 0)]
    saved, _ = assert_resumable(functools.partial(make, falls, scripted(num_runs=2), batch_size=batch_size))
    if batch_size == 3:  # Also where the batch had shrunk.
        assert [len(arrays["slots"]) for arrays in saved] == [0] + [3] * 7 + [1] * 2


def test_resumed_on_another_number_of_replicas(mirrored):
    falls = [(0, 0), (NEVER, 0), (0, 24), (1, 3), ((0, 24), (1, 0)), (NEVER, 0)]
    make_work = functools.partial(make, falls, scripted(num_runs=2), batch_size=3)
    work, saved = make_work(), []
    saved.append(copied(work.save()))
    while work.advance() is not None:
        saved.append(copied(work.save()))
    expected = run(make_work())
    for arrays in (saved[1], saved[len(saved) // 2], saved[-2]):
        with mirrored.scope():
            other = make(falls, scripted(num_runs=2), batch_size=4)
            other.restore(arrays)
            assert len(other._slots) % 2 == 0
            before = set(np.flatnonzero(other.broken))
            found = {}
            while (new := other.advance()) is not None:
                found |= dict(zip(new[0].tolist(), new[1]))
        assert before | found.keys() == expected.keys()
        for index, image in found.items():
            np.testing.assert_array_equal(image, expected[index])


@pytest.fixture(scope="module")
def tiny(make_tiny_model):
    """A tiny model, images and its predictions on them."""
    network = functools.partial(make_tiny_model(), training=False)
    images = np.random.default_rng(5).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
    logits = network(images / np.float32(255)).numpy()
    return network, images, logits


def apgd_work(tiny, batch_size=4, **settings):
    network, images, logits = tiny
    settings = {"num_steps": 12, "num_restarts": 2, **settings}
    attack = functools.partial(apgd, threat=threats.threat(norm="Linf", epsilon="8/255"), **settings)
    examples = Examples(images, logits.argmax(-1).astype(np.int32), logits)
    batches = batching.Batches(batch_size)
    return batching.Packing(as_attack(attack), network, examples, np.arange(len(images)), batches)


def test_apgd_resumed_at_every_point(tiny):
    saved, news = assert_resumable(functools.partial(apgd_work, tiny))
    fallen = np.concatenate([indices for indices, _ in news])
    assert 2 <= len(fallen) <= 8
    assert {len(arrays["slots"]) for arrays in saved} > {0, 4}


def test_apgd_in_slots_is_apgd(tiny):
    network, images, logits = tiny
    found = run(apgd_work(tiny, num_restarts=1))
    x, labels, seeds = batching.inputs(Examples(images, logits.argmax(-1), logits), np.arange(len(images)), 0)
    # The same noise as in the slots: of the attack's name.
    seeds = noise.fold_in(seeds, zlib.crc32(b"apgd-ce") & 0x7FFFFFFF)
    threat = threats.threat(norm="Linf", epsilon="8/255")
    x_adv = apgd(network, x, labels, seeds=seeds, threat=threat, num_steps=12).numpy()
    moved = np.flatnonzero((x_adv != x.numpy()).any((1, 2, 3)))
    np.testing.assert_array_equal(moved, sorted(found))
    for k, image in found.items():
        np.testing.assert_allclose(image, x_adv[k], rtol=0, atol=1e-5)


# Attacks that are plain functions.


def batchwise(num_examples=7, batch_size=3, indices=None, calls=None):
    images = script([((0, 0), (0, 0))] * num_examples)

    def attack(logits_fn, x, labels, *, seeds):
        if calls is not None:
            calls.append(x.shape[0])
        return x + noise.uniform(seeds, (2, 2, 3)) + tf.cast(labels, tf.float32)[:, None, None, None]

    labels = np.arange(num_examples, dtype=np.int32)
    examples = Examples(images, labels, np.zeros((num_examples, CLASSES), np.float32))
    indices = np.arange(num_examples) if indices is None else indices
    return batching.Batchwise(as_attack(attack), None, examples, indices, batching.Batches(batch_size))


def all_of(work):
    found = {}
    while (new := work.advance()) is not None:
        found |= dict(zip(new[0].tolist(), new[1]))
    assert work.steps_left == 0
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_batchwise(batch_size):
    calls = []
    work = batchwise(batch_size=batch_size, calls=calls)
    assert (work.steps_taken, work.steps_left) == (0, 7)
    found = all_of(work)
    assert sorted(found) == list(range(7)) and work.steps_taken == 7
    assert calls == [batch_size]
    assert_same(found, all_of(batchwise(batch_size=2, indices=np.arange(7)[::-1])))
    assert len(np.unique([image[1] for image in found.values()])) > 30


def test_batchwise_without_examples():
    calls = []
    assert all_of(batchwise(indices=np.zeros(0, int), calls=calls)) == {} and calls == []


def test_batchwise_resumed_at_every_point():
    assert_resumable(functools.partial(batchwise, num_examples=8))


def test_attacks_as_functions_take_the_search_with_its_settings():
    search = multi_targeted.search(threat=threats.threat(norm="L2", epsilon=1.0), num_steps=3, num_restarts=2)
    assert (search.name, search.num_steps) == ("multi-targeted", 4)
    assert [search.num_runs(num_classes) for num_classes in (2, 4, 100)] == [2, 6, 18]
