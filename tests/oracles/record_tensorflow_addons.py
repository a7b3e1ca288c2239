"""Records what the optimizers of tensorflow-addons 0.23 compute.

TensorFlow Addons is archived and cannot be imported next to Keras 3, so the tests compare with
the numbers in ``tensorflow_addons.npz``, which this script wrote in an environment of its own
(Python 3.11). From this folder::

    python3.11 -m venv tfa
    tfa/bin/pip install tensorflow-cpu==2.15.1 tensorflow-addons==0.23.0
    tfa/bin/python record_tensorflow_addons.py tensorflow_addons.npz

``check`` recomputes every recorded array in NumPy from the formulas below, and the script raises,
writing nothing, where one is further than 1e-6 from what TensorFlow Addons computed.

**MovingAverage** around ``SGD(lr)``. ``apply_gradients`` number t, counting from t = 0::

    decay_t = min(tau, (1 + t) / (10 + t))    dynamic_decay=True
    decay_t = tau                             dynamic_decay=False
    variable <- variable - lr * gradient_t
    average  <- average - (1 - decay_t) * (average - variable)

- t at the first step is 0, so its dynamic decay is min(tau, 0.1). The source reads ``iterations``
  in ``_prepare_local``, and OptimizerV2 adds one to it only after the variables are updated.
- The average starts from the variable's value before the first step (``_create_slots`` copies it),
  with no zero-debiasing.
- The average takes the variable as it is after that step's update.
- (1 + t) / (10 + t) reaches tau = 0.5 at t = 8, and would reach tau = 0.9 only at t = 80: in the 30
  recorded steps the dynamic decay with tau = 0.9 is (1 + t) / (10 + t) throughout, 30/39 at the end.

**SGDW**. The weights decay first, by ``weight_decay`` itself (not times ``lr``), every variable::

    variable <- variable - weight_decay * variable
    momentum = 0:       variable <- variable - lr * gradient_t
    nesterov momentum:  velocity <- momentum * velocity - lr * gradient_t          (from zero)
                        variable <- variable + (momentum * velocity - lr * gradient_t)

Keys, all float32, NAME being ``matrix`` ([3, 4]) or ``vector`` ([5]); [steps] is 30 for
``moving_average`` and 20 for ``sgdw``, and row t of an array holds what step t used or left behind::

    {moving_average,sgdw}/initial/NAME                                    before the first step
    {moving_average,sgdw}/gradient/NAME                                   [steps, ...]
    {moving_average,sgdw}/learning_rate                                   []
    moving_average/{dynamic,fixed}/tau_{0.9,0.5}/decay                    [steps]
    moving_average/{dynamic,fixed}/tau_{0.9,0.5}/{variable,average}/NAME  [steps, ...]
    sgdw/CASE/{momentum,weight_decay}                                     []
    sgdw/CASE/variable/NAME                                               [steps, ...]

CASE is one of ``plain_decay`` (momentum 0, decay 5e-5), ``nesterov`` (momentum 0.9, decay 0) and
``nesterov_decay`` (momentum 0.9, decay 5e-5).
"""

import sys

import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

LEARNING_RATE = 0.1
SHAPES = {"matrix": (3, 4), "vector": (5,)}
MOVING_AVERAGES = [
    (kind, tau, f"moving_average/{kind}/tau_{tau}") for kind in ("dynamic", "fixed") for tau in (0.9, 0.5)
]
SGDW_CASES = {
    "sgdw/plain_decay": {"momentum": 0.0, "nesterov": False, "weight_decay": 5e-5},
    "sgdw/nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
    "sgdw/nesterov_decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-5},
}


def draw(group, steps, seed):
    """The initial variables and the gradients of a group of cases."""
    rng = np.random.default_rng(seed)
    drawn = {f"{group}/learning_rate": np.float32(LEARNING_RATE)}
    for name, shape in SHAPES.items():
        drawn[f"{group}/initial/{name}"] = rng.standard_normal(shape, np.float32)
        drawn[f"{group}/gradient/{name}"] = rng.standard_normal((steps, *shape), np.float32)
    return drawn


