"""`.keras` files of strangers: known classes are loaded, and whatever else is in there is refused before Keras sees it."""

import copy
import functools
import io
import json
import pathlib
import resource
import struct
import tempfile
import zipfile

import h5py
import keras
import numpy as np
import pytest

from robust_keras import storage, zip_files
from robust_keras.models import wide_resnet
from robust_keras.saved_models import export, load, opening, safety, warm_start
from robust_keras.saved_models.safety import declared_weights, hdf5_file, keras_config, keras_file

pytestmark = pytest.mark.oldest
L = keras.layers
_SHAPE = (8, 8, 3)


def members_of(network):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "some.keras"
        network.save(path)
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


@functools.cache
def good():
    """What is in a good file, by name."""
    inputs = keras.Input((4,))
    return members_of(keras.Model(inputs, L.Dense(3, name="logits")(L.Dense(5, activation="relu", name="d")(inputs))))


def packed(members, **options):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", **options) as archive:
            for name, content in members.items() if isinstance(members, dict) else members:
                archive.writestr(name, content)
        return file.getvalue()


# Architectures.


def named(name, module="keras.layers", config=None, **more):
    """What Keras makes an object of."""
    config = {"name": "d", **(config or {})} if config is None or isinstance(config, dict) else config
    return {"module": module, "class_name": name, "config": config, "registered_name": None, **more}


def function(module, name):
    return named("function", module, name, registered_name=name)


def layer(*args, **kwargs):
    """The model with another second layer."""

    def edit(config):
        config["config"]["layers"][1] |= named(*args, **kwargs)

    return edit


def argument(key, value):
    """The model with another argument of its second layer."""

    def edit(config):
        config["config"]["layers"][1]["config"][key] = value

    return edit


def call(*args, **kwargs):
    def edit(config):
        config["config"]["layers"][1]["inbound_nodes"] = [{"args": list(args), "kwargs": kwargs}]

    return edit


def wrapped(inner):
    return layer("TimeDistributed", config={"layer": inner})


def compiled(**how):
    return lambda config: config["config"]["layers"][1].update(compile_config=how)


def nested(depth):
    return functools.reduce(lambda inner, _: {"a": inner}, range(depth), {})


def without_module(config):
    layer("Lambda", config={"function": ["4wEAAAA=", None, None], "function_type": "lambda"})(config)
    del config["config"]["layers"][1]["module"]


