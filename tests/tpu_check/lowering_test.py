"""Programs as XLA takes them: what a TPU would not take is found, and memory and operations are those of a hand."""

import keras
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.models import wide_resnet
from robust_keras.study import costs
from robust_keras.tpu_check import liveness, lowering, stablehlo


def ones(*shape, dtype=tf.float32):
    return tf.ones(shape, dtype)


def boolean_mask(x):
    return tf.reduce_sum(tf.boolean_mask(x, x[:, 0] > 0.5))


def gradient_of_mask(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum((x + boolean_mask(x)) ** 2)
    return tape.gradient(y, x)


def mask_in_loop(x):
    return tf.while_loop(lambda k, y: k < 3, lambda k, y: (k + 1, y + boolean_mask(x)), (0, 0.0))[1]


def unsized_list(x):
    array = tf.TensorArray(tf.float32, size=0, dynamic_size=True)
    for k in range(3):
        array = array.write(k, x * k)
    return array.stack()


def unsized_list_in_loop(x):
    array = tf.TensorArray(tf.float32, size=0, dynamic_size=True)
    return tf.while_loop(lambda k, a: k < 3, lambda k, a: (k + 1, a.write(k, x)), (0, array))[1].stack()


def endless_gradient(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.while_loop(lambda y: tf.reduce_sum(y) < 9.0, lambda y: (y * x,), (x,))[0]
    return tape.gradient(y, x)


def number_in(x):
    return tf.cast(tf.reduce_sum(x[0]), tf.int32)


BAD = {
    "a slice": (lambda x: x[: number_in(x)], "depends on values: StridedSlice "),
    "a shape": (lambda x: tf.zeros((number_in(x), 3)), "not compiled: Fill zeros"),
    "Python's if": (lambda x: x if tf.reduce_sum(x) > 0 else -x, "Python that asks for a tensor's value: "),
    "boolean_mask": (boolean_mask, "depends on values: Where boolean_mask/Where"),
    "a mask's gradient": (gradient_of_mask, "depends on values: Where boolean_mask/Where"),
    "a mask in a loop": (mask_in_loop, "depends on values: Where while/boolean_mask/Where"),
    "one-argument where": (lambda x: tf.where(x > 0), "depends on values: Where Where"),
    "unique": (lambda x: tf.unique(x[0])[0], "depends on values: Unique Unique"),
    "py_function": (
        lambda x: tf.py_function(lambda v: v, [x], tf.float32),
        "no kernel of XLA: EagerPyFunc EagerPyFunc",
    ),
    "numpy_function": (lambda x: tf.numpy_function(lambda v: v, [x], tf.float32), "no kernel of XLA: PyFunc PyFunc"),
    "stateless shuffle": (
        lambda x: tf.random.experimental.stateless_shuffle(x, [1, 2]),
        "no kernel of XLA: StatelessShuffle stateless_shuffle/StatelessShuffle",
    ),
    "print": (lambda x: (tf.print(x), x)[1], "no kernel of XLA: StringFormat StringFormat"),
    "shuffle": (lambda x: tf.random.shuffle(x), "without a seed: RandomShuffle RandomShuffle"),
    "uniform": (lambda x: x + tf.random.uniform(x.shape), "without a seed: RandomUniform random_uniform/RandomUniform"),
    "double precision": (lambda x: tf.reduce_sum(tf.cast(x, tf.float64)), "double precision: Cast Cast"),
    "64-bit integers": (lambda x: tf.argmax(x[:, :9], axis=0), "64-bit integers: ArgMax ArgMax"),
    "unsized list": (unsized_list, "dynamic_size=True: TensorListSetItem TensorArrayV2Write/TensorListSetItem"),
    "unsized list in a loop": (unsized_list_in_loop, "dynamic_size=True: TensorListSetItem while/"),
    "unbounded gradient": (endless_gradient, "not compiled: "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_tpu_would_not_take_is_found_by_name(name):
    function, expected = BAD[name]
    lines = lowering.problems(lowering.lower(function, ones(16, 16)))
    assert any(expected in line for line in lines), lines
    assert len(lines) <= 3  # Where it begins, not all that follows from it.
    assert all("\n" not in line for line in lines)


def test_a_problem_has_its_line_of_python():
    lines = lowering.problems(lowering.lower(boolean_mask, ones(4, 4)))
    number = boolean_mask.__code__.co_firstlineno + 1
    assert f"({__file__}:{number})" in lines[0]
    lines = lowering.problems(lowering.lower(BAD["py_function"][0], ones(4, 4)))
    assert f"({__file__}:" in lines[0]


def test_an_argument_of_64_bits_is_found():
    lines = lowering.problems(lowering.lower(lambda x: tf.cast(x, tf.int32), ones(16, dtype=tf.int64)))
    assert lines == ["64-bit integers: argument 0, 16xi64"]
    assert lowering.problems(lowering.lower(lambda x: x + 1, ones(dtype=tf.int64))) == []


def test_versions_that_make_no_stablehlo_are_refused(monkeypatch):
    monkeypatch.setattr(tf, "__version__", "2.18.1")
    with pytest.raises(ValueError, match="TensorFlow 2.19 or newer.*Received: 2.18.1"):
        lowering.lower(lambda x: x, ones(2))


def test_nothing_is_found_in_what_compiles():
    step = tf.Variable(tf.zeros((), tf.int64))

    def function(x):
        step.assign_add(1)
        array = tf.TensorArray(tf.float32, size=3)
        for k in range(3):
            array = array.write(k, x * k)
        drawn = tf.random.stateless_uniform((4, 16), [1, 2], alg="philox")
        best = tf.math.top_k(tf.sort(x), 3).values
        branch = tf.cond(tf.reduce_sum(x) > 0, lambda: tf.sin(x), lambda: x)
        whole = tf.concat([x[:, :0], x], axis=1)
        return (
            array.stack(),
            whole,
            drawn,
            best,
            branch,
            tf.argmax(x, -1, output_type=tf.int32),
            tf.where(x > 0, x, 0.0),
        )

    assert lowering.problems(lowering.lower(function, ones(4, 16))) == []


def test_a_mask_whose_result_is_not_used_is_no_problem():
    assert lowering.problems(lowering.lower(lambda x: (boolean_mask(x), x)[1], ones(4, 4))) == []


def peak(function, *args, padded=False):
    return liveness.peak_memory(lowering.lower(function, *args).module, padded=padded)


def test_memory_of_a_layer_by_hand():
    weights = tf.Variable(tf.ones((8, 16)))
    memory = peak(lambda x: tf.reduce_sum(tf.nn.relu(x @ weights)), ones(4, 8))
    # Arguments, the product over which the activation is written, and the sum.
    assert memory.arguments == 4 * (4 * 8 + 8 * 16)
    assert memory.peak == memory.arguments + 4 * (4 * 16 + 1)
    assert memory.at.name == "stablehlo.reduce"
    padded = peak(lambda x: tf.reduce_sum(tf.nn.relu(x @ weights)), ones(4, 8), padded=True)
    assert (padded.arguments, padded.peak) == (2 * 4096, 3 * 4096 + 512)


def test_what_the_gradient_needs_stays():
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.sin(tf.sin(tf.sin(x)))
        return tape.gradient(y, x)

    kib = peak(function, ones(256)).peak / 1024
    assert kib == 1 + 2  # x and two sines; cosines and products are written over these, and the third is not needed.


def test_memory_of_a_loop_by_hand():
    def function(x, n):
        return tf.while_loop(lambda k, y: k < n, lambda k, y: (k + 1, tf.sin(y) * x), (0, x))[1]

    memory = peak(function, ones(1024), tf.constant(5))
    assert memory.arguments == 4096 + 4
    # y, which is written over, and two counters: the loop's own and k. What the loop leaves alone is shared.
    assert memory.peak == memory.arguments + 4096 + 8


def test_the_body_of_a_loop_counts_once_and_at_its_worst():
    def function(x, weights):
        def body(k, y):
            return k + 1, tf.reduce_sum(y[:, None] @ weights, axis=1)

        return tf.while_loop(lambda k, y: k < 5, body, (0, tf.sin(x)))[1]

    memory = peak(function, ones(1024), ones(1, 10))
    assert memory.arguments == 4096 + 40
    # The sine becomes y, from which the product is made; two counters.
    assert memory.peak == memory.arguments + 4096 * (1 + 10) + 8
    assert memory.at.name == "stablehlo.dot"


@pytest.mark.parametrize("is_read_later", [False, True])
def test_an_updated_variable_lies_where_it_lay(is_read_later):
    weights = tf.Variable(tf.ones((1024,)))

    def function(x):
        before = weights.read_value()
        weights.assign_sub(x * 0.5)
        return tf.reduce_sum(before * weights[0] if is_read_later else x * weights[0])

    memory = peak(function, ones(1024))
    assert memory.arguments == 2 * 4096
    # x / 2 and a product, one after the other; and the new weights for as long as the old ones are read.
    assert memory.peak - memory.arguments == pytest.approx(4096 * (2 if is_read_later else 1), abs=16)


def test_branches_take_what_the_larger_one_takes():
    def function(x):
        return tf.cond(x[0] > 0, lambda: tf.reduce_sum(tf.sin(tf.reverse(x, [0]))), lambda: x[1])

    memory = peak(function, ones(1024))
    assert memory.peak - memory.arguments == pytest.approx(4096, abs=32)


def test_tiles():
    assert liveness.tiled_bytes(stablehlo.Tensor((), "f32")) == 512
    assert liveness.tiled_bytes(stablehlo.Tensor((160,), "f32")) == 1024
    # Features in lanes, the rest along sublanes.
    assert liveness.tiled_bytes(stablehlo.Tensor((4, 32, 32, 160), "f32")) == 4 * 32 * 32 * 256 * 4
    assert liveness.tiled_bytes(stablehlo.Tensor((128, 32, 32, 3), "f32")) == 128 * 32 * 32 * 3 * 4
    assert liveness.tiled_bytes(stablehlo.Tensor((3, 128), "bf16")) == 16 * 128 * 2
    with pytest.raises(ValueError, match=r"\?x4xf32"):
        liveness.packed_bytes(stablehlo.Tensor((None, 4), "f32"))


def flops(function, *args):
    return lowering.flops(lowering.lower(function, *args).module)


def test_operations_by_hand():
    x, kernel = ones(2, 8, 8, 3), ones(3, 3, 3, 5)
    assert flops(lambda x, w: x @ w, ones(4, 8), ones(8, 16)) == (2 * 4 * 8 * 16, True)
    assert flops(lambda x, w: tf.einsum("bij,bkj->bik", x, w), ones(7, 4, 8), ones(7, 5, 8)) == (
        2 * 7 * 4 * 5 * 8,
        True,
    )
    forward = 2 * 2 * 64 * 9 * 3 * 5
    assert flops(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"), x, kernel) == (forward, True)
    assert flops(lambda x, w: tf.nn.conv2d(x, w, 2, "SAME"), x, kernel) == (forward / 4, True)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_convolution_cost_as_much_as_it(stride):
    def function(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = tf.nn.conv2d(x, w, stride, "SAME")
            loss = tf.reduce_sum(y * y)
        return tape.gradient(loss, [x, w])

    forward = 2 * 2 * 64 * 9 * 3 * 5 / stride**2
    assert flops(function, ones(2, 8, 8, 3), ones(3, 3, 3, 5))[0] == pytest.approx(3 * forward, rel=1e-9)


def test_a_loop_counts_as_often_as_it_runs():
    def function(x, w, n, **options):
        return tf.while_loop(lambda k, y: k < n, lambda k, y: (k + 1, y @ w), (2, x), **options)[1]

    once = 2 * 4 * 8 * 8
    x, w = ones(4, 8), ones(8, 8)
    assert flops(lambda x, w: function(x, w, 7), x, w) == (5 * once, True)
    assert flops(lambda x, w: function(x, w, 7, maximum_iterations=3), x, w) == (3 * once, True)
    assert flops(function, x, w, tf.constant(7)) == (once, False)


def test_an_attack_on_a_network_costs_what_its_architecture_says():
    network = wide_resnet.wide_resnet(depth=10, width=1, num_classes=10, input_shape=(8, 8, 3))
    linf = threats.threat(norm="Linf", epsilon="8/255")

    def attack(x, labels, seeds):
        options = {"threat": linf, "loss_fn": losses.margin, "num_steps": 3, "step_size": 0.1, "seeds": seeds}
        return pgd(lambda images: network(images, training=False), x, labels, **options)

    program = lowering.lower(attack, ones(4, 8, 8, 3), ones(4, dtype=tf.int32), ones(4, 2, dtype=tf.int32))
    assert lowering.problems(program) == []
    assert lowering.flops(program.module) == (4 * 3 * 2 * costs.forward_flops(10, 1, size=8), True)
    weights = sum(int(tf.size(weight.value)) for weight in network.weights)
    # What is not read is not an argument: of the statistics, how often they were updated.
    unread = sum(isinstance(layer, keras.layers.Layer) and hasattr(layer, "num_updates") for layer in network.layers)
    images = 4 * (4 * 8 * 8 * 3 + 4 + 4 * 2)
    memory = liveness.peak_memory(program.module)
    assert memory.arguments == pytest.approx(4 * (weights - unread) + images, abs=64)
