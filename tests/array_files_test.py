"""Arrays of strangers: what is no array, claims more than it holds or unpacks to too much is refused before it is read."""

import io
import os
import resource
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest

from robust_keras import array_files, zip_files

_ARRAYS = {
    "image": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "one": np.float32(3.5),
    "none": np.zeros((0, 7), np.float16),
    "text": np.array(["Linf", "L2"]),
    "bools": np.array([True, False]),
    "layer/kernel#2": np.zeros(5, np.complex64),
}


def npy(text, content=b"", version=1):
    """A `.npy` file with any text as its header."""
    encoded = text.encode("latin1")
    length = struct.pack("<H" if version == 1 else "<L", len(encoded))
    return b"\x93NUMPY" + bytes([version, 0]) + length + encoded + content


def header(shape="(4,)", descr="'|u1'", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def saved(array):
    with io.BytesIO() as file:
        np.save(file, array, allow_pickle=True)
        return file.getvalue()


def packed(members, compression=zipfile.ZIP_STORED):
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of two members with one name.
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return file.getvalue()


def one(content, **options):
    return packed([("image.npy", content)], **options)


def edited(content, signature, offset, value):
    """A zip with some bytes of its first header of a kind replaced."""
    at = content.index(signature) + offset
    return content[:at] + value + content[at + len(value) :]


def blank(megabytes):
    """Zeros, deflated as far as it goes."""
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    stored = one(block * megabytes)
    return edited(edited(stored, _CENTRAL, 10, b"\x08\0"), _CENTRAL, 24, struct.pack("<L", megabytes << 20))


def with_a_link():
    info = zipfile.ZipInfo("image.npy")
    info.external_attr = 0o120777 << 16
    return packed([(info, "/etc/passwd")])


_GOOD = one(saved(_ARRAYS["image"]))
_CENTRAL, _LOCAL, _END = b"PK\1\2", b"PK\3\4", b"PK\5\6"
HOSTILE = {
    "an empty file": (lambda: b"", "no whole zip archive"),
    "a pickle": (lambda: b"\x80\x04cos\nsystem\n.", "no whole zip archive"),
    "cut off": (lambda: _GOOD[:-5], "no whole zip archive"),
    "a comment with another end": (lambda: edited(_GOOD, _END, 20, b"\1\0") + b"x", "no whole zip archive"),
    "a directory of a gigabyte": (lambda: edited(_GOOD, _END, 12, struct.pack("<L", 1 << 30)), "more than 20,000"),
    "a 64-bit end elsewhere": (
        lambda: _GOOD[:-22] + b"PK\6\7" + struct.pack("<LQL", 0, 1 << 60, 1) + _GOOD[-22:],
        "64-bit end",
    ),
    "a 64-bit directory of an exabyte": (
        lambda: (
            _GOOD[:-22]
            + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 1 << 60, 0)
            + b"PK\6\7"
            + struct.pack("<LQL", 0, len(_GOOD) - 22, 1)
            + _GOOD[-22:]
        ),
        "more than 20,000",
    ),
    "two of a name": (lambda: packed([("a.npy", saved(1)), ("a.npy", saved(2))]), "several files named a.npy"),
    "two of a key": (lambda: packed([("a.npy", saved(1)), ("a", saved(2))]), "several arrays of one name"),
    "encrypted": (lambda: edited(_GOOD, _CENTRAL, 8, b"\1\0"), "image.npy is encrypted"),
    "a link": (with_a_link, "image.npy is a link"),
    "lzma, whose dictionary is of any size": (
        lambda: one(saved(1), compression=zipfile.ZIP_LZMA),
        "neither stored nor deflated",
    ),
    "no array": (lambda: packed([("run.py", b"import os")]), "run.py is no array"),
    "a name that steers": (lambda: packed([("\x1b[2J\nimage", b"")]), r"\\x1b\[2J\\nimage is no array"),
    "a name with a zero": (
        lambda: packed([("imageXnpy", saved(1))]).replace(b"imageX", b"image\0"),
        "without a plain name",
    ),
    "stored, and larger than stored": (
        lambda: edited(_GOOD, _CENTRAL, 24, struct.pack("<L", 1 << 30)),
        "cannot hold 1073741824",
    ),
    "deflated, and larger than that can be": (
        lambda: edited(one(saved(1), compression=zipfile.ZIP_DEFLATED), _CENTRAL, 24, struct.pack("<L", 1 << 31)),
        "cannot hold 2147483648",
    ),
    "deflated to other bytes": (
        lambda: edited(one(saved(_ARRAYS["image"]), compression=zipfile.ZIP_DEFLATED), _LOCAL, 41, b"\xff\xff\xff"),
        "image.npy",
    ),
    "a checksum": (lambda: edited(_GOOD, _CENTRAL, 16, b"abcd"), "Bad CRC-32"),
    "one member inside another": (
        lambda: (
            (two := packed([("a.npy", saved(1)), ("b.npy", saved(2))]))
            and edited(two, two[two.rindex(_CENTRAL) : two.rindex(_CENTRAL) + 46], 42, struct.pack("<L", 4))
        ),
        "lies where another part",
    ),
    "400 MB of zeros": (lambda: blank(400), "unpack to .* times as many"),
    "a shape of a petabyte": (lambda: one(npy(header("(1000000000000000,)"), bytes(4))), "holds 4 bytes"),
    "more than 2 ** 63": (
        lambda: one(npy(header("(9999999999999999999, 9999999999999999999)"), bytes(4))),
        "no array has",
    ),
    "rows of nothing": (lambda: one(npy(header("(0, 9999999999999999999)"))), "no array has"),
    "text of no length": (lambda: one(npy(header("(1000000000000,)", "'<U0'"))), "neither numbers nor text"),
    "text of any length": (lambda: one(npy(header("(4,)", "'<U999999999'"), bytes(4))), "image.npy"),
    "a negative axis": (lambda: one(npy(header("(-4, -1)"), bytes(4))), "another form"),
    "forty axes": (lambda: one(npy(header(f"({'1, ' * 40})"), bytes(1))), "no array has"),
    "objects": (lambda: one(saved(np.array([{}, None], object))), "holds objects"),
    "fields": (lambda: one(saved(np.zeros(2, [("a", "O")]))), "another form"),
    "times": (lambda: one(saved(np.zeros(2, "M8[ns]"))), "neither numbers nor text"),
    "nested brackets": (lambda: one(npy("(" * 9000)), "another form"),
    "a tower of minus signs": (lambda: one(npy(header("-" * 9000 + "1"))), "another form"),
    "a call": (lambda: one(npy(header("__import__('os').system('true')"))), "another form"),
    "a product": (lambda: one(npy(header("(10 ** 10 ** 10,)"))), "another form"),
    "digits without end": (lambda: one(npy(header(f"({'9' * 5000},)"))), "another form"),
    "one key twice": (lambda: one(npy("{'shape': (4,), 'shape': (4,), 'descr': '|u1'}")), "another form"),
    "a header of gigabytes": (lambda: one(b"\x93NUMPY\2\0" + struct.pack("<L", 1 << 31)), "a header of 2147483648"),
    "a version to come": (lambda: one(npy(header(), bytes(4), version=9)), r"image.npy has the version \(9, 0\)"),
    "a header that ends early": (lambda: one(npy(header())[:30]), "EOF"),
    "more than it says": (lambda: one(npy(header("(3,)"), bytes(4))), "holds 4 bytes"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    path = tmp_path / "some.npz"
    save(path, **_ARRAYS)
    found = array_files.read(path)
    assert list(found) == list(_ARRAYS)
    for name, array in _ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
    assert list(array_files.read(str(path), ["one"])) == ["one"]
    with pytest.raises(ValueError, match=r"Received: .*some.npz \(nothing named two\)"):
        array_files.read(path, ["two"])


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 2L), }   \n",  # By Python 2.
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2,2)}",  # By C++, see cnpy.
        '{"shape": (2, 2), "descr": "<u1", "fortran_order": False}',
    ],
)
def test_reads_headers_of_other_writers(text):
    found = array_files.header(io.BytesIO(npy(text, b"abcd")))
    assert found[1:4] == ((2, 2), np.uint8, False)
    np.testing.assert_array_equal(
        array_files.arrays(io.BytesIO(one(npy(text, b"abcd"))))["image"], [[97, 98], [99, 100]]
    )