CODE = {"class_name": "__lambda__", "config": {"value": ["4wEAAAA=", None, None]}}
ARCHITECTURES = {
    "code in a layer": (layer("Lambda", config={"function": CODE}), "class keras.layers.Lambda"),
    "code in an old form": (without_module, "class None.Lambda"),
    "code in a wrapper": (wrapped(named("Lambda")), "class keras.layers.Lambda"),
    "code as an argument": (argument("kernel_initializer", CODE), "class None.__lambda__"),
    "any function, CVE-2025-1550": (argument("activation", function("os", "system")), r"function os\.system"),
    "any class": (layer("Popen", "subprocess", {"args": "id"}), r"class subprocess\.Popen"),
    "an initialiser of any module": (argument("kernel_initializer", named("run", "pty")), r"class pty\.run"),
    "import_module": (argument("activation", function("importlib", "import_module")), "function importlib.import"),
    "eval": (argument("activation", function("builtins", "eval")), "function builtins.eval"),
    "get_file, CVE-2025-8747": (argument("activation", function("keras.utils", "get_file")), "keras.utils.get_file"),
    "unsafe, CVE-2025-9906": (
        layer("Activation", config={"activation": function("keras.config", "enable_unsafe_deserialization")}),
        "function keras.config.enable_unsafe",
    ),
    "another model": (argument("activation", function("keras.models", "load_model")), "keras.models.load_model"),
    "a builder of objects": (argument("activation", function("builtins", "deserialize")), "builtins.deserialize"),
    "another name for Lambda": (
        layer("AugMix", registered_name="Lambda"),
        r"class keras.layers.AugMix \(Lambda\)",
    ),
    "a known name for Lambda": (
        layer("Lambda", registered_name="robust_keras>BatchNorm"),
        r"class keras.layers.Lambda \(robust_keras>BatchNorm\)",
    ),
    "a name that steers": (layer("\x1b[2J\n", "\u202eo"), r"class \\u202eo\.\\x1b\[2J\\n"),
    "a SavedModel, CVE-2026-1462": (layer("TFSMLayer", config={"filepath": "/tmp/x"}), "keras.layers.TFSMLayer"),
    "a pickle of PyTorch": (layer("TorchModuleWrapper", config={"module": "gASV"}), "TorchModuleWrapper"),
    "code for JAX": (layer("JaxLayer", config={"call_fn": CODE}), "keras.layers.JaxLayer|__lambda__"),
    "code for Flax": (layer("FlaxLayer", config={"module": CODE}), "keras.layers.FlaxLayer|__lambda__"),
    "a vocabulary's file, CVE-2025-12058": (layer("StringLookup", config={"vocabulary": "/etc/passwd"}), "/etc/passwd"),
    "a vocabulary's address": (layer("IntegerLookup", config={"vocabulary": "gs://a/b"}), "file gs://a/b"),
    "a vocabulary inside": (wrapped(named("TextVectorization", config={"vocabulary": "a.txt"})), "file a.txt"),
    "what calls functions": (layer("Map", "keras.src.ops.core"), "class keras.src.ops.core.Map"),
    "a function as a class": (layer("clone_model", "keras.src.models.cloning"), "class keras.src.models.cloning"),
    "an unknown quantiser": (argument("quantization_config", named("GPTQConfig", "keras.quantizers")), "GPTQConfig"),
    "a type of TensorFlow": (
        argument(
            "x",
            {"class_name": "__typespec__", "spec_name": "eval", "module": "os", "registered_name": None, "config": []},
        ),
        "class os.__typespec__",
    ),
    "text of a gigabyte each": (
        argument("x", {"class_name": "__numpy__", "config": {"value": ["a"], "dtype": "S1000000000"}}),
        "__numpy__ of another type",
    ),
    "a handle": (
        argument("x", {"class_name": "__tensor__", "config": {"value": 0, "dtype": "resource"}}),
        "__tensor__",
    ),
    "a class that is none": (argument("x", {"class_name": ["Dense"], "config": {}}), "names what is no class"),
    "a module alone": (argument("x", {"module": "os", "config": {}}), "a module without a class"),
    "a loss of any module": (compiled(loss=function("os", "system")), r"function os\.system"),
    "a metric of 10 ** 18 numbers": (
        compiled(metrics=[named("MeanIoU", "keras.metrics", {"num_classes": 10**9})]),
        "num_classes of 1000000000",
    ),
    "thresholds without end": (
        compiled(metrics=[named("AUC", "keras.metrics", {"num_thresholds": 10**9})]),
        "num_thresholds of 1000000000",
    ),
    "a layer of 10 ** 9 units": (argument("units", 10**9), "units of 1000000000"),
    "padding without end": (layer("ZeroPadding2D", config={"padding": [[1, 10**12], [1, 1]]}), "padding of 10000"),
    "loops over words without end": (layer("TextVectorization", config={"ngrams": 1 << 25}), "ngrams of 33554432"),
    "parts without end": (
        layer("Split", "keras.src.ops.numpy", {"indices_or_sections": 1 << 24}),
        "indices_or_sections of 16777216",
    ),
    "tensors without end": (layer("Unstack", "keras.src.ops.core", {"num": 1 << 24}), "num of 16777216"),
    "chains without end": (layer("AugMix", config={"num_chains": 1 << 20}), "num_chains of 1048576"),
    "many thresholds": (
        compiled(metrics=[named("AUC", "keras.metrics", {"num_thresholds": 1 << 16})] * 17),
        "num_thresholds and its like of more than 1,048,576",
    ),
    "words without end": (layer("StringLookup", config={"num_oov_indices": 10**8}), "num_oov_indices of 100000000"),
    "an image of 10 ** 12 pixels": (
        layer("InputLayer", config={"batch_shape": [None, 10**6, 10**6]}),
        "batch_shape of .None, 1000000, 1000000",
    ),
    "a shape of 10,000 axes": (layer("InputLayer", config={"batch_shape": [9] * 10_000}), "batch_shape of"),
    "a call at once": (call([1.0], 10**6), "calls a layer without a tensor"),
    "calls inside calls": (call({"inbound_nodes": [{}]}), "calls inside calls"),
    "calls of no form": (lambda config: config["config"]["layers"][1].update(inbound_nodes={"a": 1}), "of no form"),
    "nested 500 times": (argument("x", nested(500)), "nested deeper than 150"),
}


