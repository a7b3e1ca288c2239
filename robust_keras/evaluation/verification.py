"""What an evaluation has found so far: which attack broke which example, with which image; verified and saved."""

import posixpath

import numpy as np
import tensorflow as tf

from robust_keras import losses, storage
from robust_keras.engines import replicas

# A float32 subtraction of two pixels is off by at most this much.
_TOLERANCE = 1e-6
_SAVED = ("broken", "broken_uint8", "seconds", "attacked", "steps", "steps_without_packing")


def predict(predict_fn, images, batch_size):
    """float32 logits `[n, num_classes]` of `[n, ...]` images, n >= 1: uint8, or float32 in [0, 1]; in full batches."""
    pieces = []
    for start in range(0, len(images), batch_size):
        packed = np.resize(np.arange(start, min(start + batch_size, len(images))), batch_size)
        x = tf.constant(images[packed], tf.float32)
        logits = predict_fn(x / 255.0 if images.dtype == np.uint8 else x).numpy()
        pieces.append(logits[: len(images) - start].astype(np.float32))
    return np.concatenate(pieces)


class Judge:
    """Decides whether images that attacks propose count.

    Attributes:
        batch_size: int.
        non_finite: whether any logits so far were no finite numbers.
    """

    def __init__(self, predict_fn, images, labels, threat, batch_size):
        self._predict_fn, self._images, self._labels = predict_fn, images, labels
        self._threat, self.batch_size = threat, batch_size
        self.non_finite = False

    def judge(self, name, indices, proposed):
        """Fresh predictions on proposed images, as they are and rounded to bytes.

        Args:
            name: of the attack, for errors.
            indices: int `[n]`, the examples.
            proposed: float32 `[n, ...]`.

        Returns:
            (wrong, wrong after rounding): bool `[n]` each.

        Raises:
            ValueError: for an image outside the threat model.
        """
        clean = self._images[indices] / np.float32(255)
        self._check_inside(name, proposed, clean)
        rounded = _rounded(proposed, clean, self._threat)
        return tuple(self._is_wrong(x, self._labels[indices]) for x in (proposed, rounded))

    def _is_wrong(self, x, labels):
        if not len(x):
            return np.zeros(0, bool)
        logits = predict(self._predict_fn, x, self.batch_size)
        self.non_finite = self.non_finite or not np.isfinite(logits).all()
        return losses.is_wrong(logits, labels).numpy()

    def _check_inside(self, name, proposed, clean):
        if not len(proposed):
            return
        distance = self._threat.distance(tf.constant(proposed), tf.constant(clean)).numpy().max()
        low, high = proposed.min(), proposed.max()
        # NaN must count as outside.
        if not (distance <= _limit(self._threat) and low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"Expected images of {name} within {self._threat.norm} {self._threat.epsilon_fraction} and [0, 1]. "
                f"Received: a distance of {distance}, pixels from {low} to {high}"
            )


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

    def __init__(self, num_attacks, num_examples, directory=None):
        self.position = 0
        self.broken = np.zeros((num_attacks, num_examples), bool)
        self.broken_uint8 = np.zeros((num_attacks, num_examples), bool)
        self.seconds = np.zeros(num_attacks)
        self.attacked, self.steps, self.steps_without_packing = np.zeros((3, num_attacks), np.int64)
        self.notes = {}
        self._directory = directory
        self._is_writer = replicas.process_index() == 0
        self._pieces, self._num_saved = [], 0  # (attack, indices, images); how many of them are in files.
        self._num_saves = 0

    def add(self, indices, images, wrong, wrong_uint8):
        """Takes the verdicts on images `[n, ...]` of the attack at work for the examples `indices`."""
        self.broken[self.position, indices[wrong]] = True
        self.broken_uint8[self.position, indices[wrong_uint8]] = True
        if wrong.any():
            self._pieces.append((self.position, indices[wrong], images[wrong]))

    def adversarial(self, images, broken_by):
        """float32 `[num_examples, ...]`: the image of attack `broken_by[i]`, the clean one where that is negative."""
        adversarial = images.astype(np.float32) / np.float32(255)
        for position, indices, found in self._pieces:
            counts = broken_by[indices] == position
            adversarial[indices[counts]] = found[counts]
        return adversarial

    def save(self, work):
        """Writes everything, and the arrays `work` of the attack at work, to the directory, if there is one."""
        if self._directory is None or not self._is_writer:
            return
        tf.io.gfile.makedirs(self._directory)
        while self._num_saved < len(self._pieces):
            position, indices, images = self._pieces[self._num_saved]
            arrays = {"position": np.array(position), "indices": indices, "images": images}
            storage.write_arrays(self._piece_path(self._num_saved), arrays)
            self._num_saved += 1
        self._num_saves += 1
        arrays = {name: getattr(self, name) for name in _SAVED}
        arrays |= {f"work/{name}": array for name, array in work.items()}
        info = {"position": self.position, "num_pieces": self._num_saved}
        storage.write(self._directory, self._num_saves, arrays, {**info, "notes": self.notes})

    def restore(self):
        """Reads what `save` wrote last, and returns its `work`; None where there is nothing."""
        saved = storage.read_newest(self._directory) if self._directory is not None else None
        replicas.expect_same(saved.step if saved else 0, self._directory)
        if saved is None:
            return None
        info, arrays = saved.info, saved.arrays
        self.position, self.notes = info["position"], info["notes"]
        self._num_saves = saved.step
        for name in _SAVED:
            setattr(self, name, arrays[name])
        for k in range(info["num_pieces"]):
            with tf.io.gfile.GFile(self._piece_path(k), "rb") as file, np.load(file, allow_pickle=False) as piece:
                self._pieces.append((int(piece["position"]), piece["indices"], piece["images"]))
        self._num_saved = len(self._pieces)
        return {name.removeprefix("work/"): array for name, array in arrays.items() if name.startswith("work/")}

    def _piece_path(self, k):
        return posixpath.join(self._directory, f"adversarial-{k:06d}.npz")


def _rounded(x_adv, x, threat):
    """Adversarial images as whole bytes: the nearest ones or, where these leave the ball, those nearer to `x`."""
    nearest = np.round(x_adv * 255)
    # A thousandth of a byte makes up for float32.
    step = (x_adv - x) * 255
    towards_x = np.round(x * 255) + np.trunc(step + np.copysign(1e-3, step))
    outside = threat.distance(nearest / np.float32(255), x).numpy() > _limit(threat)
    return np.where(outside[:, None, None, None], towards_x, nearest) / np.float32(255)


def _limit(threat):
    return threat.epsilon * (1 + 1e-5) + _TOLERANCE
