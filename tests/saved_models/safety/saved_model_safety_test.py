"""SavedModels of strangers: what would do more than compute is refused before anything loads it, by name."""

import ast
import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.commands import inspect_model
from robust_keras.saved_models import load, safety
from robust_keras.saved_models.safety import bundle, inspection, operations, paths, saved_model, wire, xla_modules
from tests.saved_models.safety import hostile_models

pytestmark = pytest.mark.oldest

ROOT = pathlib.Path(__file__).parents[3]
# Operations of keras.applications (MobileNetV2, EfficientNetB0, ResNet50V2, ConvNeXt), recurrent and attention layers,
# augmentation, quantisation, tables, texts, pictures, loops, random numbers and jax2tf, as TensorFlow 2.21 exports them.
BENIGN = """
Abs Add AddV2 AdjustHue All AsString Assert AssignAddVariableOp AssignSubVariableOp AssignVariableOp BatchMatMulV2
BatchMatMulV3 BiasAdd Bitcast Cast CheckNumerics ComplexAbs ConcatV2 Const Conv2D Conv2DBackpropInput Cos Cumsum
DecodeImage DenseBincount DepthwiseConv2dNative DisableCopyOnRead Einsum EnsureShape Equal Erfc ExpandDims FFT2D
FakeQuantWithMinMaxArgs Fill FloorDiv FloorMod FusedBatchNormV3 GatherNd GatherV2 Greater HashTableV2 Identity IdentityN
If ImageProjectiveTransformV3 Less LessEqual LogicalAnd LookupTableExportV2 LookupTableFindV2 LookupTableImportV2 MatMul
MatrixDeterminant MatrixDiagV3 Max MaxPool Maximum Mean Minimum Mul MutableDenseHashTableV2 MutableHashTableV2 Neg NoOp
NotEqual Pack Pad PartitionedCall Placeholder PlaceholderWithDefault Pow Prod QuantizeAndDequantizeV4 RaggedBincount
RaggedTensorToTensor RandomStandardNormal RandomUniform Range ReadVariableOp RealDiv Relu Relu6 Reshape ResizeBicubic
ResizeBilinear ResizeNearestNeighbor ReverseV2 RngReadAndSkip Round Rsqrt ScalarSummary ScaleAndTranslate Select SelectV2
Shape Sigmoid Sin Size Softmax SparseTensorDenseMatMul Split Sqrt Square SquaredDifference Squeeze
StatefulPartitionedCall StatelessCase StatelessIf StatelessRandomGetKeyCounter StatelessRandomNormalV2
StatelessRandomUniformV2 StatelessWhile StaticRegexFullMatch StaticRegexReplace StopGradient StridedSlice StringJoin
StringLength StringLower StringSplitV2 Sub Sum Svd Tan Tanh TensorListFromTensor TensorListGetItem TensorListReserve
TensorListSetItem TensorListStack Tile Transpose VarHandleOp VarIsInitializedOp Where While XlaCallModule ZerosLike
"""


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return hostile_models.save(tmp_path_factory.mktemp("honest") / "model")


@pytest.fixture
def copy(honest, tmp_path):
    return shutil.copytree(honest, tmp_path / "copy")


def refusal(path):
    with pytest.raises(ValueError) as caught:
        load.load_logits_fn(path)
    said = str(caught.value)
    assert said.isprintable() and said.startswith("Expected ") and "--trust_model loads it all the same" in said
    return said


def changed(path, change):
    """Changes the program of a model."""
    file = pathlib.Path(path) / "saved_model.pb"
    program = hostile_models.message("SavedModel").FromString(file.read_bytes())
    change(program.meta_graphs[0])
    file.write_bytes(program.SerializeToString())
    return path


@pytest.mark.parametrize("change, refused", hostile_models.CHANGES, ids=lambda each: getattr(each, "__name__", ""))
def test_what_a_stranger_may_write_is_refused(copy, change, refused):
    assert re.search(refused, refusal(changed(copy, change)))


