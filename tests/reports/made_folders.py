"""Folders of runs and evaluations with made results, which agree with each other."""

import json

import numpy as np

from robust_keras.evaluation.results import wilson_interval

HARM = (
    "a|b\n<script>alert(1)</script>\x1b]0;title\x07 [link](javascript:x) \N{RIGHT-TO-LEFT OVERRIDE} $\\frac{$ \"'> &lt;"
)


def evaluation(
    folder, *, num=60, broken=(12, 6), wrong=9, attacks=("apgd-ce", "square"), name="m", side=8, changed=(), **changes
):
    """Writes an evaluation of `num` images of ten classes, of which each attack breaks some; its images are random."""
    random = np.random.default_rng(0)
    fate = np.repeat([0, *range(1, len(attacks) + 1), -1], [wrong, *broken, num - wrong - sum(broken)])
    fate = random.permutation(fate).astype(np.int32)
    label = (np.arange(num) % 10).astype(np.int32)
    other = (label + 1 + np.arange(num) // 10 % 3).astype(np.int32) % 10
    clean = random.integers(0, 256, (num, side, side, 3)).astype(np.uint8)
    change = random.uniform(-8 / 255, 8 / 255, clean.shape) * (fate > 0)[:, None, None, None]
    arrays = {
        "index": np.arange(num),
        "label": label,
        "clean_prediction": np.where(fate == 0, other, label).astype(np.int32),
        "robust": fate < 0,
        "broken_by": fate,
        "adversarial": np.clip(clean / np.float32(255) + change, 0, 1).astype(np.float32),
        "adversarial_prediction": np.where(fate < 0, label, other).astype(np.int32),
        "clean_margin": np.where(fate == 0, -1.0, 1.0 + fate).astype(np.float32),
    }
    left = [num - wrong - sum(broken[: k + 1]) for k in range(len(attacks))]
    robust = left[-1] if attacks else num - wrong
    results = {
        "num_examples": num,
        "clean_accuracy": (num - wrong) / num,
        "robust_accuracy": robust / num,
        "robust_accuracy_uint8": robust / num,
        "robust_accuracy_after": [{"attack": a, "robust_accuracy": n / num} for a, n in zip(attacks, left)],
        "norm": "Linf",
        "epsilon": 8 / 255,
        "epsilon_fraction": "8/255",
        "attacks": [
            {
                "name": a,
                "parameters": {"num_steps": 100},
                "seconds": 1.5,
                "examples_attacked": n + b,
                "examples_broken": b,
            }
            for a, n, b in zip(attacks, left, broken)
        ],
        "individual": False,
        "confidence_interval_95": wilson_interval(robust, num),
        "warnings": [],
        "seed": 0,
        "model": {"path": name, "sha256": "0" * 64},
        "dataset": {"name": "made", "split": "test", "num_examples": num},
        "versions": {"robust_keras": "0"},
        **changes,
        **dict(changed),
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    np.savez_compressed(folder / "examples.npz", **arrays)
    return str(folder), (clean, label)


def run(folder, *, steps=400):
    """Writes a run of `steps` rows, validated at each hundredth, with averaged weights and a best step."""
    rows = [
        "step,loss,learning_rate,examples_per_second,labelled_fraction,val_clean,val_robust,val_clean_averaged,val_robust_averaged"
    ]
    for step in range(1, steps + 1):
        accuracies = f"{0.5 + step / 1000},{0.2 + step / 2000},0.6,{0.3 + step / 4000}" if step % 100 == 0 else ",,,"
        rows.append(f"{step},{2.3 - step / 400},0.1,200.0,1.0,{accuracies}")
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "step-00000300.json").write_text("{}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.gin").write_text("DATASET = 'digits'\nNORM = 'Linf'\nEPSILON = '12/255'\nTRAIN_STEPS = 500\n")
    return str(folder)


def security(folder, **changes):
    """Writes a security.json into the folder of an evaluation; `changes` are of what it is of."""
    curve = [(0, "0", 0.85), (8 / 255, "8/255", 0.55), (32 / 255, "32/255", 0.0)]
    points = [{"epsilon": e, "epsilon_fraction": f, "robust_accuracy": a} for e, f, a in curve]
    noise = [{**point, "robust_accuracy": 0.8} for point in points]
    checks = [
        {"name": "unbounded_attack_wins", "passed": True, "told": "0.00 % are left at 1."},
        {"name": "more_steps_no_worse", "passed": False, "told": "5 steps leave less than 50."},
        {"name": "black_box_weaker", "passed": None, "told": "No attack without gradients ran."},
    ]
    found = {"format": 1, "norm": "Linf", "num_examples": 60, "attack": "pgd", "curve": points, "random_noise": noise}
    results = json.loads((folder / "results.json").read_text())
    subject = {"model": results["model"]["sha256"], "images": (results["dataset"] or {}).get("sha256")}
    subject |= {name: results[name] for name in ("norm", "epsilon", "seed")}
    told = {"checks": checks, "told": "The curve reaches 0 at 32/255.", "subject": {**subject, **changes}}
    (folder / "security.json").write_text(json.dumps({**found, **told}))
