"""One tiny SavedModel, and what a stranger may make of it: changes of its program, each with what is refused of it."""

import tensorflow as tf
from google.protobuf import descriptor_pool, message_factory

PATH = "/tmp/outside"
STRING, FLOAT, RESOURCE = (each.as_datatype_enum for each in (tf.string, tf.float32, tf.resource))
CHANGES = []


def message(name):
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(f"tensorflow.{name}"))


def save(path, module=None, function=None):
    """A SavedModel of `module`, with a variable where it is None, and `function(x)` as its signature."""
    if module is None:
        module = tf.Module()
        module.w = tf.Variable(tf.ones((48, 3)))
    function = function or (lambda x: {"logits": tf.reshape(x, (-1, 48)) @ module.w})
    serve = tf.function(function, input_signature=[tf.TensorSpec((None, 4, 4, 3), tf.float32, name="x")])
    tf.saved_model.save(module, str(path), signatures={"serving_default": serve})
    return str(path)


def change(refused):
    """Adds a change, a function of the `MetaGraphDef`; `refused` is a pattern of what is said."""

    def add(function):
        CHANGES.append((function, refused))
        return function

    return add


def inner(meta_graph):
    """The function behind the signature."""
    return function_of(meta_graph, "signature_wrapper")


def constant(nodes, name, text):
    node = nodes.add(name=name, op="Const")
    node.attr["dtype"].type = node.attr["value"].tensor.dtype = STRING
    node.attr["value"].tensor.string_val.append(text)
    node.attr["value"].tensor.tensor_shape.SetInParent()
    return node


def of_file(op, *, before=0):
    """An operation on a path that the program has made up."""

    def changed(meta_graph):
        nodes = inner(meta_graph).node_def
        constant(nodes, "path", PATH.encode())
        nodes.add(name="evil", op=op, input=["path:output:0"] * (before + 1))

    changed.__name__ = op
    return changed


def function_of(meta_graph, part):
    return next(f for f in meta_graph.graph_def.library.function if part in f.signature.name)


# Of every kind: files, Python, network, other devices, queues, data pipelines, plugins, and what nobody knows yet.
for _op in (
    "Abort BatchFunction CollectiveReduceV2 CreateSummaryFileWriter DataServiceDatasetV4 DatasetFromGraph "
    "DatasetToTFRecord DebugIdentityV2 DecodeProtoV2 EagerPyFunc FIFOQueueV2 FileSystemSetConfiguration FixedUnigramCandidateSampler "
    "GenerateVocabRemapping ImmutableConst LoadAndRemapMatrix MatchingFiles MutexLock OneShotIterator PrintV2 PyFunc "
    "PyFuncStateless ReadFile RemoteCall RpcClient Send SqlDataset SymbolicGradient TPUPartitionedCall TextLineDataset "
    "Unstage WriteFile XlaCustomCallV2 XlaHostCompute _Recv _XlaCompile LaterOperationV9"
).split():
    CHANGES.append((of_file(_op), f"Received: {_op} in function __inference_"))
for _op in ("MergeV2Checkpoints", "Restore", "RestoreV2", "Save", "SaveV2", "ShardedFilename"):
    CHANGES.append((of_file(_op), f"Received: {_op} of a constant in function __inference_"))
CHANGES.append((of_file("InitializeTableFromTextFileV2", before=1), "InitializeTableFromTextFileV2 of a constant"))


@change("Received: ReadFile in the main graph")
def of_the_main_graph(meta_graph):
    meta_graph.graph_def.node.add(name="evil", op="ReadFile")


@change("a call of WriteFile, which is no function of the model")
def called_by_an_attribute(meta_graph):
    inner(meta_graph).node_def.add(name="evil", op="PartitionedCall").attr["f"].func.name = "WriteFile"


@change("a call of elsewhere, which is no function of the model")
def called_by_a_list(meta_graph):
    inner(meta_graph).node_def.add(name="evil", op="Case").attr["branches"].list.func.add(name="elsewhere")


