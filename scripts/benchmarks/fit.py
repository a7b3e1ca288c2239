"""Measures what `fit` makes of a stock ResNet-20 on CIFAR-10: standard against adversarial training.

    python scripts/benchmark.py fit --workdir=DIR

Both networks have the same seed, batches and schedule. Of each, the last weights are measured, those that
`ModelCheckpoint` kept by `val_robust_accuracy`, and the averaged ones: by PGD-20 on the first `--num_pgd` test images,
and the last weights by AutoAttack on the first `--num_autoattack`. DIR keeps networks, logs and evaluations: what is
there is not trained again, and evaluations go on.
"""

import functools
import os
import time

from absl import flags

from benchmarks import timing

_RADIUS = "8/255"


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Trains what is missing, evaluates, and prints a line for each network."""
    import robust_keras as rk
    from robust_keras.data import sources

    workdir, num_pgd, num_autoattack = values.workdir, values.num_pgd, values.num_autoattack
    os.makedirs(workdir, exist_ok=True)
    train, test = (sources.load("cifar10", split, data_dir=values.data_dir) for split in ("train", "test"))
    x, y, held_out = train.images, train.labels, values.num_validation
    data = (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])
    networks: dict[str, str] = {}
    for objective in ("standard", "adversarial_training"):
        steps = values.attack_steps if objective != "standard" else 0
        schedule = {"epochs": values.epochs, "batch_size": values.batch_size, "attack_steps": steps}
        networks |= _trained(workdir, objective, *data, **schedule)
    for name, path in networks.items():
        evaluated = functools.partial(rk.evaluate, path, (test.images, test.labels), norm="Linf", epsilon=_RADIUS)
        found = evaluated(attacks="pgd20", num_examples=num_pgd, workdir=f"{path}.pgd20")
        row = {"name": name, "clean": found.clean_accuracy, "pgd20": found.robust_accuracy}
        line = f"clean {found.clean_accuracy:.2%}, PGD-20 {found.robust_accuracy:.2%} of {num_pgd}"
        if name.endswith("last"):
            started = time.perf_counter()
            found = evaluated(num_examples=num_autoattack, workdir=f"{path}.standard", baseline=False)
            line += f"; AutoAttack {found.robust_accuracy:.2%} of {num_autoattack}, {found.warnings or 'no warnings'}"
            row |= {"autoattack": found.robust_accuracy, "seconds": time.perf_counter() - started}
        print(line)
        bench.add(row)


def resnet20():
    """The network of He et al. 2016 for CIFAR-10 in Keras' own layers, with convolutions where a shortcut narrows."""
    import keras

    layers = keras.layers

    def convolution(x, filters, size, stride):
        x = layers.Conv2D(filters, size, stride, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    images = keras.Input((32, 32, 3))
    x = layers.Rescaling(4.0, offset=-2.0)(images)
    x = layers.ReLU()(convolution(x, 16, 3, 1))
    for filters in (16, 32, 64):
        for block in range(3):
            stride = 2 if block == 0 and filters > 16 else 1
            y = layers.ReLU()(convolution(x, filters, 3, stride))
            y = convolution(y, filters, 3, 1)
            x = x if x.shape == y.shape else convolution(x, filters, 1, stride)
            x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def _trained(workdir, objective, train_data, validation_data, *, epochs, batch_size, attack_steps):
    """Files of a network by name of its weights, trained by `fit` unless they are there."""
    import keras

    import robust_keras as rk
    from robust_keras.attacks.pgd import pgd
    from robust_keras.data import augmentation

    files = {f"{objective}, {part}": f"{workdir}/{objective}_{part}.keras" for part in ("last", "best", "averaged")}
    last, best, averaged = files.values()
    if all(map(os.path.exists, files.values())):
        return files
    keras.utils.set_random_seed(0)
    attack = None
    if attack_steps:
        threat = rk.threat(norm="Linf", epsilon=_RADIUS)
        attack = functools.partial(
            pgd,
            threat=threat,
            loss_fn=rk.losses.cross_entropy,
            num_steps=attack_steps,
            step_size=1.5 * threat.epsilon / attack_steps,
        )
    model = rk.AdversarialModel(
        resnet20(),
        norm="Linf",
        epsilon=_RADIUS,
        objective=objective,
        attack=attack,
        augmentation=augmentation.crop_and_flip,
    )
    num_steps = epochs * -(-len(train_data[0]) // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.01, num_steps - num_steps // 5, warmup_target=0.1, warmup_steps=num_steps // 5
    )
    model.compile(rk.NesterovSGD(schedule, momentum=0.9, weight_decay=5e-4))
    averaging = rk.WeightAveraging(tau=0.995)
    keeping = keras.callbacks.ModelCheckpoint(best, monitor="val_robust_accuracy", mode="max", save_best_only=True)
    logging = keras.callbacks.CSVLogger(f"{workdir}/{objective}.csv")
    started = time.perf_counter()
    model.fit(
        *train_data,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=validation_data,
        callbacks=[averaging, keeping, logging],
        verbose=2,
    )
    seconds = time.perf_counter() - started
    print(f"{objective}: {num_steps:,} steps of {batch_size} images in {seconds:.0f} s", flush=True)
    averaging.averaged_model.save(averaged)
    model.save(last)
    return files


def define_flags(values):
    flags.DEFINE_string("workdir", None, "Where networks, logs and evaluations go.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where the prepared CIFAR-10 is, as TFDS has it.", flag_values=values)
    flags.DEFINE_integer("num_validation", 2000, "Training images held out.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("epochs", 2, "Of each training.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Images of a step.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("attack_steps", 3, "Steps of PGD in a step of training.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("num_pgd", 1000, "Test images for PGD-20.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("num_autoattack", 256, "Test images for AutoAttack.", flag_values=values, lower_bound=1)
    flags.mark_flags_as_required(["workdir"], flag_values=values)