def train(optimizer, drawn, group, case):
    """What TensorFlow Addons computes: the state after each step of ``optimizer``."""
    averaging = isinstance(optimizer, tfa.optimizers.MovingAverage)
    variables = {name: tf.Variable(drawn[f"{group}/initial/{name}"], name=name) for name in SHAPES}
    rows = {}

    def record(key, value):
        rows.setdefault(f"{case}/{key}", []).append(value.numpy())

    for t in range(len(drawn[f"{group}/gradient/vector"])):
        if averaging:
            record("decay", optimizer._get_decay(optimizer.iterations))
        gradients = [(tf.constant(drawn[f"{group}/gradient/{name}"][t]), v) for name, v in variables.items()]
        optimizer.apply_gradients(gradients)
        for name, variable in variables.items():
            record(f"variable/{name}", variable)
            if averaging:
                record(f"average/{name}", optimizer.get_slot(variable, "average"))
    return {key: np.stack(values) for key, values in rows.items()}


def record():
    """Every array of the file, as TensorFlow Addons computes it."""
    arrays = {**draw("moving_average", 30, seed=0), **draw("sgdw", 20, seed=1)}
    for kind, tau, case in MOVING_AVERAGES:
        optimizer = tfa.optimizers.MovingAverage(
            tf.keras.optimizers.legacy.SGD(LEARNING_RATE), average_decay=tau, dynamic_decay=kind == "dynamic"
        )
        arrays |= train(optimizer, arrays, "moving_average", case)
    for case, options in SGDW_CASES.items():
        optimizer = tfa.optimizers.SGDW(learning_rate=LEARNING_RATE, **options)
        arrays |= train(optimizer, arrays, "sgdw", case)
        arrays |= {f"{case}/{key}": np.float32(options[key]) for key in ("momentum", "weight_decay")}
    return arrays


def moving_average(initial, gradients, tau, dynamic):
    """The formula of MovingAverage: the decays, variables and averages after each step."""
    decays, variables, averages = [], [], []
    variable = average = initial
    for t, gradient in enumerate(gradients):
        decay = np.float32(min(tau, (1 + t) / (10 + t)) if dynamic else tau)
        variable = variable - np.float32(LEARNING_RATE) * gradient
        average = average - (1 - decay) * (average - variable)
        decays.append(decay), variables.append(variable), averages.append(average)
    return {"decay": decays, "variable": variables, "average": averages}


def sgdw(initial, gradients, momentum, nesterov, weight_decay):
    """The formula of SGDW: the variables after each step."""
    assert nesterov == (momentum > 0)
    lr, momentum, weight_decay = np.float32([LEARNING_RATE, momentum, weight_decay])
    variables = []
    variable, velocity = initial, np.zeros_like(initial)
    for gradient in gradients:
        variable = variable - weight_decay * variable
        velocity = momentum * velocity - lr * gradient
        variable = variable + (momentum * velocity - lr * gradient)  # with momentum 0: - lr * gradient
        variables.append(variable)
    return {"variable": variables}


def check(arrays):
    """Raises where a recorded array is not what its formula gives."""
    checked = {key for key in arrays if key.count("/") == 1 or "/initial/" in key or "/gradient/" in key}
    checked |= {f"{case}/{key}" for case in SGDW_CASES for key in ("momentum", "weight_decay")}

    def compare(case, name, computed):
        for key, expected in computed.items():
            key = f"{case}/{key}" if key == "decay" else f"{case}/{key}/{name}"
            np.testing.assert_allclose(arrays[key], expected, rtol=0, atol=1e-6, err_msg=key)
            checked.add(key)

    for name in SHAPES:
        inputs = arrays[f"moving_average/initial/{name}"], arrays[f"moving_average/gradient/{name}"]
        for kind, tau, case in MOVING_AVERAGES:
            compare(case, name, moving_average(*inputs, tau, kind == "dynamic"))
        inputs = arrays[f"sgdw/initial/{name}"], arrays[f"sgdw/gradient/{name}"]
        for case, options in SGDW_CASES.items():
            compare(case, name, sgdw(*inputs, **options))
    for key, array in arrays.items():
        assert key in checked and array.dtype == np.float32, key


if __name__ == "__main__":
    (path,) = sys.argv[1:]
    recorded = record()
    check(recorded)
    np.savez_compressed(path, **recorded)