@change("a call of elsewhere, which is no function of the model")
def called_inside_a_call(meta_graph):
    node = inner(meta_graph).node_def.add(name="evil", op="PartitionedCall")
    node.attr["f"].func.name = inner(meta_graph).signature.name
    node.attr["f"].func.attr["g"].func.name = "elsewhere"


@change("an attribute that callers give in function to_initialize")
def called_by_whatever_its_caller_says(meta_graph):
    to_initialize(meta_graph).node_def.add(name="any", op="PartitionedCall").attr["f"].placeholder = "f"


@change("a function called WriteFile, as an operation is,")
def named_like_an_operation(meta_graph):
    meta_graph.graph_def.library.function.add().signature.name = "WriteFile"


@change("a name that two functions have")
def twice_the_same_name(meta_graph):
    meta_graph.graph_def.library.function.add().CopyFrom(inner(meta_graph))


@change("a gradient of EagerPyFunc")
def gradient_of_python(meta_graph):
    inner(meta_graph).node_def[0].attr["_gradient_op_type"].s = b"EagerPyFunc"


@change("a gradient of WriteFile, which is no function of the model")
def gradient_that_is_an_operation(meta_graph):
    name = inner(meta_graph).signature.name
    meta_graph.graph_def.library.gradient.add(function_name=name, gradient_func="WriteFile")


@change("TextLineDataset of a graph that stands in a text")
def graph_in_a_constant(meta_graph):
    graph = message("GraphDef")()
    graph.node.add(name="evil", op="TextLineDataset")
    constant(meta_graph.graph_def.node, "text", graph.SerializeToString())


@change("WriteFile of a graph that stands in a text")
def function_in_an_attribute(meta_graph):
    function = message("FunctionDef")()
    function.signature.name = "evil"
    function.node_def.add(name="evil", op="WriteFile")
    inner(meta_graph).node_def[0].attr["_text"].s = function.SerializeToString()


@change(r"constants of 8,796,\d+,\d+,\d+ bytes, such as one of shape \[1048576, 1048576\]")
def constant_that_fills_memory(meta_graph):
    tensor = constant(meta_graph.graph_def.node, "big", b"").attr["value"].tensor
    for _ in range(2):
        tensor.tensor_shape.dim.add(size=2**20)


@change("a constant of handles")
def constant_of_a_handle(meta_graph):
    constant(meta_graph.graph_def.node, "handle", b"").attr["value"].tensor.dtype = RESOURCE


@change(r"a constant of shape \[-2\]")
def constant_of_no_shape(meta_graph):
    constant(meta_graph.graph_def.node, "none", b"").attr["value"].tensor.tensor_shape.dim.add(size=-2)


@change("ShardedFilename of a constant in function __inference__traced_save")
def saver_on_a_path_of_its_own(meta_graph):
    saver = function_of(meta_graph, "traced_save").signature.name
    constant(meta_graph.graph_def.node, "path", PATH.encode())
    next(node for node in meta_graph.graph_def.node if node.attr["f"].func.name == saver).input[0] = "path"


@change("of a text joined to a path in function __inference__traced_save")
def saver_that_leaves_the_folder(meta_graph):
    for node in function_of(meta_graph, "traced_save").node_def:
        for k, text in enumerate(node.attr["value"].tensor.string_val):
            node.attr["value"].tensor.string_val[k] = text.replace(b"part", b"../../part")


@change("RestoreV2 of an input in function __inference__traced_restore")
def saver_that_anybody_may_call(meta_graph):
    name = function_of(meta_graph, "traced_restore").signature.name
    meta_graph.object_graph_def.concrete_functions[name].SetInParent()


@change("RestoreV2 in signature serving_default")
def signature_that_restores(meta_graph):
    name = next(iter(meta_graph.signature_def["serving_default"].outputs))
    meta_graph.signature_def["serving_default"].outputs[name].name = meta_graph.saver_def.restore_op_name


@change("a constant of type 7 in string_val and tensor_content")
def text_that_tensorflow_reads_elsewhere(meta_graph):
    constant(meta_graph.graph_def.node, "text", b"model").attr["value"].tensor.tensor_content = b"\x04/tmp"


@change("a constant of type 7 in tensor_content")
def text_in_bytes(meta_graph):
    tensor = constant(meta_graph.graph_def.node, "text", b"").attr["value"].tensor
    del tensor.string_val[:]
    tensor.tensor_content = b"\x04/tmp"


