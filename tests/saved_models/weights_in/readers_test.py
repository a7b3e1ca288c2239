"""Files as other libraries write them, and hostile or broken ones, of which one line is left."""

import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from robust_keras.saved_models.weights_in import checkpoint, haiku_files, tensors
from tests.oracles import checkpoint_inputs
from tests.saved_models.weights_in import written

TOUCH = "import os; os.system('touch ran')"


def read(path):
    """What a file holds, with tensors and arrays as NumPy's."""
    with checkpoint.opened(path) as opened:
        return opened.format, plain(opened.content)


def plain(value):
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, haiku_files.Array):
        return plain(value.content)
    if type(value) in (list, tuple):
        return [plain(each) for each in value]
    if isinstance(value, tensors.Tensor):
        tensors.check(value)
        return value.values()
    return value


def numbers_in(value):
    if isinstance(value, np.ndarray):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from numbers_in(each)


def refused(path, match):
    before = sorted(os.listdir(path.parent))
    with pytest.raises(ValueError, match=match) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert sorted(os.listdir(path.parent)) == before


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


def test_files_of_the_libraries_themselves(tmp_path, recorded):
    expected = np.array(checkpoint_inputs.NUMBERS)
    count = 0
    for library in ("torch", "haiku"):
        for name, content in recorded[library].items():
            if name.startswith("files/"):
                (tmp_path / "file").write_bytes(content.tobytes())
                format_, held = read(tmp_path / "file")
                found = [each for each in numbers_in(held) if each.shape == expected.shape]
                assert found, name
                for array in found:
                    np.testing.assert_array_equal(array.astype(float), expected, err_msg=name)
                assert format_ == ("safetensors" if name == "files/safetensors" else library)
                count += 1
    assert count == 32


def test_big_endian_archives(tmp_path):
    content = written.pickled({"a": written.tensor("0", (2,))})
    written.archive(tmp_path / "file", content, {"0": np.array([1, 2], ">f4").tobytes()})
    with zipfile.ZipFile(tmp_path / "file", "a") as file:
        file.writestr("archive/byteorder", "big")
    np.testing.assert_array_equal(read(tmp_path / "file")[1]["a"], [1, 2])


def call(module, name, *arguments):
    return written.pickled({"a": written.tensor("0", (2,)), "b": written.Named(module, name, *arguments)})


CALLS = [
    ("os", "system", TOUCH),
    ("posix", "system", TOUCH),
    ("builtins", "eval", TOUCH),
    ("builtins", "exec", TOUCH),
    ("builtins", "getattr", "a", "b"),
    ("torch", "load", "file"),
    ("torch.hub", "load", "a", "b"),
    ("torch._utils", "_rebuild_sparse_tensor", 1),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", 1),
    ("torch.storage", "_load_from_bytes", b"a"),
    ("torch.jit", "load", "file"),
    ("numpy", "load", "file"),
    ("numpy.testing._private.utils", "runstring", TOUCH, {}),
    ("_codecs", "encode", "a", "rot13"),
    ("collections", "OrderedDict", [["a", 1]]),
    ("subprocess", "Popen", ["touch", "ran"]),
    ("runpy", "_run_code", TOUCH, {}),
]


@pytest.mark.parametrize("target", CALLS, ids=lambda target: ".".join(target[:2]))
def test_names_outside_of_the_list_are_refused(tmp_path, target):
    written.archive(tmp_path / "file", call(*target), {"0": bytes(8)})
    refused(tmp_path / "file", r"Expected a checkpoint of PyTorch .* Received: ")
    pair = np.empty(2, object)
    content = written.pickled(written.Named(*target))
    with open(tmp_path / "file.npy", "wb") as file:
        np.save(file, pair)
    whole = (tmp_path / "file.npy").read_bytes()
    (tmp_path / "file.npy").write_bytes(whole[: whole.index(b"\n") + 1] + content)
    refused(tmp_path / "file.npy", r"Expected a checkpoint of PyTorch .* Received: ")


