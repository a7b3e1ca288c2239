"""The architecture of a Keras model as JSON, read as data: the classes and functions it names, and how large they are.

Keras makes an object of every dictionary with a `class_name`, wherever it lies: a layer, a layer's initialiser, an
argument of a call. Until 3.8 it imported any module for it and called what it found there (CVE-2025-1550), until 3.11
any function of its own (CVE-2025-8747, CVE-2025-9906), and always the code in a Lambda layer where `safe_mode` was off
(CVE-2024-3660); lookups read the file of a vocabulary (CVE-2025-12058), TFSMLayer loads a SavedModel (CVE-2026-1462).
`safe_mode` is therefore not relied upon: what is not named here is refused on every Keras.
"""

import itertools
import json
import math
from collections.abc import Collection, Iterator
from typing import Any

import keras

from robust_keras.foreign_files import printable
from robust_keras.models import keras_classes
from robust_keras.saved_models.safety import keras_names

MOST_BYTES = 1 << 24  # Of the text; a vocabulary may stand in it.
_MOST_DEPTH = 150
_MOST_OBJECTS = 50_000
_MOST_VALUES = 2_000_000
_MOST_AXES = 32
# Of a number that is no axis of a weight. Layers take such sizes for lists and tables that they make of them.
_MOST_SIZE = 1 << 24
_MOST_INPUT = 1 << 28
# Of what is made a list, a table, a loop or so many tensors of, whatever axes the weights have.
_MOST = {
    **dict.fromkeys(("num_oov_indices", "num_thresholds", "num_labels", "indices_or_sections", "num"), 65_536),
    **dict.fromkeys(("fft_length", "frame_length", "output_size"), 65_536),
    **dict.fromkeys(("num_classes", "num_mel_bins", "block_size", "bins", "filter_size", "tile_grid_size"), 4096),
    **dict.fromkeys(("ngrams", "num_chains", "chain_depth", "num_ops", "power_iterations", "ns_steps"), 100),
}
_MOST_TOGETHER = 1 << 20  # Of these; places where a tensor is split are no sizes that add up.
# Under these keys are numbers that are no sizes.
_NO_SIZES = frozenset(
    """
    bias compile_config end inbound_nodes keras_history mask_token mask_value max_value min_value oov_token salt seed
    shared_object_id start step stop value values vocabulary
    """.split()
)
_DTYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)}
_DTYPES |= {"bool", "string", "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64"}
_FUNCTION_MODULES = {"builtins", "keras.activations", "keras.losses", "keras.metrics"}
_ANY_FUNCTION = frozenset().union(*keras_names.FUNCTIONS.values())
_ANY_CLASS = frozenset().union(*keras_names.CLASSES.values())