@pytest.mark.parametrize("kind", HOSTILE)
def test_refuses(tmp_path, kind):
    make, match = HOSTILE[kind]
    path = tmp_path / "some.npz"
    path.write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match) as caught:
        array_files.read(path)
    message = str(caught.value)
    assert message.startswith(f"Expected a whole npz file. Received: {path} (") and "\n" not in message
    assert "\x1b" not in message and len(message) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    np.savez(tmp_path / "real.npz", **_ARRAYS)
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    for name in ("pipe.npz", "link.npz"):
        with pytest.raises(ValueError, match=f"Expected a regular file. Received: .*{name}"):
            array_files.read(tmp_path / name)
    assert list(array_files.read(tmp_path / "link.npz", follow=True)) == list(_ARRAYS)


def test_believes_what_fits_into_memory(monkeypatch):
    """What is packed a hundred times over is believed where all is small, and elsewhere if there is memory for it."""
    noise = np.random.RandomState(0).bytes(40_000)
    content = packed([("noise", noise), ("blank", bytes(3 << 20))], zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zip_files, "ALWAYS_UNPACKED", 1 << 20)
    zip_files.open_archive(io.BytesIO(content))
    monkeypatch.setattr(zip_files, "_free_memory", lambda: 1 << 21)
    with pytest.raises(ValueError, match="unpack to 3,185,728, and 2,097,152 of memory are free"):
        zip_files.open_archive(io.BytesIO(content))
    zip_files.open_archive(io.BytesIO(packed([("blank", bytes(3 << 20))])))  # Stored: it takes what its file takes.