def test_attributes_of_what_is_allowed_are_not_set(tmp_path):
    build = written.pickled({"a": 1})[:-1] + b"}X\x01\x00\x00\x00xK\x01sb."
    for content in (build, b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00xK\x01sb."):
        written.archive(tmp_path / "file", content, {})
        refused(tmp_path / "file", "setting the state of .* is not allowed")


TENSORS = {
    "too large": ({"shape": (4,), "num_elements": 2}, "in a storage of 8 bytes"),
    "behind the end": ({"shape": (2,), "first": 1, "num_elements": 2}, "in a storage of 8 bytes"),
    "negative strides": ({"shape": (2,), "strides": (-1,)}, "are no sizes"),
    "negative shape": ({"shape": (-2,), "num_elements": 2}, "are no sizes"),
    "repeated": ({"shape": (2, 2), "strides": (0, 1), "num_elements": 2}, "numbers overlap"),
    "interleaved": ({"shape": (2, 2), "strides": (1, 1), "num_elements": 3}, "numbers overlap"),
    "empty": ({"shape": (0,), "num_elements": 2}, "are no sizes"),
    "huge": ({"shape": (2**50,), "strides": (1,), "num_elements": 2}, "are no sizes"),
    "huge in all": ({"shape": (2**39, 2**39), "strides": (2**39, 1), "num_elements": 2}, "in a storage of 8 bytes"),
    "one stride": ({"shape": (2, 1), "strides": (1,), "num_elements": 2}, r"of shape \(2, 1\) with strides \(1,\)"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_what_they_say(tmp_path, name):
    settings, match = TENSORS[name]
    tensor = written.tensor("0", **settings)
    num_elements = settings.get("num_elements", 2)
    written.archive(tmp_path / "file", written.pickled({"a": tensor}), {"0": bytes(4 * num_elements)})
    with pytest.raises(ValueError, match=match):
        read(tmp_path / "file")


def test_parts_of_a_storage_that_do_not_touch_are_apart():
    storage = tensors.Storage("0", np.dtype("f4"), 40, lambda begin, end: bytes(end - begin))
    a, b, c = (tensors.Tensor(storage, first, (2, 2), (2, 1)) for first in (0, 4, 3))
    assert tensors.overlapping({"a": a, "b": b}) is None
    assert tensors.overlapping({"a": a, "b": b, "c": c}) == ("a", "c")


def archives(path):
    """Broken or hostile archives, and what is said of them."""
    good, data = written.pickled({"a": written.tensor("0", (2,))}), {"0": b"\0\1\2\3\4\5\6\7"}
    yield lambda: written.archive(path, good, {}), "that is not in the archive"
    yield lambda: written.archive(path, good, {"0": bytes(12)}), "a storage 0 of 12 bytes for 2 numbers"
    yield lambda: written.archive(path, good, data, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"
    yield lambda: written.archive(path, b"", data), "truncated"
    yield lambda: written.archive(path, good[:-10], data), "truncated"
    twice = {"a": written.tensor("0", (2,)), "b": written.tensor("0", (1,), "f8")}
    yield lambda: written.archive(path, written.pickled(twice), data), "of two types"
    reference = written.tensor("0", (2,))
    reference.arguments[0].reference = ("a", "0", "cpu", 2)
    yield lambda: written.archive(path, written.pickled([reference]), data), "another thing than a storage"

    def with_more(name, content):
        written.archive(path, good, data)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, content)

    yield lambda: with_more("archive/code/a.py", TOUCH), "TorchScript archive, which is a program"
    yield lambda: with_more("other/data.pkl", good), "without a data.pkl, or with several"
    yield lambda: with_more("archive/byteorder", "odd"), "in another order"

    def changed(old, new, count=-1):
        written.archive(path, good, data)
        path.write_bytes(path.read_bytes().replace(old, new, count))

    yield lambda: changed(b"PK\x03\x04", b"PK\x03\x05"), "Received"
    yield lambda: changed(b"PK\x01\x02", b"PK\x01\x03"), "Received"

    def cut(keep):
        written.archive(path, good, data)
        path.write_bytes(path.read_bytes()[:keep])

    yield lambda: cut(-30), "Received"
    yield lambda: cut(100), "Received"

    def directory_of(num_bytes):  # A directory that says so of its own size.
        written.archive(path, good, data)
        content = bytearray(path.read_bytes())
        struct.pack_into("<I", content, len(content) - 10, num_bytes)
        path.write_bytes(content)

    yield lambda: directory_of(2**31), "Received"


@pytest.mark.parametrize("number", range(16))
def test_broken_archives(tmp_path, number):
    path = tmp_path / "file"
    make, match = list(archives(path))[number] if number < 15 else (lambda: path.write_bytes(b"PK\x03\x04"), "Received")
    make()
    tracemalloc.start()
    try:
        refused(path, match)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_there_are_no_more_broken_archives(tmp_path):
    assert len(list(archives(tmp_path / "file"))) == 15


def test_damaged_numbers_are_not_read(tmp_path):
    written.archive(tmp_path / "file", written.pickled({"a": written.tensor("0", (2,))}), {"0": b"abcdefgh"})
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content.replace(b"abcdefgh", b"abcdefgg"))
    with pytest.raises(ValueError, match="damaged bytes in archive/data/0"):
        read(tmp_path / "file")


SAFETENSORS = {
    "gap": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "overlap": {f"{k}": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in range(2)},
    "reversed": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    "too much": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    "too little": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "shape": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "negative shape": {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
    "huge shape": {"a": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}},
    "no shape": {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
    "dtype": {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
    "no object": [1],
    "no entry": {"a": 3},
    "offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
    "float offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_broken_safetensors(tmp_path, name):
    written.save_safetensors(tmp_path / "file", {"a": np.zeros(2, np.float32)}, SAFETENSORS[name])
    refused(tmp_path / "file", "Received: ")


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 100_000, '{"a":1,"a":1}', '{"a":' + "9" * 1_000_000 + "}", "{\xff}", "{" + " " * 100],
    ids=["deep", "twice", "digits", "text", "unfinished"],
)
def test_headers_that_are_no_headers(tmp_path, text):
    content = text.encode("latin1")
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(content)) + content)
    begin = time.perf_counter()
    refused(tmp_path / "file", "Received: ")
    assert time.perf_counter() - begin < 5


def test_other_files(tmp_path):
    np.save(tmp_path / "numbers.npy", np.zeros(3))
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    contents = {
        "empty": b"",
        "text": b"A text\nof two lines\x1b[2J",
        "one byte": b"\x80",
        "html": b"<!DOCTYPE html><html>",
        "json": json.dumps({"a": 1}).encode(),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "header": b"\x93NUMPY\x01\x00\xff\xff{",
        "long header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        "python": b"\x93NUMPY\x01\x00\x40\x00{'descr': __import__('os').system('touch ran')}".ljust(74),
        "size": struct.pack("<Q", 2**62) + b"{}",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "Expected a checkpoint of PyTorch .*")
    for name in ("numbers.npy", "archive.npz"):
        refused(tmp_path / name, "Expected a checkpoint of PyTorch .*")
    refused_empty = r"Received: .*empty, which is empty$"
    refused(tmp_path / "empty", refused_empty)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="Expected a regular file"):
            read(path)
    with pytest.raises(ValueError, match="nowhere, which does not exist"):
        read(tmp_path / "nowhere")


def test_references_to_themselves_end(tmp_path):
    loop = []
    loop.append({"a": loop, "b": [loop, loop]})
    (tmp_path / "file").write_bytes(pickle.dumps(loop, 2))
    with checkpoint.opened(tmp_path / "file") as opened:
        assert opened.content[0]["a"] is opened.content