def with_architecture(edit):
    config = json.loads(good()["config.json"])
    edit(config)
    return packed({**good(), "config.json": json.dumps(config)})


# Weights.


def with_weights(write, **options):
    with io.BytesIO() as stream:
        with h5py.File(stream, "w", **options) as file:
            file["layers/dense/vars/0"] = np.zeros((4, 5), np.float32)
            write(file)
        return packed({**good(), "model.weights.h5": stream.getvalue()})


def edited(write, *changes):
    """A good file of weights with some of its bytes replaced: (before, what is replaced by what)."""

    def make():
        with io.BytesIO() as stream:
            with h5py.File(stream, "w") as file:
                write(file)
            content = stream.getvalue()
        for old, new in changes:
            assert old in content
            content = content.replace(old, new)
        return packed({**good(), "model.weights.h5": content})

    return make


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset("v", layout)


def loop(file):
    file["layers/again"] = file["layers"]


def named_type(file):
    file["t"] = np.dtype("f4")
    file.create_dataset("x", (3,), file["t"])


def two_names(file):
    file["other"] = file["layers/dense/vars/0"]


def two(file):
    file["a"], file["b"] = np.full(1000, 7.0), np.full(1000, 7.0)


def text(file):
    file.attrs["name"] = "some text"


PASSWD = h5py.ExternalLink("/etc/passwd", "/")
WEIGHTS = {
    "a link to another file": (lambda file: file.__setitem__("x", PASSWD), "/ has links to elsewhere"),
    "a soft link": (lambda file: file.__setitem__("x", h5py.SoftLink("/layers")), "/ has a link, x"),
    "data of other files": (
        lambda file: file.create_dataset("x", (9,), "u1", external="/etc/passwd"),
        "/x has data in",
    ),
    "data of other data sets": (virtual, "/v"),
    "packed": (lambda file: file.create_dataset("x", (10**9,), "f4", compression="gzip"), "/x has filters"),
    "chunks that are not there": (
        lambda file: file.create_dataset("x", (10**9,), "f4", chunks=(10**6,)),
        "/x is packed",
    ),
    "a shape without data": (lambda file: file.create_dataset("x", (10**12,), "f4"), r"/x of \(1000000000000,\) is 4,"),
    "references": (lambda file: file.create_dataset("x", (3,), h5py.ref_dtype), "/x is of neither numbers nor text"),
    "lists": (lambda file: file.create_dataset("x", (3,), h5py.vlen_dtype("f4")), "/x is of neither"),
    "texts elsewhere": (
        lambda file: file.create_dataset("x", data=["a"], dtype=h5py.string_dtype()),
        "/x is of neither",
    ),
    "fields": (lambda file: file.create_dataset("x", (3,), [("a", "f4")]), "/x is of neither numbers nor text"),
    "a group in itself": (loop, "another name of something else, or a part of itself"),
    "one array by two names": (two_names, "is another name"),
    "a type by name": (named_type, "shared type|neither a group"),
    "a reference as an attribute": (lambda file: file.attrs.create("x", file.ref, dtype=h5py.ref_dtype), "of neither"),
    "a tower of groups": (lambda file: file.create_group("/".join("a" * 100)), "deeper than 64 groups"),
}
NEW_FORM = {"libver": "latest"}
BYTES = {
    "weights of a new form": lambda: with_weights(lambda file: None, **NEW_FORM),
    "no weights": lambda: packed({**good(), "model.weights.h5": b"nothing"}),
    "weights cut off": lambda: packed({**good(), "model.weights.h5": good()["model.weights.h5"][:-1000]}),
    "a tree that is itself": edited(two, (b"TREE\0\0", b"TREE\0\1")),
    "no table": edited(two, (b"SNOD", b"SNOB")),
    "names that are not there": edited(two, (b"HEAP\0", b"HEAD\0")),
    "text that is not there": edited(text, (b"GCOL\1", b"GCOL\2")),
    # Of no length: the library would look at it for ever.
    "free space of no length": edited(text, (struct.pack("<QQ", 0, 4096 - 48), bytes(16))),
}