@change("a constant of type 1 in int_val")
def numbers_in_the_field_of_others(meta_graph):
    tensor = inner(meta_graph).node_def.add(name="one", op="Const").attr["value"].tensor
    tensor.dtype = FLOAT
    tensor.int_val.append(1)


@change("a function without a name")
def function_in_the_place_of_the_main_graph(meta_graph):
    meta_graph.graph_def.library.function.add()


@change("a name that two nodes have in function __inference_")
def two_nodes_of_a_name(meta_graph):
    for _ in range(2):
        inner(meta_graph).node_def.add(name="twice", op="NoOp")


@change("SaveV2 in what runs as the model is loaded")
def restoring_that_saves(meta_graph):
    path = meta_graph.saver_def.filename_tensor_name
    meta_graph.graph_def.node.add(name="evil", op="SaveV2", input=[path])
    restore = meta_graph.saver_def.restore_op_name.split(":")[0]
    next(node for node in meta_graph.graph_def.node if node.name == restore).input.append("^evil")


@change("RestoreV2 of a text joined to a path in the main graph")
def restoring_from_beside(meta_graph):
    nodes, path = meta_graph.graph_def.node, meta_graph.saver_def.filename_tensor_name
    constant(nodes, "added", b"_other")
    nodes.add(name="joined", op="StringJoin", input=[path, "added"])
    nodes.add(name="evil", op="RestoreV2", input=["joined"])


@change("SaveV2 of what PlaceholderWithDefault gives in the main graph")
def names_that_are_not_one_text(meta_graph):
    nodes = meta_graph.graph_def.node
    constant(nodes, "several", b"model").attr["value"].tensor.tensor_shape.dim.add(size=2)
    nodes.add(name="given", op="PlaceholderWithDefault", input=["several"])
    nodes.add(name="evil", op="SaveV2", input=["given"])


@change("While in what runs as the model is loaded")
def loop_as_variables_are_restored(meta_graph):
    meta_graph.graph_def.node.add(name="loop", op="While")
    restore = meta_graph.saver_def.restore_op_name.split(":")[0]
    next(node for node in meta_graph.graph_def.node if node.name == restore).input.append("^loop")


def to_initialize(meta_graph, local_name="_initialize", kind="resource"):
    """A function that an object has as a method that loading calls."""
    function = meta_graph.graph_def.library.function.add()
    function.signature.name = "to_initialize"
    meta_graph.object_graph_def.concrete_functions["to_initialize"].SetInParent()
    objects = meta_graph.object_graph_def.nodes
    objects.add().bare_concrete_function.concrete_function_name = "to_initialize"
    each = objects.add()
    getattr(each, kind).SetInParent()
    each.children.add(local_name=local_name, node_id=len(objects) - 2)
    return function


@change("8,192 calls of functions in what runs as the model is loaded")
def calls_that_multiply(meta_graph):
    function = to_initialize(meta_graph)
    for k in range(12):
        for name in ("once", "twice"):
            function.node_def.add(name=name, op="PartitionedCall").attr["f"].func.name = f"level_{k}"
        function = meta_graph.graph_def.library.function.add()
        function.signature.name = f"level_{k}"


@change(r"50. calls of functions in what runs as the model is loaded")
def branches_that_multiply(meta_graph):
    function = to_initialize(meta_graph)
    branches = function.node_def.add(name="case", op="Case").attr["branches"].list.func
    for _ in range(501):
        branches.add(name="branch")
    meta_graph.graph_def.library.function.add().signature.name = "branch"


@change("inf calls of functions in what runs as the model is loaded")
def function_that_calls_itself(meta_graph):
    function = to_initialize(meta_graph)
    function.node_def.add(name="again", op="If").attr["then_branch"].func.name = function.signature.name


@change("XlaCallModule in what runs as the model is loaded")
def xla_as_it_is_loaded(meta_graph):
    to_initialize(meta_graph).node_def.add(name="loop", op="XlaCallModule").attr["module"].s = b"ML\xefR"


