"""A device on which everything takes an invented time, and commands that let it pass."""

import csv
import json
import pathlib

import numpy as np

from robust_keras.study import costs, planning, runs
from robust_keras.study.configurations import Configuration

FORWARD = costs.forward_flops(10, 1)  # Of a WRN-10-1.
PASS = 1e-3  # Seconds of a pass over an image.
EVALUATION_BATCH = VALIDATION_BATCH = 128


class Device:
    """Seconds pass as `train` and `evaluate` say.

    Args:
        starting: seconds of a training run beside its steps and validations.
        step: seconds of a step.
        evaluating: seconds of an evaluation beside its passes.
        accuracy: (clean, robust) of every trained model, fractions.
        slower: by which factor long runs are slower than the first 16 steps.
    """

    def __init__(self, starting=60.0, step=1.0, evaluating=30.0, accuracy=(0.34, 0.22), slower=1.0):
        self.now = 0.0
        self.trained, self.evaluated = [], []
        self._costs = (starting, step, evaluating)
        self._accuracy, self._slower = accuracy, slower

    def clock(self):
        return self.now

    @property
    def commands(self):
        return runs.Commands(self._train, self._evaluate, lambda *_: [])

    def _train(self, files, bindings, workdir):
        bound = dict(line.split(" = ") for line in bindings)
        steps, images = int(bound["TRAIN_STEPS"]), int(bound["training_data.num_validation"])
        validations = -(-steps // int(bound["train.validate_every"]))
        factor = self._slower if steps > 16 else 1.0
        starting, step, _ = self._costs
        batches = -(-images // VALIDATION_BATCH) * validations
        self.now += starting + steps * step * factor + batches * VALIDATION_BATCH * 40 * PASS
        self.trained.append((workdir, steps))
        folder = pathlib.Path(workdir) / "saved_model"
        folder.mkdir(parents=True)
        rows = [{"step": steps, "examples_per_second": 64 / step / factor, "val_robust": self._accuracy[1]}]
        with open(folder.parent / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        metrics = dict(zip(("val_clean", "val_robust"), self._accuracy))
        (folder / "model_card.json").write_text(json.dumps({"validation": {"best": {"metrics": metrics}}}))

    def _evaluate(self, configuration, gin_file, workdir, num_examples, folder):
        is_trial = pathlib.Path(workdir).name == "trial"
        clean, robust = (0.1, 0.0) if is_trial else self._accuracy
        # PGD-40 runs in whole batches, and counts examples; the others count the steps of every example.
        attacked = [round(num_examples * share) for share in (clean, clean, robust)]
        steps = [attacked[0], 50 * attacked[1], 500 * attacked[2]]
        in_batches = [-(-attacked[0] // EVALUATION_BATCH) * EVALUATION_BATCH * 40, *steps[1:]]
        last_batches = 2 * 50 * EVALUATION_BATCH / 2  # On their way to being empty.
        self.now += self._costs[2] + (sum(in_batches) + last_batches) * PASS
        self.evaluated.append((workdir, num_examples))
        folder = pathlib.Path(workdir) / folder
        folder.mkdir()
        labels = np.arange(num_examples) % 10
        right = np.random.RandomState(len(self.evaluated)).rand(2, num_examples) < [[clean], [robust]]
        predictions = np.where(right[0], labels, (labels + 1) % 10)
        arrays = {
            "index": np.arange(num_examples),
            "label": labels,
            "clean_prediction": predictions,
            "robust": right[1],
        }
        np.savez(folder / "examples.npz", **arrays)
        attacks = [{"name": str(k), "steps": number} for k, number in enumerate(steps)]
        results = {
            "model": {"path": "saved_model"},
            "num_examples": num_examples,
            "norm": "Linf",
            "epsilon_fraction": "8/255",
            "confidence_interval_95": [0.0, 1.0],
            "attacks": attacks[1:],
            "baseline": {**attacks[0], "robust_accuracy": robust},
            "clean_accuracy": clean,
            "robust_accuracy": robust,
        }
        (folder / "results.json").write_text(json.dumps(results))
        return results


def configuration(plan, *, validation_passes=40, train_steps=600, bindings=(), num_runs=3):
    """A `Configuration` as the miniature scale has it."""
    job = planning.Job(
        28, 10, 10, 64, train_steps, 10, "adversarial_training", False, 6, 256, validation_passes, num_runs, num_runs
    )
    whole = [f"TRAIN_STEPS = {train_steps}", "train.validate_every = 100", "training_data.num_validation = 256"]
    bound = (*bindings, *whole, *plan.bindings(28, 10, train_steps, 256))
    return Configuration(("at.gin",), bound, job, "cifar10", None, ())
