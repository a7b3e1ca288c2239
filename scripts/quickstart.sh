#!/usr/bin/env bash
# Trains a robust classifier of digits and its plainly trained twin, attacks both at one radius, and exports them.
#   bash scripts/quickstart.sh
# Everything lands in .venv/ and runs/; running it again goes on where it stopped. STRATEGY=jax computes by JAX.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
STRATEGY=${STRATEGY:-one}
VARIANT=cpu
SETUP=$(cksum setup.py | cut -d" " -f1)
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then VARIANT=gpu; fi
if [ "$STRATEGY" = jax ]; then VARIANT=jax; fi
if [ ! -e "$VENV/installed-$VARIANT-$SETUP" ]; then
  echo "Installing robust_keras[$VARIANT] into $VENV"
  python3 -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$VARIANT]"
  touch "$VENV/installed-$VARIANT-$SETUP"
fi
export TF_ENABLE_ONEDNN_OPTS=${TF_ENABLE_ONEDNN_OPTS:-1} TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
PYTHON=$VENV/bin/python
started=$(date +%s)

for recipe in quickstart_plain quickstart; do
  echo "== Training gin/$recipe.gin"
  "$PYTHON" scripts/train.py --gin_file="gin/$recipe.gin" --workdir="runs/$recipe" --strategy="$STRATEGY"
  echo "== Attacking runs/$recipe/saved_model"
  "$PYTHON" scripts/evaluate.py --saved_model="runs/$recipe/saved_model" --dataset=digits \
    --gin_file=gin/eval/pgd40.gin --gin_file=gin/threats/linf_digits.gin --workdir="runs/$recipe/pgd40" \
    --strategy="$STRATEGY"
done

echo "== Loading the SavedModel with TensorFlow alone"
"$PYTHON" - runs/quickstart <<'PYTHON'
import sys

import numpy as np
import tensorflow as tf

run = sys.argv[1]
serve = tf.saved_model.load(f"{run}/saved_model").signatures["serving_default"]
examples = np.load(f"{run}/pgd40/examples.npz")
predictions = serve(image=tf.constant(examples["adversarial"]))["logits"].numpy().argmax(axis=-1)
if "robust_keras" in sys.modules or not np.array_equal(predictions == examples["label"], examples["robust"]):
    sys.exit("The loaded model does not reproduce the evaluation")
print(f"It gives the measured verdicts on all {len(predictions)} attacked images.")
PYTHON

echo
"$PYTHON" scripts/report.py --workdir=runs/quickstart_plain/pgd40 --workdir=runs/quickstart/pgd40 --output=runs
echo
echo "Report of both:            runs/report.html"
echo "SavedModel and model card: runs/quickstart/saved_model"
echo "Learning curves:           runs/quickstart/metrics.csv, or tensorboard --logdir runs"
echo "Seconds after the install: $(($(date +%s) - started))"