# Archives.


def with_members(**members):
    return lambda: packed({**good(), **{name.replace("__", "/"): content for name, content in members.items()}})


def linked():
    info = zipfile.ZipInfo("assets/a.txt")
    info.external_attr = 0o120777 << 16
    return packed([*good().items(), (info, "/etc/passwd")])


def legacy():
    with io.BytesIO() as stream:
        with h5py.File(stream, "w") as file:
            file.attrs["model_config"] = json.dumps(named("Lambda"))
        return stream.getvalue()


def lacking(name):
    return lambda: packed({each: content for each, content in good().items() if each != name})


ARCHIVES = {
    "a program": (with_members(**{"run.py": "import os"}), "run.py, which is no part of a model"),
    "a file above": (lambda: packed({**good(), "../a.txt": ""}), r"has \.\./a.txt"),
    "an asset above": (lambda: packed({**good(), "assets/../../a.txt": ""}), r"has assets/\.\./"),
    "an asset anywhere": (lambda: packed({**good(), "/etc/passwd": ""}), "has /etc/passwd"),
    "an asset with other slashes": (lambda: packed({**good(), "assets/..\\a": ""}), r"has assets/\.\."),
    "an asset that is a link": (linked, "assets/a.txt is a link"),
    "a file and a folder": (lambda: packed({**good(), "assets/a": "", "assets/a/b": ""}), "both a file and a folder"),
    "pickled weights": (lambda: packed({**good(), "model.weights.npz": b""}), "has model.weights.npz"),
    "no architecture": (lacking("config.json"), "has no config.json"),
    "no weights": (lacking("model.weights.h5"), "has no model.weights.h5"),
    "notes without end": (with_members(**{"metadata.json": bytes(1 << 20)}), "metadata.json is 1,048,576 bytes"),
    "an architecture without end": (with_members(**{"config.json": bytes(1 << 25)}), "config.json is 33,554,432 bytes"),
    "another architecture": (
        lambda: packed([*good().items(), ("config.json", "{}")]),
        "several files named config.json",
    ),
    "no JSON": (with_members(**{"config.json": "[" * 100_000}), "architecture is no JSON"),
    "no model": (with_members(**{"config.json": "[]"}), "architecture is that of no model"),
    "a digit without end": (with_members(**{"config.json": "9" * 10_000}), "architecture is no JSON"),
    "an old file": (legacy, "no whole zip archive"),
    "a pickle": (lambda: b"\x80\x04cos\nsystem\n.", "no whole zip archive"),
}
HOSTILE = {
    **{name: (functools.partial(with_architecture, edit), match) for name, (edit, match) in ARCHITECTURES.items()},
    **{f"weights: {name}": (functools.partial(with_weights, write), match) for name, (write, match) in WEIGHTS.items()},
    **{f"bytes: {name}": (make, "HDF5|no names|no t|a text|texts|another name") for name, make in BYTES.items()},
    **{f"archive: {name}": given for name, given in ARCHIVES.items()},
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_refuses(tmp_path, kind):
    make, match = HOSTILE[kind]
    path = tmp_path / "some.keras"
    path.write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match) as caught:
        keras_file.check(str(path))
    message = str(caught.value)
    assert message.startswith("Expected a .keras file of known classes") and f"Received: {path}: " in message
    assert message.isprintable() and len(message) < 700
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


@pytest.mark.parametrize("limit, match", [("_MOST_OBJECTS", "more than 1,000 objects"), ("_MOST_VALUES", "too large")])
def test_refuses_too_many(monkeypatch, limit, match):
    config = json.loads(good()["config.json"])
    argument("x", [named("Zeros", "keras.initializers")] * 1000)(config)
    keras_config.check(json.dumps(config))
    monkeypatch.setattr(keras_config, limit, 1000)
    with pytest.raises(ValueError, match=match):
        keras_config.check(json.dumps(config))