def test_what_is_refused_does_harm_to_others_and_none_here(tmp_path):
    ran = tmp_path / "ran"

    def function(x):
        with tf.control_dependencies([tf.raw_ops.WriteFile(filename=str(ran), contents="")]):
            return {"logits": tf.reshape(x, (-1, 48))[:, :3]}

    path = hostile_models.save(tmp_path / "model", tf.Module(), function)
    assert "Received: WriteFile in function" in refusal(path)
    assert inspection.describe(path)["refused"][0].startswith("WriteFile in function")
    assert not ran.exists()
    with safety.trusting():
        load.load_logits_fn(path)(tf.zeros((1, 4, 4, 3)))
    assert ran.exists()


def test_what_is_let_through_is_said(copy, capfd):
    changed(copy, hostile_models.of_the_main_graph)
    with safety.trusting():
        load.load_logits_fn(copy)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Let through as trusted: ")]
    assert len(told) == 1 and "ReadFile in the main graph" in told[0]
    assert "ReadFile in the main graph" in refusal(copy)


# Files.


def test_programs_that_stand_twice(copy):
    file = copy / "saved_model.pb"
    program = file.read_bytes()
    file.write_bytes(program + program)
    assert "saved_model.pb: 2 graphs" in refusal(copy)
    model = hostile_models.message("SavedModel").FromString(program)
    more = hostile_models.message("MetaGraphDef")()
    more.graph_def.node.add(name="evil", op="ReadFile")
    appended = model.meta_graphs[0].SerializeToString() + more.SerializeToString()
    size = bytes([len(appended) & 127 | 128, len(appended) >> 7 & 127 | 128, len(appended) >> 14])
    file.write_bytes(b"\x08\x01\x12" + size + appended)
    assert "saved_model.pb: MetaGraphDef.graph_def twice" in refusal(copy)


@pytest.mark.parametrize("name", ["saved_model.pbtxt", "saved_model.cpb"])
def test_a_second_program(copy, name):
    (copy / name).write_text("meta_graphs {}")
    assert f"Received: {name} in " in refusal(copy)


