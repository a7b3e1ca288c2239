"""What an evaluation has found so far: which attack broke which example, with which image; and its files."""

import json
import posixpath
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import array_files, foreign_files, own_folders, storage
from robust_keras.engines import replicas
from robust_keras.evaluation.examples import as_floats

_SAVED = ("broken", "broken_uint8", "seconds", "attacked", "steps", "steps_without_packing")


class Verdicts:
    """The verdicts of a list of attacks, and where the evaluation stands.

    Attributes:
        position: int, the attack at work.
        broken: bool `[num_attacks, num_examples]`.
        broken_uint8: the same, after rounding to bytes.
        seconds: float `[num_attacks]`.
        attacked: int `[num_attacks]`, how many examples.
        steps: int `[num_attacks]`, how many each took, summed over examples.
        steps_without_packing: int `[num_attacks]`, how many there were if no example ever fell.
        notes: a dictionary of whatever else has to be kept, as JSON can hold it.
    """

    def __init__(
        self,
        num_attacks: int,
        num_examples: int,
        directory: str | None = None,
        identity: dict[str, Any] | None = None,
        save_every: float = 0.0,
    ) -> None:
        """
        Args:
            num_attacks: of the evaluation.
            num_examples: of the evaluation.
            directory: where `save` writes, any `tf.io.gfile` path; None for nowhere.
            identity: of what these are the verdicts, as JSON can hold it; another one's are not restored.
            save_every: seconds from one save to when the next one is due.
        """
        self.position = 0
        self.broken = np.zeros((num_attacks, num_examples), bool)
        self.broken_uint8 = np.zeros((num_attacks, num_examples), bool)
        self.seconds = np.zeros(num_attacks)
        self.attacked, self.steps, self.steps_without_packing = np.zeros((3, num_attacks), np.int64)
        self.notes: dict[str, Any] = {}
        self.directory, self._identity = directory, json.loads(json.dumps(identity or {}))
        self._is_writer = replicas.process_index() == 0
        self._pieces: list[tuple] = []  # (attack, indices, images).
        self._num_saved = 0  # How many of them are in files.
        self._num_saves = 0
        self._save_every, self._saved_at = save_every, time.perf_counter()

    def add(self, indices: np.ndarray, images: np.ndarray, wrong: np.ndarray, wrong_uint8: np.ndarray) -> None:
        """Takes the verdicts on images `[n, ...]` of the attack at work for the examples `indices`."""
        self.broken[self.position, indices[wrong]] = True
        self.broken_uint8[self.position, indices[wrong_uint8]] = True
        if wrong.any():
            self._pieces.append((self.position, indices[wrong], images[wrong]))

    def count(self, name: str, number: int) -> None:
        """Adds to a count, among the notes, of the attack at work."""
        counts = self.notes.setdefault(name, [0] * len(self.broken))
        counts[self.position] += int(number)

    def counted(self, name: str, position: int) -> int:
        """What `count` has added up for an attack."""
        return self.notes[name][position] if name in self.notes else 0

    def adversarial(self, images: np.ndarray, broken_by: np.ndarray) -> np.ndarray:
        """float32 `[num_examples, ...]`: the image of attack `broken_by[i]`, the clean one where that is negative."""
        adversarial = np.array(as_floats(images))
        for position, indices, found in self._pieces:
            counts = broken_by[indices] == position
            adversarial[indices[counts]] = found[counts]
        return adversarial

    def kept(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The images that broke something: (position of the attack, indices, images `[n, ...]`)."""
        yield from self._pieces

    def is_due(self) -> bool:
        """Whether it is time to save: in all processes where it is in the first one."""
        return replicas.all_processes(time.perf_counter() - self._saved_at)[0] >= self._save_every

    def save(self, work: dict[str, np.ndarray]) -> None:
        """Writes everything, and the arrays `work` of the attack at work, to the directory, if there is one."""
        if self.directory is not None and self._is_writer:
            self._write(work)
        self._saved_at = time.perf_counter()

    def _write(self, work):
        own_folders.make(self.directory)
        while self._num_saved < len(self._pieces):
            position, indices, images = self._pieces[self._num_saved]
            arrays = {"position": np.array(position), "indices": indices, "images": images}
            storage.write_arrays(self._piece_path(self._num_saved), arrays)
            self._num_saved += 1
        self._num_saves += 1
        arrays = {name: getattr(self, name) for name in _SAVED}
        arrays |= {f"work/{name}": array for name, array in work.items()}
        info = {"position": self.position, "num_pieces": self._num_saved, "identity": self._identity}
        storage.write(self.directory, self._num_saves, arrays, {**info, "notes": self.notes})

    def restore(self) -> dict[str, np.ndarray] | None:
        """Reads what `save` wrote last.

        Returns:
            Its `work`; None where there is nothing.

        Raises:
            ValueError: for the verdicts of another evaluation, or files that hold none.
        """
        if self.directory is None:
            return None
        saved = storage.read_newest(self.directory)
        replicas.expect_same(saved.step if saved else 0, self.directory)
        if saved is None:
            return None
        path = posixpath.join(self.directory, f"step-{saved.step:08d}")
        try:
            info, arrays = saved.info, saved.arrays
            position, notes, num_pieces = int(info["position"]), dict(info["notes"]), int(info["num_pieces"])
            taken = {name: arrays[name] for name in _SAVED}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the state of an evaluation. Received: {path}.json, something else") from error
        self._check_identity(info.get("identity") or {})
        for name, array in taken.items():
            if array.shape != (shape := getattr(self, name).shape) or array.dtype.kind not in "biuf":
                raise ValueError(
                    f"Expected the state of an evaluation of {self.broken.shape[0]} attacks on {self.broken.shape[1]} "
                    f"examples. Received: {path}.npz, {name} of shape {array.shape}, {array.dtype}, not {shape}"
                )
            setattr(self, name, array.astype(getattr(self, name).dtype))
        if not 0 <= position <= len(self.broken):
            raise ValueError(f"Expected the state of an evaluation. Received: {path}.json, of attack {position + 1}")
        self.position, self.notes, self._num_saves = position, notes, saved.step
        self._pieces = [self._read_piece(k) for k in range(num_pieces)]
        self._num_saved = len(self._pieces)
        return {name.removeprefix("work/"): array for name, array in arrays.items() if name.startswith("work/")}

    def _check_identity(self, saved):
        # A state of an older version knows less of itself.
        different = [
            name for name in self._identity.keys() & saved.keys() if not same(self._identity[name], saved[name])
        ]
        if different:
            raise ValueError(
                f"Expected the state of this evaluation. Received: {self.directory}, that of other "
                f"{' and '.join(sorted(different))}"
            )

    def _read_piece(self, k):
        path = self._piece_path(k)
        try:
            with foreign_files.open_regular(path) as file:
                piece = array_files.arrays(file, ("position", "indices", "images"))
            position, indices, images = int(piece["position"]), piece["indices"], piece["images"]
            if len(indices) != len(images) or not np.all((indices >= 0) & (indices < self.broken.shape[1])):
                raise ValueError("images of other examples")
            return position, indices, images
        except (TypeError, ValueError, FileNotFoundError, tf.errors.NotFoundError) as error:
            raise ValueError(
                f"Expected the images that were found so far in {path}. Received: {storage.why(error)}"
            ) from error

    def _piece_path(self, k):
        return posixpath.join(self.directory, f"adversarial-{k:06d}.npz")


def same(one: Any, other: Any) -> bool:
    """Whether JSON values are equal, but for what one of them says and the other, of another version, does not know."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(same(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