@change("While in what runs as the model is loaded")
def loop_as_it_is_left(meta_graph):
    to_initialize(meta_graph, "_destroy_resource").node_def.add(name="loop", op="While")


@change("While in what runs as the model is loaded")
def loop_in_a_method_of_a_variable(meta_graph):
    to_initialize(meta_graph, "assign", "variable").node_def.add(name="loop", op="While")


@change("While in what runs as the model is loaded")
def loop_of_a_saver(meta_graph):
    to_initialize(meta_graph, "any").node_def.add(name="loop", op="While")
    objects = meta_graph.object_graph_def.nodes
    objects[-1].saveable_objects["saveable"].save_function = len(objects) - 2


@change("NextIteration in what runs as the model is loaded")
def loop_of_a_local_variable(meta_graph):
    meta_graph.graph_def.node.add(name="loop", op="NextIteration")
    variable = message("VariableDef")(initializer_name="loop").SerializeToString()
    meta_graph.collection_def["local_variables"].bytes_list.value.append(variable)


@change("While in what runs as the model is loaded")
def loop_of_a_snapshot(meta_graph):
    meta_graph.graph_def.node.add(name="loop", op="While")
    variable = message("VariableDef")(snapshot_name="loop:0").SerializeToString()
    meta_graph.collection_def["variables"].bytes_list.value.append(variable)


@change("While in what runs as the model is loaded")
def loop_as_it_is_loaded(meta_graph):
    meta_graph.graph_def.node.add(name="loop", op="While")
    meta_graph.collection_def["saved_model_main_op"].node_list.value.append("loop")


@change("While in what runs as the model is loaded")
def loop_of_an_initializer(meta_graph):
    inner(meta_graph).node_def.add(name="loop", op="While")
    objects = meta_graph.object_graph_def.nodes
    number = len(objects)
    objects.add().bare_concrete_function.concrete_function_name = inner(meta_graph).signature.name
    resource = objects.add()
    resource.resource.device = ""
    resource.children.add(local_name="_initialize", node_id=number)


@change(r"a file '../../outside' in the assets")
def asset_outside(meta_graph):
    meta_graph.asset_file_def.add(filename="../../outside").tensor_info.name = "asset:0"


@change(f"a file '{PATH}' in the assets")
def asset_of_a_collection(meta_graph):
    asset = message("AssetFileDef")(filename=PATH).SerializeToString()
    meta_graph.collection_def["saved_model_assets"].any_list.value.add(value=asset)


@change("a file 'missing.txt' that is not there in the assets")
def asset_that_is_missing(meta_graph):
    meta_graph.asset_file_def.add(filename="missing.txt")


@change("asset 3 of 0 in object 0")
def asset_that_nobody_lists(meta_graph):
    meta_graph.object_graph_def.nodes[0].asset.asset_file_def_index = 3


@change("an object of class Custom>Evil in object 0")
def class_of_an_object(meta_graph):
    meta_graph.object_graph_def.nodes[0].registered_name = "Custom>Evil"


@change("a saver Custom>Evil in object 0")
def saver_of_an_object(meta_graph):
    meta_graph.object_graph_def.nodes[0].registered_saver = "Custom>Evil"


@change("serialised objects in collection queue_runners")
def queue_runners(meta_graph):
    meta_graph.collection_def["queue_runners"].bytes_list.value.append(b"\n\x01a")


@change("XlaCallModule with a module that is no MLIR bytecode")
def xla_in_text(meta_graph):
    node = inner(meta_graph).node_def.add(name="evil", op="XlaCallModule")
    node.attr["module"].s = b"module { func.func @main() { stablehlo.custom_call @evil() } }"


@change("XlaCallModule with custom calls that cannot be read")
def xla_that_cannot_be_read(meta_graph):
    node = inner(meta_graph).node_def.add(name="evil", op="XlaCallModule")
    node.attr["module"].s = b"ML\xefR\x0dStableHLO\0custom_call_v1\0"


@change(r"Received: Evil\\x1b\[2J\\n in function")
def name_that_steers_a_terminal(meta_graph):
    inner(meta_graph).node_def.add(name="evil", op="Evil\x1b[2J\n")