@pytest.mark.parametrize(
    "name", ["saved_model.pb", "fingerprint.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
def test_links_and_pipes(copy, name):
    file = copy / name
    target = shutil.move(file, copy.parent / "outside")
    file.symlink_to(target)
    assert f"Received: {name}, a symbolic link; `cp -rL` makes a copy" in refusal(copy)
    if hasattr(os, "mkfifo"):
        file.unlink()
        os.mkfifo(file)
        assert f"Received: {name}, a pipe" in refusal(copy)
        with safety.trusting(), pytest.raises(ValueError, match="a pipe"):  # It would never answer.
            load.load_logits_fn(copy)


def test_sizes_are_bounded_before_anything_is_parsed(copy):
    empty_nodes = b"\x0a\x00" * 2**20
    with pytest.raises(ValueError, match="more than 65,536 bytes of anything but values"):
        wire.parse(empty_nodes, "tensorflow.GraphDef", most=2**16)
    graph = hostile_models.message("GraphDef")()
    graph.node.add(name="big", op="Const").attr["value"].tensor.tensor_content = bytes(2**20)
    assert wire.parse(graph.SerializeToString(), "tensorflow.GraphDef", most=2**16) == graph
    deep = b""
    for _ in range(120):  # An attribute that is a function with an attribute.
        deep = b"\x52" + _varint(len(deep)) + deep
    (copy / "saved_model.pb").write_bytes(deep)
    assert "saved_model.pb: " in refusal(copy)
    with open(copy / "fingerprint.pb", "ab") as file:
        file.truncate(2**17)
    assert "Expected a file of at most 65,536 bytes" in refusal(copy)


def _varint(number):
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


@pytest.mark.parametrize(
    "old, new, refused",
    [
        (b"\x08\x30\x12\x02\x08\x03", b"\x08\x7f\x12\x02\x08\x7f", r"of shape \[127, 127\] in 576 bytes"),
        (b"\xdb\x47\x75\x24", b"\0\0\0\0", "no table"),
    ],
    ids=["shape", "magic"],
)
def test_an_index_of_variables_that_promises_more_than_there_is(copy, old, new, refused):
    file = copy / "variables" / "variables.index"
    content = file.read_bytes()
    old, new = (old, new) if old in content else (old[::-1], new)
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    assert re.search(refused, refusal(copy))


def variable(*, shape=(3,), more=b""):
    """An entry of an index, of float32 in the first file."""
    dimensions = b"".join(b"\x12" + bytes([2]) + b"\x08" + bytes([size]) for size in shape)
    return b"\x08\x01\x12" + bytes([len(dimensions)]) + dimensions + b"\x28" + bytes([4 * int(np.prod(shape))]) + more


def index(entries, *, restarts=None, last=b"z", header=b"\x08\x01"):
    """An index of variables, whose entries are (bytes shared with the key before, key, value)."""
    body, starts = b"", []
    for shared, key, value in [(0, b"", header), *entries]:
        starts += [len(body)] if not shared else []
        body += bytes([shared, len(key), len(value)]) + key + value
    blocks, handles = b"", []
    for content, found in ((body, starts if restarts is None else restarts), (b"", [0])):
        block = content + b"".join(each.to_bytes(4, "little") for each in [*found, len(found)])
        handles.append(_varint(len(blocks)) + _varint(len(block)))
        blocks += block + bytes(5)
    of_blocks = bytes([0, len(last), len(handles[0])]) + last + handles[0] + bytes(4) + b"\x01\0\0\0"
    handles.append(_varint(len(blocks)) + _varint(len(of_blocks)))
    footer = handles[1] + handles[2]
    return blocks + of_blocks + bytes(5) + footer + bytes(40 - len(footer)) + bytes.fromhex("57fb808b247547db")


def test_an_index_of_variables_is_read():
    read, num_shards = bundle.parse(index([(0, b"ab", variable()), (1, b"c", variable(shape=(2, 2)))]))
    assert [(each.name, each.shape, each.size) for each in read] == [("ab", (3,), 12), ("ac", (2, 2), 16)]
    assert num_shards == 1


@pytest.mark.parametrize(
    "content, refused",
    [
        (index([(0, b"a", variable())], restarts=[5]), "no order"),
        (index([(0, b"a", variable())], restarts=[]), "no entries"),
        (index([(0, b"a", variable())], restarts=[0, 7]), "starts inside another"),
        (index([(0, b"a", variable())], restarts=[0, 0]), "no order"),
        (index([(0, b"ab", variable()), (1, b"c", variable())], restarts=[0, 5, 5 + 5 + 12]), "starts inside|outside"),
        (index([(0, b"b", variable()), (0, b"a", variable())]), "do not rise"),
        (index([(0, b"a", variable()), (0, b"a", variable())]), "do not rise"),
        (index([(0, b"b", variable())], last=b"a"), "do not rise"),
        (index([(0, b"a", variable(more=b"\x7a\x01a"))]), "field 15"),
        (index([(0, b"a", variable(more=b"\x28\x01"))]), "field 5 of kind 0 that is unknown, or stands twice"),
        (index([(0, b"a", variable(more=b"\x12\x04\x12\x02\x08\x09"))]), "field 2 of kind 2"),
        (index([], header=b"\x08\x01\x20\x01"), "field 4"),
    ],
)
def test_an_index_of_variables_that_may_be_read_in_two_ways(content, refused):
    with pytest.raises(ValueError, match=refused):
        bundle.parse(content)


def test_variables_of_the_first_format(copy):
    shutil.move(copy / "variables" / "variables.index", copy / "variables" / "variables")
    assert "Expected variables/variables.index beside variables. Received: variables/variables" in refusal(copy)


def test_small_messages_that_are_many(copy, monkeypatch):
    functions = b"\x4a\x00" * 1000  # Calls of functions without a name, in a list.
    text = b"\x12" + _varint(len(functions) + 3) + b"\x0a" + _varint(len(functions)) + functions
    node = hostile_models.message("NodeDef").FromString(b"\x2a" + _varint(len(text) + 3) + b"\x0a\x01a" + text)
    graph = hostile_models.message("GraphDef")(node=[node] * 20).SerializeToString()
    wire.parse(graph, "tensorflow.GraphDef", most=2**22)
    with pytest.raises(ValueError, match="more than 2,097,152 bytes of anything but values"):
        wire.parse(graph, "tensorflow.GraphDef", most=2**21)
    monkeypatch.setitem(saved_model._FURTHER, "debug/saved_model_debug_info.pb", ("tensorflow.GraphDebugInfo", 2**18))
    (copy / "debug").mkdir()
    (copy / "debug" / "saved_model_debug_info.pb").write_bytes(b"\x0a\x00" * (2**13 + 1))
    assert "saved_model_debug_info.pb: more than 262,144 bytes" in refusal(copy)


def test_a_large_vocabulary_is_a_value():
    tensor = hostile_models.message("TensorProto")(dtype=hostile_models.STRING, string_val=[b"word"] * 2**16)
    assert wire.parse(tensor.SerializeToString(), "tensorflow.TensorProto", most=2**22) == tensor


def test_variables_without_their_file(copy):
    (copy / "variables" / "variables.data-00000-of-00001").unlink()
    assert "no variables/variables.data-00000-of-00001" in refusal(copy)


# Benign models.


def test_operations_of_benign_models_are_on_the_list():
    assert set(BENIGN.split()) - operations.COMPUTE == set()
    known = {name for name in dir(tf.raw_ops) if not name.startswith("_")}
    assert not [
        name for name in known & operations.COMPUTE if re.search("File|PyFunc|Dataset|Queue|Rpc|Send|Recv", name)
    ]


def table_of_a_file(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("cat\ndog\n")
    of_lines = (tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER)
    module = tf.Module()
    module.table = tf.lookup.StaticHashTable(tf.lookup.TextFileInitializer(str(words), *of_lines), -1)
    module.other = tf.lookup.experimental.MutableHashTable(tf.string, tf.float32, 0.0)

    def function(x):
        shift = tf.cast(module.table.lookup(tf.constant(["dog"])), tf.float32) + module.other.lookup(tf.constant(["a"]))
        return {"logits": tf.reshape(x, (-1, 48))[:, :3] + shift}

    return module, function


def loops(tmp_path):
    def function(x):
        y = tf.reshape(x, (-1, 48))[:, :3]
        y = tf.while_loop(lambda k, y: k < 3, lambda k, y: (k + 1, y * 2.0), (0, y))[1]
        y = tf.cond(tf.reduce_sum(y) > 0.0, lambda: y, lambda: -y)
        return {"logits": tf.map_fn(lambda row: row + 1.0, y)}

    return tf.Module(), function


def custom_gradient(tmp_path):
    @tf.custom_gradient
    def rounded(x):
        return tf.round(x * 255.0) / 255.0, lambda gradient: gradient

    return tf.Module(), lambda x: {"logits": tf.reshape(rounded(x), (-1, 48))[:, :3]}


@pytest.mark.parametrize("make", [table_of_a_file, loops, custom_gradient], ids=lambda make: make.__name__)
def test_benign_models_are_loaded(tmp_path, make):
    path = hostile_models.save(tmp_path / "model", *make(tmp_path))
    assert inspection.describe(path)["refused"] == []
    assert load.load_logits_fn(path)(tf.ones((2, 4, 4, 3))).shape == (2, 3)


def test_a_table_of_a_file_that_is_no_asset(tmp_path):
    path = changed(hostile_models.save(tmp_path / "model", *table_of_a_file(tmp_path)), _another_capture)
    assert "InitializeTableFromTextFileV2 of a variable in function" in refusal(path)


def _another_capture(meta_graph):
    for each in meta_graph.object_graph_def.nodes:
        if each.WhichOneof("kind") == "asset":
            each.variable.dtype = hostile_models.STRING


def test_models_of_tensorflow_1(tmp_path):
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, (None, 4, 4, 3))
        y = tf.reshape(x, (-1, 48)) @ v1.get_variable("w", (48, 3))
        session.run(v1.global_variables_initializer())
        v1.train.Saver()  # One that nobody uses, as many of that time have.
        builder = v1.saved_model.Builder(str(tmp_path / "model"))
        signature = v1.saved_model.predict_signature_def({"x": x}, {"logits": y})
        signatures = {"serving_default": signature}
        builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map=signatures)
        builder.save()
    assert load.load_logits_fn(tmp_path / "model")(tf.ones((2, 4, 4, 3))).shape == (2, 3)

    def restore_reads(meta_graph):
        meta_graph.graph_def.node.add(name="evil", op="ReadFile", input=["save_1/Const"])
        next(n for n in meta_graph.graph_def.node if n.name == "save_1/restore_all").input.append("^evil")

    assert "ReadFile in the main graph" in refusal(changed(tmp_path / "model", restore_reads))


def test_a_model_of_an_older_tensorflow():
    assert inspection.describe(ROOT / "tests" / "oracles" / "tf215_saved_model")["refused"] == []


def test_programs_of_xla():
    jax = pytest.importorskip("jax")
    exporting = pytest.importorskip("jax.export")
    shape = exporting.symbolic_shape("b, 12")
    free = jax.ShapeDtypeStruct(shape, np.float32)
    program = exporting.export(jax.jit(lambda x: x @ np.ones((12, 3), np.float32)))(free).mlir_module_serialized
    assert b"custom_call" in program and xla_modules.refused(program) == []  # It checks the shape.
    other = program.replace(b"shape_assertion\0", b"Shape_assertion\0")
    assert xla_modules.refused(other) == ["custom_call of Shape_assertion"]
    for cut in range(0, len(program), 101):
        assert xla_modules.refused(program[:cut]) or b"custom_call" not in program[:cut]
    assert xla_modules.refused(program + b"outfeed_v1\0")[0] == "outfeed"


# What is in there.


def test_inspect_model_says_what_is_in_there(copy):
    changed(copy, hostile_models.name_that_steers_a_terminal)
    told = inspection.describe(copy)
    assert told["signatures"]["serving_default"] == {
        "inputs": {"x": "float32 [any, 4, 4, 3]"},
        "outputs": {"logits": "float32 [any, 3]"},
    }
    assert {"name": "w/.ATTRIBUTES/VARIABLE_VALUE", "dtype": "float32", "shape": [48, 3], "bytes": 576} in told[
        "variables"
    ]
    assert told["operations"]["MatMul"] == 1 and told["assets"] == []
    assert {each["name"] for each in told["files"]} >= {"saved_model.pb", "variables/variables.index"}
    shown = list(inspection.lines(told))
    assert all(map(str.isprintable, shown)) and shown[-2] == "1 refused"


def test_the_command(copy, capsys, monkeypatch):
    changed(copy, hostile_models.of_the_main_graph)
    monkeypatch.setattr(sys, "argv", ["inspect_model.py", str(copy), "--json"])
    with pytest.raises(SystemExit) as stopped:
        inspect_model.command()
    assert stopped.value.code == 1
    assert json.loads(capsys.readouterr().out)["refused"] == ["ReadFile in the main graph"]
    monkeypatch.setattr(sys, "argv", ["inspect_model.py"])
    with pytest.raises(SystemExit) as stopped:
        inspect_model.command()
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: Expected a model. Received: none\n"


# One door.


def calls_of_loaders(source):
    names = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return {
        name
        for name in names
        if re.search(r"saved_model\.(\w+\.)*load|load_model$|TFSMLayer|load_v2|loader\.load", name)
    }


def test_models_are_loaded_in_one_place():
    package = ROOT / "robust_keras"
    found = {str(path.relative_to(package)): calls_of_loaders(path.read_text()) for path in package.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls and "/verifying/" not in name} == {
        "saved_models/opening.py": {"tf.saved_model.load", "keras.models.load_model"}
    }  # What verifies an export stands beside it, without this package.
    assert calls_of_loaders("keras.layers.TFSMLayer('m')\ntf.compat.v1.saved_model.loader.load(s)")


def test_a_program_that_takes_long_to_follow(monkeypatch, copy):
    monkeypatch.setattr(paths, "_MOST_STEPS", 10)
    assert "whose paths can be followed. Received: one with too many ways" in refusal(copy)


def test_the_program_is_read_as_it_was_written(honest):
    content = pathlib.Path(honest, "saved_model.pb").read_bytes()
    assert saved_model.parse(content).SerializeToString(deterministic=True)
