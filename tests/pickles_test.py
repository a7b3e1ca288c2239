"""The reader of foreign pickles: what it loads, and what it refuses without running it."""

import copyreg
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from robust_keras import pickles

_scalar = np.float32(0).__reduce__()[0]


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Subclass(np.ndarray):
    pass


def _load(tmp_path, content):
    path = tmp_path / "file.pickle"
    path.write_bytes(content)
    return pickles.load(str(path))


def _refused(tmp_path, content, match):
    marker = tmp_path / "marker"
    with pytest.raises(ValueError, match=match) as error:
        _load(tmp_path, content)
    assert not marker.exists()
    message = str(error.value)
    assert "Received: " in message and "file.pickle" in message and "\n" not in message
    assert len(message) < 600


def _touch(tmp_path):
    return f"touch {tmp_path / 'marker'}"


def _same(a, b):
    if isinstance(a, np.ndarray):
        assert type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
        return
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", range(6))
def test_loads_plain_data_of_every_protocol(tmp_path, protocol):
    images = np.random.RandomState(0).randint(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    content = {
        "data": images,
        "not_contiguous": images[::2, :, ::-1],
        "fortran": np.asfortranarray(np.arange(600.0, dtype=np.float32).reshape(20, 30)),
        "extrapolated_targets": np.arange(50),
        "empty": np.zeros((0, 3), np.float64),
        "zero_dimensional": np.array(2.5),
        "flags": np.array([True, False]),
        "names": np.array(["cat", "caterpillar"]),
        "bytes": np.array([b"a", b"bcd"]),
        "scalars": (np.float64(0.1), np.int32(-7), np.bool_(True)),
        "plain": [None, True, False, -3, 2**40, 2**90, -0.25, "ü\n'", b"", b"\x00\xff", (), [], {}],
        7: ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "long": list(range(3000)),
    }
    _same(content, _load(tmp_path, pickle.dumps(content, protocol)))


def test_loads_empty_bytes_under_either_name(tmp_path):
    for fix_imports in (True, False):
        content = pickle.dumps([b""], 2, fix_imports=fix_imports)
        assert (b"__builtin__" in content) == fix_imports
        assert _load(tmp_path, content) == [b""]


@pytest.mark.parametrize("protocol", range(6))
def test_byte_order_survives(tmp_path, protocol):
    content = [np.arange(300, dtype=">i4"), np.arange(300, dtype="<i4"), np.int16(5)]
    loaded = _load(tmp_path, pickle.dumps(content, protocol))
    for array, expected in zip(loaded, content, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("protocol", range(6))
def test_shared_objects_stay_shared(tmp_path, protocol):
    array = np.arange(5)
    shared = [array]
    loaded = _load(tmp_path, pickle.dumps([array, array, shared, shared], protocol))
    assert loaded[0] is loaded[1] and loaded[2] is loaded[3] and loaded[2][0] is loaded[0]
    np.testing.assert_array_equal(loaded[0], array)


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_loads_files_of_numpy_1_and_2(tmp_path, package):
    content = pickle.dumps({"data": np.arange(12, dtype=np.uint8).reshape(3, 4)}, 3)
    for written in (b"numpy._core.", b"numpy.core."):
        content = content.replace(written, package.encode() + b".")
    assert package.encode() + b"." in content
    np.testing.assert_array_equal(_load(tmp_path, content)["data"], np.arange(12).reshape(3, 4))


def test_loads_files_of_python_2(tmp_path):
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03\x00\x7f\xfftb"
    )
    loaded = _load(tmp_path, b"\x80\x02}U\x04data" + array + b"s.")
    assert list(loaded) == ["data"]
    np.testing.assert_array_equal(loaded["data"], np.array([0, 127, 255], np.uint8))


def test_loads_text_files_of_python_2(tmp_path):
    """Protocol 0, in which bytes that are not ASCII are escapes in quotes."""
    data = b"".join(b"\\x%02x" % byte for byte in (0, 39, 92, 255)) + b"\\t\\'a"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntp3\nS'b'\np4\ntp5\nRp6\n"
        b"(I1\n(I7\ntp7\ncnumpy\ndtype\np8\n(S'u1'\np9\nI0\nI1\ntp10\nRp11\n(I3\nS'|'\np12\nNNNI-1\nI-1\nI0\ntp13\nb"
        b"I00\nS'%s'\np14\ntp15\nb" % data
    )
    loaded = _load(tmp_path, b"(dp0\nS'data'\np16\n%ssS\"other\"\nL7L\nsI01\nF-0.25\ns." % array)
    assert list(loaded) == ["data", "other", True] and loaded["other"] == 7 and loaded[True] == -0.25
    np.testing.assert_array_equal(loaded["data"], np.frombuffer(b"\x00'\\\xff\t'a", np.uint8))
    for text in (b"S\n", b"S'\n", b"S'a\n", b"Sa\n", b"S'a\"\n"):
        _refused(tmp_path, text + b".", "without its quotes")


