"""Images and labels in TFRecord files."""

import math
import re
import zlib
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.data.readers import record_lengths
from robust_keras.data.readers.pictures import FAILURES, PNG, block_size, compiled, decoded, decoded_or_refused
from robust_keras.data.readers.pipelines import read_ahead
from robust_keras.data.readers.published import HOW_TO_LABEL
from robust_keras.data.readers.tfds_sets import why

_PART = re.compile(r"-(\d{3,})-of-(\d{3,})(?!.*/)")


class Layout(NamedTuple):
    """What the records of a set hold, which the first one tells of all.

    Attributes:
        image_shape: (height, width, channels).
        is_raw: whether the images are bytes as they are, not PNG or JPEG.
        has_labels: whether every record has a label, or none.
        resized: whether images of any size are made images of that shape, see `pictures.decoded`.
    """

    image_shape: tuple
    is_raw: bool
    has_labels: bool
    resized: bool


def list_files(path: str) -> list[str]:
    """The files that a glob, or a path as it is, matches, sorted."""
    if tf.io.gfile.exists(path):
        return [path]
    return [file for file in sorted(tf.io.gfile.glob(path)) if not tf.io.gfile.isdir(file)]


def check_complete(paths: Sequence[str]) -> None:
    """Refuses a set of which parts are missing, where names tell how many there are, as 'part-00003-of-00010.tfrecord'.

    Raises:
        ValueError: for missing parts.
    """
    parts: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := _PART.search(path):
            parts.setdefault((path[: match.start()], match[2], path[match.end() :]), set()).add(int(match[1]))
    for (stem, count, ending), found in parts.items():
        if lacking := sorted(set(range(int(count))) - found):
            raise ValueError(
                f"Expected {int(count)} parts of {stem}-*-of-{count}{ending}. Received: {len(found)}, without "
                f"{lacking[0]:0{len(count)}d}"
            )


def blocks(
    paths: Sequence[str], image_shape: tuple | None, *, labelled: bool, first: int = 0, resized: bool = False
) -> Generator[tuple[np.ndarray, np.ndarray | None], None, None]:
    """Decodes the records of TFRecord files, each compressed with GZIP or ZLIB or not.

    Args:
        paths: a list of them. A record is a `tf.train.Example` of `image`, PNG or JPEG or `[height, width, channels]`
            bytes, and maybe `label`, int64.
        image_shape: of every image, or None for that of the first, which then must not be raw bytes.
        labelled: whether labels are wanted.
        first: how many records to leave out at the beginning.
        resized: whether PNG and JPEG of any size are made images of that shape, see `pictures.decoded`.

    Yields:
        (images, labels): uint8 `[n, height, width, channels]`, and int64 `[n]` or None.

    Raises:
        ValueError: for a file that is truncated or damaged or without records, or a record that lacks something.
    """
    layout = None
    for path in paths:
        compression = _compression(path)
        if not compression and (local := foreign_files.local_path(path)):
            record_lengths.check(local)
        records = tf.data.TFRecordDataset(path, compression, buffer_size=1 << 23)
        done = 0
        try:
            if layout is None:
                record = next(records.take(1).as_numpy_iterator(), None)
                if record is None:
                    raise ValueError(f"Expected records in {path}. Received: none")
                layout = _layout(record, path, image_shape, labelled, resized)
                size = block_size(layout.image_shape)
                parse = compiled(_parsed, layout=layout)
            if first:
                done = int(records.take(first).reduce(np.int64(0), lambda count, _: count + 1))
                first -= done
            dataset = records.skip(done).batch(size).map(parse, tf.data.AUTOTUNE)
            for images, labels in read_ahead(dataset).as_numpy_iterator():
                yield images, labels if layout.has_labels else None
                done += len(images)
        except FAILURES as error:
            for k, record in enumerate(_readable(records.skip(done).take(size)) if layout else ()):
                _checked(record, layout, f"record {done + k} of {path}")
            raise ValueError(f"Expected a whole TFRecord file. Received: {path} ({why(error)})") from error
        if not done:
            raise ValueError(f"Expected records in {path}. Received: none")


