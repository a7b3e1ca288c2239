"""SavedModels, looked at before TensorFlow loads them: their files, and the program in them, read as bytes."""

import posixpath
from typing import Any

import tensorflow as tf
from google.protobuf import descriptor_pool, message, message_factory

from robust_keras import foreign_files
from robust_keras.foreign_files import printable
from robust_keras.saved_models.safety import graphs

PROGRAM = "saved_model.pb"
MOST_BYTES = 2**31 - 1  # Of a protocol buffer.


def check(path: str) -> None:
    """Refuses a SavedModel that would do anything but compute.

    Args:
        path: its folder.

    Raises:
        ValueError: naming the first operation or file that is refused.
    """
    list(foreign_files.regular_files(path))
    model = read(path)
    if len(model.meta_graphs) != 1:
        raise ValueError(f"Expected a SavedModel of one graph. Received: {len(model.meta_graphs)} in {printable(path)}")
    found = list(dict.fromkeys(graphs.findings(model.meta_graphs[0].graph_def)))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"Expected a model of operations that only compute. Received: {found[0]} of {printable(path)}{more}"
        )


def read(path: str) -> Any:
    """The program of a SavedModel, a `SavedModel` message.

    Raises:
        ValueError: for a file that is none.
    """
    with foreign_files.open_regular(posixpath.join(path, PROGRAM), most_bytes=MOST_BYTES) as file:
        content = file.read()
    kind = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName("tensorflow.SavedModel"))
    try:
        return kind.FromString(content)
    except message.DecodeError as error:
        raise ValueError(f"Expected a SavedModel's program. Received: {printable(path)}/{PROGRAM} ({error})") from error


_ = tf  # Registers the messages.
