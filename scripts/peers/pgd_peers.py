"""PGD of four other libraries, next to `scripts/benchmark.py pgd`.

    python3 -m venv torch_env && torch_env/bin/pip install numpy torch
    torch_env/bin/pip install foolbox adversarial-robustness-toolbox packaging torchattacks
    python scripts/benchmark.py pgd --network=FILE.keras --dataset=cifar10 --data_dir=DIR \\
        --against='torch_env/bin/python scripts/peers/pgd_peers.py --library=torchattacks'

foolbox, art (the adversarial-robustness-toolbox) and torchattacks attack the twin, in plain PyTorch, of the WRN that is
handed over; cleverhans, in this package's own environment, attacks the .keras file of --network itself. The logits have
to be the same to 1e-4 before anything is timed. Each library does it as its documentation calls it, in the batches of
the request.
"""

import argparse
import fractions

import answering
import numpy as np

LIBRARIES = ("cleverhans", "foolbox", "art", "torchattacks")


def of_cleverhans(args, given, epsilon, step_size, settings):
    """`(x, labels) -> x_adv` on batches, arrays NHWC, and the network's predictions."""
    import tensorflow as tf
    from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

    from robust_keras.saved_models import opening

    network = opening.load_keras(args.network)

    def logits_fn(x):
        return network(x, training=False)

    def attack(x, labels):
        return projected_gradient_descent(
            logits_fn,
            tf.constant(x),
            epsilon,
            step_size,
            settings["attack_steps"],
            np.inf,
            clip_min=0.0,
            clip_max=1.0,
            y=tf.constant(labels),
            rand_init=1.0,
            sanity_checks=False,
        ).numpy()

    difference = np.abs(network.predict(given["images"], verbose=0) - given["logits"]).max()
    if not difference <= 1e-4:
        raise ValueError(f"Expected logits within 1e-4. Received: a difference of {difference}")
    return attack, lambda x: network.predict(x, verbose=0).argmax(-1)


def of_torch(args, given, epsilon, step_size, settings):
    """The same of the libraries for PyTorch."""
    import torch
    import torch_network

    network = torch_network.of_weights(given)
    torch_network.checked(network, given)
    if args.channels_last:
        network = network.to(memory_format=torch.channels_last)
    make = {"foolbox": _foolbox, "art": _art, "torchattacks": _torchattacks}[args.library]
    run = make(network, epsilon, step_size, settings)

    def attack(x, labels):
        x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
        return np.moveaxis(np.asarray(run(x, torch.from_numpy(labels).long())), 1, -1)

    def predict(x):
        with torch.no_grad():
            return network(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))).argmax(1).numpy()

    return attack, predict


def _foolbox(network, epsilon, step_size, settings):
    import foolbox

    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=settings["attack_steps"], random_start=True)
    return lambda x, labels: attack(model, x, labels, epsilons=epsilon)[1]


def _art(network, epsilon, step_size, settings):
    import torch
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        network,
        torch.nn.CrossEntropyLoss(),
        (3, 32, 32),
        settings["num_classes"],
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf,
        eps=epsilon,
        eps_step=step_size,
        max_iter=settings["attack_steps"],
        num_random_init=1,
        batch_size=settings["batch_size"],
        verbose=False,
    )
    return lambda x, labels: attack.generate(x.numpy(), labels.numpy())


def _torchattacks(network, epsilon, step_size, settings):
    import torchattacks

    attack = torchattacks.PGD(network, eps=epsilon, alpha=step_size, steps=settings["attack_steps"], random_start=True)
    return attack


def prepare(args, request):
    """A function that attacks all images, and one that counts what is left."""
    settings, given = request["settings"], dict(np.load(request["given"]))
    settings["num_classes"] = given["logits"].shape[-1]
    epsilon, step_size = (float(fractions.Fraction(str(settings[name]))) for name in ("epsilon", "step_size"))
    make = of_cleverhans if args.library == "cleverhans" else of_torch
    attack, predict = make(args, given, epsilon, step_size, settings)
    images, labels, size = given["images"], given["labels"], settings["batch_size"]

    def run():
        batches = range(0, len(images), size)
        return np.concatenate([attack(images[k : k + size], labels[k : k + size]) for k in batches])

    return run, lambda x_adv: {"num_robust": int((predict(x_adv) == labels).sum())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, choices=LIBRARIES, help="whose PGD")
    parser.add_argument("--channels_last", action="store_true", help="a PyTorch network in this memory format")
    parser.add_argument("--network", help="the .keras file, for cleverhans")
    args = parser.parse_args()
    answering.answer(lambda request: prepare(args, request))


if __name__ == "__main__":
    main()
