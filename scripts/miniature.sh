#!/usr/bin/env bash
# The study in miniature: small networks in which the larger effects of adversarial training show, with seeds and intervals.
#   DATA_DIR=DIR bash scripts/miniature.sh
#   DATA_DIR=DIR bash scripts/miniature.sh standard averaging
# The parts are all, or those named, each with the adversarially trained networks that it is compared with. Everything lands in
# runs/miniature (RUNS names another folder), and running it again goes on where it stopped. SEEDS="10 11" are others than the
# study's, for a pilot. What it found is in docs/evidence.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PARTS="standard flattery few averaging margin pseudo"
for part in "$@"; do
  if [[ " $PARTS " != *" $part "* ]]; then
    echo "Expected parts out of $PARTS. Received: $part" >&2
    exit 2
  fi
done
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/miniature}
SEEDS=${SEEDS:-0 1 2}
STEPS=${STEPS:-250}
VALIDATE_EVERY=${VALIDATE_EVERY:-$STEPS}
IMAGES=${IMAGES:-500}
POLICY=${POLICY:-mixed_bfloat16}
: "${DATA_DIR:?Expected DATA_DIR=FOLDER, where CIFAR-10 is or is to be downloaded to}"
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
TIMEFORMAT="took %R s, %U + %S s of processors"
mkdir -p "$RUNS"

# CIFAR-10 as files that need no decoding: all of it, so few labelled images that a network can learn them by heart, and the rest.
if [ ! -e "$RUNS/split" ]; then
  "$PYTHON" - "$DATA_DIR" "$RUNS" <<'PYTHON'
import sys

import numpy as np

from robust_keras.data import sources

data_dir, folder = sys.argv[1:]
train, test = (sources.load("cifar10", split, data_dir=data_dir) for split in ("train", "test"))
order = np.random.RandomState(1).permutation(len(train.labels))
sets = {"all": (train, order), "few": (train, order[:512]), "rest": (train, order[512:]), "test": (test, slice(None))}
for name, (source, chosen) in sets.items():
    np.savez(f"{folder}/{name}.npz", image=source.images[chosen], label=source.labels[chosen])
PYTHON
  touch "$RUNS/split"
fi

# gin/scales/mini.gin with 250 steps, and weight averaging. The learning rate has to fall, as the paper's does: BatchNorm's moving
# statistics lag a hundred steps behind weights that never come to rest.
miniature=(
  --gin_file=gin/scales/mini.gin
  --gin_param="DATASET = 'npz:$RUNS/all.npz'"
  --gin_param="TRAIN_STEPS = $STEPS"
  --gin_param="TAU = 0.98"
  --gin_param="train.dtype_policy = '$POLICY'"
  --gin_param="training_data.num_validation = 128"
  --gin_param="train.validate_every = $VALIDATE_EVERY"
  --gin_param="train.checkpoint_every = $STEPS"
)
inner_attack=(--gin_param="training/pgd.num_steps = 3" --gin_param="training/pgd.step_size = '4/255'")
# gin/eval/aa_mt_mini.gin with 20 steps each.
attacks=(
  --gin_file=gin/eval/aa_mt_mini.gin
  --gin_param="apgd_ce/apgd.num_steps = 20"
  --gin_param="apgd_dlr/apgd.num_steps = 20"
  --gin_param="multi_targeted.num_steps = 20"
)
few=(--gin_param="DATASET = 'npz:$RUNS/few.npz'")

train() { # NAME SEED FLAG...
  local folder=$RUNS/$1/seed$2 name=$1 seed=$2
  shift 2
  if [ ! -e "$folder/trained" ]; then
    echo "== Training $name, seed $seed"
    time "$PYTHON" scripts/train.py --gin_file=gin/at.gin "$@" --gin_param="SEED = $seed" \
      --workdir="$folder" --strategy=one
    touch "$folder/trained"
  fi
}