def test_pieces_of_a_file_fit_together(tmp_path, monkeypatch):
    """Lines and pieces longer than what is read at a time, and across its ends."""
    content = ["a" * n for n in (1, 7, 8, 9, 40)] + [b"b" * n for n in (1, 15, 16, 17, 100)] + [np.arange(30.0), 1.5]
    for buffer_bytes in (1, 8, 16, 1 << 16):
        monkeypatch.setattr(pickles, "_BUFFER_BYTES", buffer_bytes)
        for protocol in range(6):
            _same(content, _load(tmp_path, pickle.dumps(content, protocol)))


@pytest.mark.parametrize("protocol", range(6))
def test_refuses_calls(tmp_path, protocol):
    command = _touch(tmp_path)
    content = pickle.dumps({"data": Call(os.system, command)}, protocol)
    _refused(tmp_path, content, r"the name (posix|nt)\.system is not allowed")
    python = f"__import__('os').system({command!r})"
    for function in (eval, exec):
        content = pickle.dumps(Call(function, python), protocol)
        _refused(tmp_path, content, rf"\.{function.__name__} is not allowed")
    pickle.loads(content)  # The payload is a live one.
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_refuses_a_pickle_inside_a_scalar(tmp_path, protocol):
    inner = pickle.dumps(Call(os.system, _touch(tmp_path)), 2)
    content = pickle.dumps(Call(_scalar, np.dtype(object), inner), protocol)
    _refused(tmp_path, content, "dtype 'O8' is not allowed")


@pytest.mark.parametrize("protocol", range(6))
def test_refuses_objects_in_arrays(tmp_path, protocol):
    array = np.array([Call(os.system, _touch(tmp_path)), None], object)
    _refused(tmp_path, pickle.dumps(array, protocol), "is not allowed")
    _refused(tmp_path, pickle.dumps(np.array([None, 1]), protocol), "dtype 'O8' is not allowed")


@pytest.mark.parametrize("dtype", ["i4,O", [("a", "u1"), ("b", "f4")], ("u1", (2, 2)), "M8[s]", "V3"], ids=str)
@pytest.mark.parametrize("protocol", [2, 5])
def test_refuses_other_dtypes(tmp_path, dtype, protocol):
    content = pickle.dumps(Call(_scalar, np.dtype(dtype), b"12345678"), protocol)
    _refused(tmp_path, content, "dtype .* is not allowed")


def test_refuses_structure_in_the_state_of_a_dtype(tmp_path):
    dtype = b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'|'\n%sNNI8\nI8\nI0\ntb"
    scalar = b"cnumpy.core.multiarray\nscalar\n(" + dtype + b"S'a'\ntR."
    assert _load(tmp_path, scalar % b"N") == ord("a")
    _refused(tmp_path, scalar % b"(S'field'\nt", "a dtype with the state .* is not allowed")