def test_what_lies_in_a_good_file():
    """The hostile files differ from a good one by what makes them so."""
    assert len(HOSTILE) >= 40
    with_architecture(lambda config: None)
    found = {each.name: each.shape for each in hdf5_file.datasets(good()["model.weights.h5"])}
    assert sorted(found.values()) == [(3,), (4, 5), (5,), (5, 3)]


@pytest.mark.parametrize(
    "open_file",
    [
        load.load_logits_fn,
        load.load_weights,
        lambda path: warm_start.load_network(path=path, num_classes=3),
        lambda path: load.as_logits_fn(path),
    ],
)
def test_every_way_to_open_a_file_looks_first(tmp_path, open_file):
    path = tmp_path / "some.keras"
    path.write_bytes(with_architecture(layer("Lambda", config={"function": CODE})))
    with pytest.raises(ValueError, match=r"class keras.layers.Lambda.*--trust_model"):
        open_file(str(path))


def test_trusted_files_are_loaded(tmp_path, capsys):
    network = keras.Sequential([keras.Input((4,)), L.Lambda(lambda x: 2 * x, output_shape=(4,)), L.Dense(3)])
    network.save(tmp_path / "some.keras")
    with pytest.raises(ValueError, match="Lambda"):
        opening.load_keras(str(tmp_path / "some.keras"))
    with safety.trusting():
        found = opening.load_keras(str(tmp_path / "some.keras"))
    np.testing.assert_allclose(found(np.ones((2, 4))), network(np.ones((2, 4))), rtol=1e-6)
    assert "Lambda" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["some.h5", "absent.keras", "folder.keras", "hf://some/model"])
def test_other_paths_are_refused(tmp_path, name):
    """A folder of a `.keras` file's content would be loaded too, and a name of a model hub would be fetched."""
    (tmp_path / "some.h5").write_bytes(legacy())
    (tmp_path / "folder.keras").mkdir()
    for member, content in good().items():
        (tmp_path / "folder.keras" / member).write_bytes(content)
    path = name if "://" in name else str(tmp_path / name)
    with pytest.raises(ValueError, match="Expected a .keras file. Received: ") as caught:
        warm_start.load_network(path=path, num_classes=3)
    assert "\n" not in str(caught.value)


def with_empty_weights(config, length):
    """A file with an array of no bytes, of an axis of any length."""
    with io.BytesIO(good()["model.weights.h5"]) as stream:
        with h5py.File(stream, "a") as file:
            file.create_dataset("zz", (length, 0), "f4")
        weights = stream.getvalue()
    return packed({**good(), "config.json": json.dumps(config), "model.weights.h5": weights})


def test_arrays_of_no_bytes_make_no_size_believed(tmp_path):
    config, length = json.loads(good()["config.json"]), 1 << 33
    path = tmp_path / "some.keras"
    path.write_bytes(with_empty_weights(config, length))
    keras_file.check(str(path))
    argument("units", length)(config)
    path.write_bytes(with_empty_weights(config, length))
    with pytest.raises(ValueError, match="units of 8589934592"):
        keras_file.check(str(path))


def test_tensors_are_counted(tmp_path, monkeypatch):
    """As many as an axis is long are made where a layer says no number of them."""
    inputs = keras.Input((64,))
    network = keras.Model(inputs, keras.ops.unstack(inputs, axis=1)[0])
    network.save(tmp_path / "some.keras")
    found = opening.load_keras(str(tmp_path / "some.keras"))
    assert found.output_shape == (None,)
    monkeypatch.setattr(declared_weights, "_MOST_TENSORS", 50)
    with pytest.raises(ValueError, match="Expected a .keras file.*at most 50 tensors"):
        opening.load_keras(str(tmp_path / "some.keras"))