def _compression(path):
    """How a TFRecord file is compressed, as `tf.data.TFRecordDataset` calls it, by its first bytes."""
    with foreign_files.open_regular(path, follow=True) as file:
        start = file.read(12)
        # A length and its checksum; a length alone can look like the beginning of a compressed file.
        if len(start) == 12 and _masked_crc32c(start[:8]) == int.from_bytes(start[8:], "little"):
            return ""
        if start.startswith(b"\x1f\x8b"):
            compression = "GZIP"
        elif start.startswith(b"\x78") and int.from_bytes(start[:2], "big") % 31 == 0:
            compression = "ZLIB"
        else:
            return ""
        file.seek(0)
        try:
            record_lengths.check_compressed(file, compression, path)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"Expected a whole {compression} file. Received: {path} ({why(error)})") from error
    return compression


def _masked_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _readable(records):
    """Records as far as they can be read."""
    try:
        yield from records.as_numpy_iterator()
    except FAILURES:
        return


def _values(record, where):
    """The values of `image` and of `label` in a record."""
    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception as error:  # Of protobuf, whose errors have no public class.
        raise ValueError(f"Expected a tf.train.Example in {where}. Received: {why(error)}") from error
    kinds = (("image", "bytes_list"), ("label", "int64_list"))
    return [list(getattr(features[key], kind).value) if key in features else [] for key, kind in kinds]


def _layout(record, path, image_shape, labelled, resized):
    """The `Layout` of a set whose first record that is."""
    where = f"record 0 of {path}"
    images, labels = _values(record, where)
    if labelled and not labels:
        raise ValueError(f"Expected an int64 'label' in {path}; {HOW_TO_LABEL}. Received: none")
    data = images[0] if len(images) == 1 else b""
    # Raw bytes can begin like a JPEG, but hardly end like one too.
    is_encoded = data.startswith(PNG) or (data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"))
    if is_encoded:
        image_shape = image_shape or decoded_or_refused(data, None, where).shape
    elif image_shape is None and len(images) == 1:
        raise ValueError(
            f"Expected PNG or JPEG in {path} where no image_shape or image_size is given. Received: other bytes"
        )
    layout = Layout(image_shape, not is_encoded, labelled or len(labels) == 1, resized and is_encoded)
    _checked(record, layout, where)
    return layout


def _checked(record, layout, where):
    """Raises an error that says what is wrong with a record."""
    images, labels = _values(record, where)
    if len(images) != 1:
        raise ValueError(f"Expected one 'image' of bytes in {where}. Received: {len(images)}")
    if layout.has_labels and len(labels) != 1:
        raise ValueError(f"Expected one int64 'label' in {where}, as before. Received: {len(labels)}")
    num_bytes = math.prod(layout.image_shape)
    if not layout.is_raw:
        decoded_or_refused(images[0], layout.image_shape, where, layout.resized)
    elif len(images[0]) != num_bytes:
        raise ValueError(
            f"Expected 'image' as PNG, JPEG or the {num_bytes} bytes of {layout.image_shape} in {where}. "
            f"Received: {len(images[0])} bytes"
        )


def _parsed(records, layout):
    """Images and labels of records, in a graph; an error that says little where one is not of that layout."""
    kinds = {"image": tf.string, "label": tf.int64} if layout.has_labels else {"image": tf.string}
    features = tf.io.parse_example(records, {key: tf.io.RaggedFeature(kind) for key, kind in kinds.items()})
    counts = tf.concat([feature.row_lengths() for feature in features.values()], axis=0)
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(counts == 1), [counts])]):
        images = tf.identity(features["image"].values)
        labels = tf.identity(features["label"].values) if layout.has_labels else tf.zeros_like(counts)
    if layout.is_raw:
        return tf.reshape(tf.io.decode_raw(images, tf.uint8), (-1, *layout.image_shape)), labels
    return decoded(images, layout.image_shape, resized=layout.resized), labels