def test_refuses_subclasses_of_arrays(tmp_path):
    for protocol in range(6):
        subclass = np.zeros(3).view(Subclass)
        _refused(tmp_path, pickle.dumps(subclass, protocol), r"Subclass is not allowed")
    # A tag that is not ndarray's.
    content = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(tS'b'\ntR."
    _refused(tmp_path, content, "an array of the type numpy.dtype is not allowed")


@pytest.mark.parametrize(
    "name",
    [
        b"numpy.testing._private.utils\nrunstring",
        b"numpy.testing\nrundocs",
        b"numpy.f2py.crackfortran\nmyeval",
        b"numpy.f2py.diagnose\nrun",
        b"numpy\nload",
        b"numpy\nfromfile",
        b"numpy\nmemmap",
        b"numpy.core.multiarray\n_reconstruct.__globals__",
        b"numpy._core.numpy._core.multiarray\nscalar",
        b"numpy.ctypeslib\nload_library",
        b"_codecs\ndecode",
        b"copyreg\n_reconstructor",
        b"copy_reg\n_reconstructor",
        b"__builtin__\ngetattr",
        b"builtins\nbytearray",
        b"robust_keras.pickles\nload",
    ],
    ids=lambda name: name.decode().replace("\n", "."),
)
def test_refuses_every_other_name(tmp_path, name):
    command = f"import os; os.system({_touch(tmp_path)!r})".encode()
    match = name.decode().replace("\n", r"\.") + " is not allowed"
    _refused(tmp_path, b"c" + name + b"\n(X" + struct.pack("<I", len(command)) + command + b"tR.", match)
    module, attribute = name.split(b"\n")
    as_text = b"".join(b"X" + struct.pack("<I", len(part)) + part for part in (module, attribute))
    _refused(tmp_path, b"\x80\x04" + as_text + b"\x93.", match)


def test_refuses_attributes(tmp_path):
    for target in (b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"}", b"]", b"I1\n"):
        content = target + b"}S'load'\nS'changed'\nsb."
        _refused(tmp_path, content, "setting the state of .* is not allowed")
    # An array that already has its content.
    content = pickle.dumps(np.arange(3), 2)[:-1] + b"(I1\n(I1\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'a'\ntb."
    _refused(tmp_path, content, "setting the state of array")


def test_refuses_calls_of_what_is_no_function(tmp_path):
    for target in (b"}", b"S'text'\n", b"cnumpy\nndarray\n"):
        _refused(tmp_path, target + b"(tR.", "a call of .* is not allowed")
    _refused(tmp_path, b"cnumpy\ndtype\n]S'u1'\naR.", "a call of numpy.dtype is not allowed")
    _refused(tmp_path, b"c_codecs\nencode\n(S'a'\nS'idna'\ntR.", "encode with 'idna'")


def test_refuses_containers_that_are_none(tmp_path):
    array = pickle.dumps(np.arange(3), 2)[:-1]
    _refused(tmp_path, array + b"I0\nI9\ns.", "stands where a dict should")
    _refused(tmp_path, array + b"(I0\nI9\nu.", "stands where a dict should")
    _refused(tmp_path, array + b"I0\na.", "stands where a list should")
    _refused(tmp_path, array + b"(I0\ne.", "stands where a list should")


def test_keys_are_text_bytes_or_numbers(tmp_path):
    # The hash of tuples in tuples in tuples takes more of the processor's stack than there is, which ends the process.
    _refused(tmp_path, b"})" + b"\x85" * 1_000_000 + b"Ns.", "stands where a key should")
    for key in (b")", b"cnumpy\ndtype\n"):
        _refused(tmp_path, b"}" + key + b"Ns.", "stands where a key should")
        _refused(tmp_path, b"}(" + key + b"Nu.", "stands where a key should")
        _refused(tmp_path, b"(" + key + b"Nd.", "stands where a key should")


def test_no_dictionary_is_made_slow_by_chosen_keys(tmp_path):
    # Numbers that all have one hash: each of them would be compared with all before it.
    equal = [k * (2**61 - 1) for k in range(9, 20)] + [complex(-1000003.0 * k, k) for k in range(2, 9)]
    assert len({hash(key) for key in equal[:11]}) == len({hash(np.complex128(key)) for key in equal[11:]}) == 1
    for key in (equal[0], np.complex128(equal[-1])):
        _refused(tmp_path, pickle.dumps({key: 1}, 4), "stands where a key should")
    _refused(tmp_path, b"Np%d\n." % 2**61, "numbers an object too high")


def test_refuses_other_instructions(tmp_path):
    copyreg.add_extension("os", "system", 0xAB)
    try:
        command = _touch(tmp_path).encode()
        call = b"(S'" + command + b"'\ntR."
        assert pickle.loads(b"\x80\x02\x82\xab.") is os.system  # Known and cached from here on.
        _refused(tmp_path, b"\x80\x02\x82\xab" + call, "instruction b'.x82' is not allowed")
        _refused(tmp_path, b"\x80\x02\x83\xab\x00" + call, "instruction b'.x83' is not allowed")
    finally:
        copyreg.remove_extension("os", "system", 0xAB)
        copyreg.clear_extension_cache()
    _refused(tmp_path, b"Pname\n.", "instruction b'P'")
    _refused(tmp_path, b"S'name'\nQ.", "instruction b'Q'")
    _refused(tmp_path, b"(S'" + command + b"'\nios\nsystem\n.", "instruction b'i'")
    _refused(tmp_path, b"(cnumpy\ndtype\nS'u1'\no.", "instruction b'o'")
    _refused(tmp_path, b"\x80\x02cnumpy\ndtype\n(S'u1'\nt\x81.", "instruction b'.x81'")
    _refused(tmp_path, b"\x80\x05\x97.", "instruction b'.x97'")
    _refused(tmp_path, pickle.dumps({1, 2}, 4), "instruction b'.x8f'")
    _refused(tmp_path, pickle.dumps(3 + 4j, 4), "complex is not allowed")


def _array_state(shape, data):
    """An array of uint8 with the shape (a pickled tuple) and the data (a pickled string)."""
    return (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
        b"(K\x01" + shape + b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89" + data + b"tb."
    )


def test_sets_no_memory_aside_for_what_is_not_there(tmp_path):
    huge = b"J" + struct.pack("<i", 2**28)
    size = struct.pack("<Q", 2**28)
    bombs = [
        _array_state(huge + b"\x85", b"C\x01a"),
        _array_state(b"(" + huge * 2 + b"K\x00t", b"C\x01a"),
        _array_state(b"J\xff\xff\xff\xff\x85", b"C\x01a"),
        b"\x80\x04\x8e" + size + b"abc.",  # bytes
        b"\x80\x05\x96" + size + b"abc.",  # bytearray
        b"\x80\x04\x8d" + size + b"abc.",  # str
        b"\x80\x04\x95" + size + b"abc.",  # frame
        b"\x80\x02\x8b" + size[:4] + b"abc.",  # int
        b"\x80\x02T" + size[:4] + b"abc.",  # str of Python 2
        b"\x80\x03cnumpy\ndtype\nX\x0c\x00\x00\x00S99999999999\x85R.",
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            _refused(tmp_path, bomb, "Expected a pickle")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    whole = _load(tmp_path, _array_state(b"K\x01K\x02\x86", b"C\x02ab"))
    np.testing.assert_array_equal(whole, [[97, 98]])
    assert _load(tmp_path, b"\x80\x02Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.") is None  # A memo index.


def test_few_bytes_do_not_become_many(tmp_path, monkeypatch):
    text = b"\x80\x02X" + struct.pack("<L", 10_000) + b"a" * 10_000 + b"q\x00"
    encode = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    text = b"\x80\x02X" + struct.pack("<L", 10_000) + b"a" * 10_000 + b"q\x00"
    assert _load(tmp_path, text + encode * 3 + b".") == b"a" * 10_000
    _refused(tmp_path, text + encode * 50 + b".", "more of its bytes than there are")
    # An array takes a copy of the same bytes, each time.
    begin = b"C" + b"\xc8" + b"a" * 200 + b"\x94"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01bt"
    array += b"R(K\x01K\xc8\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89h\x00tb"
    assert len(_load(tmp_path, b"\x80\x04" + begin + array + b".")) == 200
    monkeypatch.setattr(pickles, "_MAX_INSTRUCTIONS", 100)
    assert _load(tmp_path, b"\x80\x02" + b"(1" * 48 + b"N.") is None
    _refused(tmp_path, b"\x80\x02" + b"]" * 100 + b"N.", "more than 100 instructions")


def test_refuses_an_array_without_all_its_data(tmp_path):
    _refused(tmp_path, _array_state(b"K\x03\x85", b"C\x02ab"), r"uint8 \(3,\) holds b'ab'")
    _refused(tmp_path, _array_state(b"K\x02\x85", b"(K\x00K\x01l"), r"holds \[0, 1\]")
    minus_one = b"J\xff\xff\xff\xff"
    _refused(tmp_path, _array_state(minus_one * 2 + b"\x86", b"C\x01a"), r"shape \(-1, -1\) is not")
    _refused(tmp_path, _array_state(b"(" + b"K\x01" * 33 + b"t", b"C\x01a"), r"shape \(1, 1, .*\) is not")


@pytest.mark.parametrize("protocol", range(6))
def test_refuses_truncated_files(tmp_path, protocol):
    content = pickle.dumps({"data": np.arange(40, dtype=np.uint8), "name": "text"}, protocol)
    for length in range(0, len(content), 3):
        _refused(tmp_path, content[:length], "Expected a pickle")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", b"PK\x03\x04", b"\x80\x09N."])
def test_refuses_what_is_no_pickle(tmp_path, content):
    _refused(tmp_path, content, "Expected a pickle")