def test_what_takes_all_memory_is_one_line(tmp_path, monkeypatch):
    def run_out(*args, **kwargs):
        raise MemoryError

    path = tmp_path / "some.keras"
    path.write_bytes(packed(good()))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"some.keras \(MemoryError\)"):
        patch.setattr(keras.models, "load_model", run_out)
        opening.load_keras(str(path))
    monkeypatch.setattr(hdf5_file, "datasets", run_out)
    with pytest.raises(ValueError, match="some.keras: MemoryError"):
        keras_file.check(str(path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_large_weights_are_not_read(tmp_path, compression):
    """Where they are stored they take no memory, and their place is that which the archive's reader finds."""
    path = tmp_path / "some.zip"
    path.write_bytes(packed({"a": b"before", "b": bytes(range(256)) * 4, "c": b"after"}, compression=compression))
    with open(path, "rb") as file, zip_files.open_archive(file) as archive:
        found = zip_files.content(archive, "b", file)
        assert isinstance(found, memoryview) == (compression == zipfile.ZIP_STORED)
        assert bytes(found) == archive.read("b")


def wide(config):
    for each, size in zip(config["config"]["layers"][1:], (1 << 20, 1 << 20), strict=True):
        each["config"]["units"] = size
        each.pop("build_config", None)


def with_a_metric(config):
    layer("Sequential", "keras", {"layers": []})(config)
    del config["config"]["layers"][1]["build_config"]
    compiled(optimizer="sgd", loss="mse", metrics=[named("MeanIoU", "keras.metrics", {"num_classes": 4096})])(config)


def test_weights_that_the_file_does_not_hold(tmp_path):
    """2 ** 40 of them would be drawn before Keras looked for them."""
    path = tmp_path / "some.keras"
    path.write_bytes(with_architecture(wide))
    keras_file.check(str(path))
    before, add_weight = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, L.Layer.add_weight
    with pytest.raises(ValueError, match=r"Received: .*d with one of shape \(1048576,\)"):
        opening.load_keras(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert L.Layer.add_weight is add_weight


def test_constants_that_a_layer_makes(tmp_path):
    """A mean that is given is repeated over the axes: of a few bytes, 2 ** 28 numbers."""
    config = json.loads(good()["config.json"])
    layers = config["config"]["layers"]
    shape = [None, 1 << 14, 1 << 14]
    layers[0]["config"]["batch_shape"] = shape
    layers[1] |= named("Normalization", config={"axis": [1, 2], "mean": 0.0, "variance": 1.0})
    layers[1]["build_config"] = {"input_shape": shape}
    layers[1]["inbound_nodes"][0]["args"][0]["config"]["shape"] = shape
    path = tmp_path / "some.keras"
    path.write_bytes(packed({**good(), "config.json": json.dumps(config)}))
    keras_file.check(str(path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"d with one of shape \(16384, 16384\)"):
        opening.load_keras(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_metrics_of_a_layer_count_too(tmp_path):
    path = tmp_path / "some.keras"
    path.write_bytes(with_architecture(with_a_metric))
    with pytest.raises(ValueError, match=r"one of shape \(4096, 4096\)"):
        opening.load_keras(str(path))


@pytest.mark.parametrize(
    "edit, match", [(layer("Lambda"), "keras.layers.Lambda"), (wide, "d with one of shape .1048576,")]
)
def test_an_architecture_of_a_run(tmp_path, edit, match):
    config = json.loads(good()["config.json"])
    edit(config)
    arrays = {"logits/bias": np.zeros(3, np.float32)}
    info = {"description": {"architecture": json.dumps(config)}}
    storage.write(tmp_path / "best", 1, arrays, info)
    with pytest.raises(ValueError, match=f"Expected a network of classes that are registered.*{match}"):
        export.network_of_run(str(tmp_path))


# Files that are none of a stranger's.


@keras.saving.register_keras_serializable("keras_file_test")
class Twice(keras.Model):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.rest = inner, {"bias": L.Dense(3)}

    def call(self, x):
        return self.rest["bias"](self.inner(self.inner(x)))

    def get_config(self):
        return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "inner": keras.saving.deserialize_keras_object(config["inner"])})


@keras.saving.register_keras_serializable("keras_file_test")
def bent(x):
    return keras.ops.tanh(x)


def stack(*layers, shape=_SHAPE):
    return keras.Sequential([keras.Input(shape), *layers, L.Flatten(), L.Dense(3)])


def texts():
    inputs = keras.Input((), dtype="string")
    by_list = L.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")(inputs)
    adapted = L.TextVectorization(output_sequence_length=3)
    adapted.adapt(np.array(["some words", "more words"]))
    found = L.GlobalAveragePooling1D()(L.Embedding(9, 4)(adapted(inputs)))
    return keras.Model(inputs, L.Dense(3)(L.Concatenate()([by_list, found])))


def attention():
    inputs = keras.Input((6,), dtype="int32")
    x = L.Embedding(30, 8, mask_zero=True)(inputs)
    x = L.LayerNormalization()(x + L.MultiHeadAttention(2, 4)(x, x))
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling1D()(x)))


def operations():
    inputs = keras.Input(_SHAPE)
    x = keras.ops.concatenate([keras.ops.relu(inputs) * 2.0, -inputs], -1)[:, 1:-1, ::2, ...]
    return keras.Model(inputs, L.Dense(3)(L.GlobalMaxPooling2D()(keras.ops.clip(x, -1, 1))))


def inside():
    block = stack(L.Conv2D(4, 3, kernel_regularizer="l2"), L.BatchNormalization(), L.PReLU())
    block.compile("adam", "mse", metrics=["mae", keras.metrics.AUC()])
    inputs = keras.Input(_SHAPE)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10**9)
    network = keras.Model(
        inputs, L.Dense(3, activation="softmax")(block(keras.Model(inputs, L.ReLU(6.0)(inputs))(inputs)))
    )
    network.compile(keras.optimizers.AdamW(schedule), keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
    return network


def quantised():
    network = stack(L.Dense(8, activation="gelu"))
    network.quantize("int8")
    return network


def registered():
    network = Twice(L.Dense(4, activation=bent))
    network(np.zeros((2, 4), np.float32))
    return network


def normalised():
    layer = L.Normalization()
    layer.adapt(np.random.RandomState(0).rand(4, *_SHAPE))
    return stack(layer, L.Rescaling(2.0), L.RandomFlip(), L.Resizing(6, 6), L.CenterCrop(4, 4))


OURS = {"num_classes": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3, "input_shape": _SHAPE}
BENIGN = {
    "ours": lambda: wide_resnet.wide_resnet(depth=10, width=1, **OURS),
    "preprocessing": normalised,
    "categories": lambda: stack(L.CategoryEncoding(5, output_mode="multi_hot"), shape=(4,)),
    "texts": texts,
    "recurrent": lambda: stack(
        L.Bidirectional(L.LSTM(4, return_sequences=True)), L.TimeDistributed(L.Dense(3)), L.GRU(4), shape=(6, 3)
    ),
    "attention": attention,
    "operations": operations,
    "inside one another, compiled": inside,
    "quantised": quantised,
    "registered": registered,
    "mixed precision": lambda: stack(L.Conv2D(4, 3, dtype="mixed_bfloat16"), L.Dense(4, dtype="bfloat16")),
}


@pytest.mark.parametrize("kind", BENIGN)
def test_loads(tmp_path, kind):
    network = BENIGN[kind]()
    path = tmp_path / "some.keras"
    network.save(path)
    keras_file.check(str(path))
    found = opening.load_keras(str(path))
    assert [weight.shape for weight in found.weights] == [weight.shape for weight in network.weights]
    for ours, theirs in zip(found.weights, network.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs))


def test_sizes_that_weights_have(tmp_path):
    """A vocabulary of more than 2 ** 24 is believed where the file has its embedding."""
    config = json.loads(good()["config.json"])
    argument("units", (1 << 24) + 1)(config)
    members = {**good(), "config.json": json.dumps(config)}
    path = tmp_path / "some.keras"
    path.write_bytes(packed(members))
    with pytest.raises(ValueError, match="units of 16777217"):
        keras_file.check(str(path))
    with io.BytesIO() as stream:
        with h5py.File(stream, "w") as file:
            file["x"] = np.zeros((1 << 24) + 1, np.int8)
        path.write_bytes(packed({**copy.copy(members), "model.weights.h5": stream.getvalue()}))
    keras_file.check(str(path))