def check(text: str | bytes, *, axes: Collection[int] = ()) -> dict[str, Any]:
    """Reads an architecture.

    Args:
        text: JSON, as `config.json` of a `.keras` file or `model.to_json()` hold it.
        axes: lengths of the axes of the weights that go with it: larger sizes than usual are believed if they are one.

    Returns:
        What it says.

    Raises:
        ValueError: naming the class, the function or the size that is refused.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"its architecture is {len(text):,} bytes of text, more than {MOST_BYTES:,}")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its architecture is no JSON: {printable(error)}") from error
    if not isinstance(config, dict) or "class_name" not in config:
        raise ValueError("its architecture is that of no model")
    num_objects = together = 0
    for key, value, under in _values(config):
        if isinstance(value, dict) and "class_name" in value:
            num_objects += 1
            if num_objects > _MOST_OBJECTS:
                raise ValueError(f"its architecture has more than {_MOST_OBJECTS:,} objects")
            _check_object(value)
        elif isinstance(value, dict) and {"module", "registered_name", "spec_name"} & value.keys():
            raise ValueError(f"its architecture names a module without a class, {printable(value, most=80)}")
        if isinstance(value, dict):
            words = value.get("vocabulary")
            if not isinstance(words, list | None):
                raise ValueError(f"a vocabulary is read from the file {printable(words)}")
            if "inbound_nodes" in value:
                _check_calls(value["inbound_nodes"])
        if key in ("batch_shape", "batch_input_shape", "input_shape", "shape"):
            _check_shape(key, value)
        if isinstance(value, int) and not isinstance(value, bool):
            most = _MOST.get(key, math.inf if under else _MOST_SIZE)
            if abs(value) > most and not (value in axes and key not in _MOST):
                raise ValueError(f"its architecture has {printable(key)} of {printable(value, most=40)}")
            together += abs(value) if key in _MOST and key != "indices_or_sections" else 0
            if together > _MOST_TOGETHER:
                raise ValueError(f"its architecture has {printable(key)} and its like of more than {_MOST_TOGETHER:,}")
    return config


def _values(config: Any) -> Iterator[tuple[str, Any, bool]]:
    """All values below one, with the key under which they stand, and whether that is or lies below one of no sizes."""
    waiting: list[Iterator[tuple[str, Any, bool]]] = [iter([("", config, False)])]
    num_values = 0
    while waiting:
        if (found := next(waiting[-1], None)) is None:
            waiting.pop()
            continue
        num_values += 1
        if num_values > _MOST_VALUES or len(waiting) > _MOST_DEPTH:
            many = f"nested deeper than {_MOST_DEPTH} times" if num_values <= _MOST_VALUES else "too large"
            raise ValueError(f"its architecture is {many}")
        yield found
        key, value, under = found
        if isinstance(value, dict):
            waiting.append(_items(value, under))
        elif isinstance(value, list):
            waiting.append(zip(itertools.repeat(key), value, itertools.repeat(under)))


def _items(config: dict[str, Any], under: bool) -> Iterator[tuple[str, Any, bool]]:
    return ((key, value, under or key in _NO_SIZES or "steps" in key) for key, value in config.items())


def _check_object(config: dict[str, Any]) -> None:
    name, inner = config["class_name"], config.get("config")
    module, registered = config.get("module"), config.get("registered_name")
    if not all(isinstance(each, str | None) for each in (name, module, registered)) or name is None:
        raise ValueError(f"its architecture names what is no class, {printable(config, most=80)}")
    if name in ("__keras_tensor__", "__tensor__", "__numpy__"):
        if not isinstance(inner, dict) or inner.get("dtype") not in _DTYPES:
            raise ValueError(f"its architecture has {name} of another type than numbers")
    elif name in ("__bytes__", "__ellipsis__", "__slice__"):
        pass
    elif name == "function":
        _check_function(inner, module)
    else:
        _check_class(name, module, registered, is_old="module" not in config)


def _check_function(name: Any, module: str | None) -> None:
    if not isinstance(name, str):
        raise ValueError(f"its architecture names what is no function, {printable(name, most=80)}")
    if _registered(name) is not None:
        return
    known = keras_names.FUNCTIONS.get(module or "", _ANY_FUNCTION)
    if module not in _FUNCTION_MODULES or name not in known:
        raise ValueError(f"it calls the function {printable(module)}.{printable(name)}, which is unknown")


def _check_class(name: str, module: str | None, registered: str | None, *, is_old: bool) -> None:
    """Raises ValueError unless any Keras takes the name for a class that is known here."""
    found = _registered(registered or name)
    if found is not None and name in (
        registered,
        getattr(found, "__name__", None),
        name if registered is None else None,
    ):
        return
    if found is None and registered in (None, name):  # Else Keras 3.5 would look for another in the module.
        if name in keras_names.CLASSES.get(module or "", ()) or (is_old and name in _ANY_CLASS):
            return
    whole = f"{printable(module)}.{printable(name)}" + (
        f" ({printable(registered)})" if registered not in (None, name) else ""
    )
    raise ValueError(f"it has the class {whole}, which is unknown; --import=MODULE imports what registers one")


def _registered(name: str) -> Any:
    return keras.saving.get_registered_object(name, custom_objects=keras_classes.custom_objects())


def _check_calls(calls: Any) -> None:
    """Raises ValueError for a call without a tensor: it would be executed where others are only noted."""
    if not isinstance(calls, list):
        raise ValueError(f"its architecture has calls of no form, {printable(calls, most=80)}")
    for call in calls:
        has_tensor = isinstance(call, list) and bool(call) and all(isinstance(each, list) and each for each in call)
        for _, value, _ in _values(call):
            if isinstance(value, dict):
                has_tensor = has_tensor or value.get("class_name") == "__keras_tensor__"
                if "inbound_nodes" in value:
                    raise ValueError("its architecture has calls inside calls")
        if not has_tensor:
            raise ValueError(f"its architecture calls a layer without a tensor, {printable(call, most=80)}")


def _check_shape(key: str, value: Any) -> None:
    sizes = [each for each in value if isinstance(each, int)] if isinstance(value, list) else []
    is_long = len(sizes) > _MOST_AXES or any(size < -1 for size in sizes)
    if is_long or math.prod(size for size in sizes if size) > _MOST_INPUT:
        raise ValueError(f"its architecture has {key} of {printable(value, most=80)}")