attack() { # NAME SEED [MODEL [FLAG...]]
  local folder=$RUNS/$1/seed$2 model=${3:-$RUNS/$1/seed$2/saved_model} flags=("${@:4}")
  if [ ${#flags[@]} = 0 ]; then flags=("${attacks[@]}"); fi
  if [ ! -e "$folder/evaluation/results.json" ]; then
    echo "== Attacking $1, seed $2"
    time "$PYTHON" scripts/evaluate.py --saved_model="$model" --dataset="npz:$RUNS/test.npz" "${flags[@]}" \
      --num_examples="$IMAGES" --workdir="$folder/evaluation" --strategy=one
  fi
}

compare() { # NAME BASELINE
  local flags=() seed
  for seed in $SEEDS; do
    flags+=(--workdir="$RUNS/$1/seed$seed/evaluation" --baseline="$RUNS/$2/seed$seed/evaluation")
  done
  echo "== $1 against $2"
  "$PYTHON" scripts/report.py "${flags[@]}"
}

adversarial() {
  for seed in $SEEDS; do
    train adversarial "$seed" "${miniature[@]}" "${inner_attack[@]}"
    attack adversarial "$seed"
  done
}

standard() {
  adversarial
  for seed in $SEEDS; do
    train standard "$seed" --gin_file=gin/objectives/standard.gin "${miniature[@]}"
    attack standard "$seed"
  done
  compare adversarial standard
}

averaging() { # The raw weights of the networks whose averages `adversarial` has attacked.
  adversarial
  for seed in $SEEDS; do
    local raw=$RUNS/raw/seed$seed
    mkdir -p "$raw"
    if [ ! -e "$raw/exported" ]; then
      rm -rf "$raw/saved_model"
      "$PYTHON" scripts/export.py --workdir="$RUNS/adversarial/seed$seed" --weights=last --output="$raw/saved_model"
      touch "$raw/exported"
    fi
    attack raw "$seed"
  done
  compare adversarial raw
}

flattery() { # The same networks under PGD-40 alone.
  adversarial
  for seed in $SEEDS; do
    attack pgd40 "$seed" "$RUNS/adversarial/seed$seed/saved_model" --gin_file=gin/eval/pgd40.gin
  done
  compare adversarial pgd40
}

few() {
  adversarial
  for seed in $SEEDS; do
    train few "$seed" "${miniature[@]}" "${inner_attack[@]}" "${few[@]}"
    attack few "$seed"
  done
  compare adversarial few
}

margin() { # Also what PGD-40 leaves and AA+MT takes, next to the same of `adversarial`.
  flattery
  for seed in $SEEDS; do
    train margin "$seed" "${miniature[@]}" "${inner_attack[@]}" --gin_param="training/pgd.loss_fn = @margin()"
    attack margin "$seed"
    attack margin_pgd40 "$seed" "$RUNS/margin/seed$seed/saved_model" --gin_file=gin/eval/pgd40.gin
  done
  compare margin adversarial
  compare margin margin_pgd40
  echo "== From PGD-40 to AA+MT, margin less adversarial (the paper: a larger drop, Table 2)"
  "$PYTHON" - "$RUNS" $SEEDS <<'PYTHON'
import sys

import numpy as np

from robust_keras.evaluation import comparison, contrast, report

folder, *seeds = sys.argv[1:]


def stands(name):
    return np.stack([report.examples(f"{folder}/{name}/seed{seed}/evaluation")["robust"] for seed in seeds]) * 1.0


drops = stands("margin") - stands("margin_pgd40"), stands("adversarial") - stands("pgd40")
groups = [contrast.Group(drop, sign) for drop, sign in zip(drops, (1, -1))]
print(f"drops: {', '.join(f'{100 * drop.mean():+.2f} points' for drop in drops)}")
print(comparison.summary(contrast.compare(groups, expected=-1.0)))
PYTHON
}

pseudo() { # The few and, at 3:7, the images that a plain network trained on them is surest of.
  few
  local labels=$RUNS/pseudo_labels
  if [ ! -e "$labels/finished" ]; then
    echo "== Labelling"
    time "$PYTHON" scripts/pseudo_label.py --gin_file=gin/pseudo_label.gin --gin_file=gin/scales/mini.gin "${few[@]}" \
      --gin_param="POOL = 'npz:$RUNS/rest.npz'" --gin_param="TEST_SET = 'npz:$RUNS/test.npz'" \
      --gin_param="label_pool.sizes = (10000,)" --gin_param="label_pool.licence = 'CIFAR-10'" \
      --workdir="$labels" --strategy=one
    touch "$labels/finished"
  fi
  for seed in $SEEDS; do
    train pseudo "$seed" "${miniature[@]}" "${inner_attack[@]}" "${few[@]}" \
      --gin_param="EXTRA_DATA = 'tfrecord:$labels/10k/*.tfrecord'" --gin_param="batches.labelled_fraction = 0.3"
    attack pseudo "$seed"
  done
  compare pseudo few
}

for part in ${*:-$PARTS}; do "$part"; done
