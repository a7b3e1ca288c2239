"""Records the logits of the authors' own networks, of PyTorch and of JAX, with weights of `checkpoint_inputs`.

Needs a checkout of https://github.com/google-deepmind/deepmind-research, and in environments of their own PyTorch, or JAX,
dm-haiku, chex, safetensors and tensorflow-datasets:

    torch_env/bin/python record_checkpoints.py torch --checkout deepmind-research --output checkpoints_torch.npz
    haiku_env/bin/python record_checkpoints.py haiku --checkout deepmind-research --output checkpoints_haiku.npz

The output holds, for each network, the names, shapes and kinds of its weights, as JSON, and its logits, and a few small
files of these libraries.
"""

import argparse
import json
import sys

import checkpoint_inputs
import numpy as np


def record_torch(network, depth, width, activation, dataset):
    import torch
    from adversarial_robustness.pytorch import model_zoo

    settings = {"depth": depth, "width": width, "activation_fn": torch.nn.ReLU}
    if activation == "silu":
        settings["activation_fn"] = model_zoo.Swish
    if dataset == "mnist":
        settings |= {"num_classes": 10, "mean": 0.5, "std": 0.5, "padding": 2, "num_input_channels": 1}
    elif dataset == "cifar10":
        settings |= {"num_classes": 10, "mean": model_zoo.CIFAR10_MEAN, "std": model_zoo.CIFAR10_STD}
    else:
        settings |= {"num_classes": 100, "mean": model_zoo.CIFAR100_MEAN, "std": model_zoo.CIFAR100_STD}
    model = getattr(model_zoo, network)(**settings).eval()

    def kind(name, tensor):
        if tensor.dtype == torch.int64:
            return "count"
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            return "scale"
        return "kernel" if tensor.ndim > 1 else "offset"

    shapes = {name: (list(tensor.shape), kind(name, tensor)) for name, tensor in model.state_dict().items()}
    arrays = checkpoint_inputs.weights(shapes)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    x = torch.from_numpy(checkpoint_inputs.images(dataset)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return shapes, model(x).numpy()


def record_haiku(network, depth, width, activation, dataset):
    import haiku as hk
    import jax
    import jax.numpy as jnp
    from adversarial_robustness.jax import datasets, model_zoo

    @hk.transform_with_state
    def model_fn(x, is_training=False):
        classes = 100 if dataset == "cifar100" else 10
        name = {"silu": "swish"}.get(activation, activation)
        model = getattr(model_zoo, network)(num_classes=classes, depth=depth, width=width, activation=name)
        return model(getattr(datasets, f"{dataset}_normalize")(x), is_training=is_training)

    def kind(name):
        if name.endswith("counter"):
            return "count"
        if name.endswith("scale") or "var_ema" in name:
            return "scale"
        return "kernel" if name.endswith("/w") else "offset"

    x = jnp.asarray(checkpoint_inputs.images(dataset))
    trees = model_fn.init(jax.random.PRNGKey(0), x, is_training=True)
    flat = [{f"{m}|{n}": v for m, leaves in tree.items() for n, v in leaves.items()} for tree in trees]
    shapes = {name: (list(v.shape), kind(name.replace("|", "/"))) for tree in flat for name, v in tree.items()}
    arrays = checkpoint_inputs.weights(shapes)
    filled = [{m: {n: arrays[f"{m}|{n}"] for n in leaves} for m, leaves in tree.items()} for tree in trees]
    return shapes, np.asarray(model_fn.apply(*filled, None, x)[0])


def torch_files():
    """Small files as PyTorch writes them, of what is in `checkpoint_inputs.NUMBERS`."""
    import argparse as settings
    import io

    import torch

    numbers = torch.tensor(checkpoint_inputs.NUMBERS)
    saved = {
        "parameter": {"a": torch.nn.Parameter(numbers)},
        "half": {
            "state_dict": {"a": numbers.half()},
            "args": settings.Namespace(lr=0.1, size=torch.Size([2])),
            "epoch": 3,
        },
        "bfloat16": {"a": numbers.bfloat16()},
        "double": {"a": numbers.double()},
        "transposed": {"a": numbers.t().contiguous().t()},
        "part": {"a": torch.cat([numbers, numbers])[2:, :]},
        "module": torch.nn.Sequential(torch.nn.BatchNorm2d(3)).state_dict() | {"a": numbers},
        "optimizer": {"a": numbers, "optimizer": torch.optim.SGD([torch.nn.Parameter(numbers)], 0.1).state_dict()},
    }
    files = {}
    for name, value in saved.items():
        for is_zip in (True, False):
            torch.save(value, file := io.BytesIO(), _use_new_zipfile_serialization=is_zip)
            files[name if is_zip else f"{name}_legacy"] = file.getvalue()
    return files


def haiku_files():
    """Small files as NumPy and safetensors write them, of what is in `checkpoint_inputs.NUMBERS`."""
    import io
    import pickle

    import jax.numpy as jnp
    import safetensors.numpy
    from haiku import data_structures

    numbers = np.array(checkpoint_inputs.NUMBERS, np.float32)
    saved = {
        "arrays": {"m": {"a": numbers}},
        "jax": {"m": {"a": jnp.asarray(numbers)}},
        "bfloat16": {"m": {"a": jnp.asarray(numbers, jnp.bfloat16)}},
        "fortran": {"m": {"a": np.asfortranarray(numbers)}},
        "mapping": data_structures.to_immutable_dict({"m": {"a": jnp.asarray(numbers)}}),
    }
    files = {"safetensors": safetensors.numpy.save({"a": numbers, "b": numbers.astype(np.float16)}, {"by": "me"})}
    for name, value in saved.items():
        pair = np.empty(2, object)
        pair[:] = [value, {}]
        np.save(file := io.BytesIO(), pair)
        files[name] = file.getvalue()
        for protocol in (2, 5):
            files[f"{name}_pickle{protocol}"] = pickle.dumps((value, {}), protocol)
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["torch", "haiku"])
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)
    jobs = checkpoint_inputs.TORCH if args.library == "torch" else checkpoint_inputs.HAIKU
    recorded = {}
    for name, job in jobs.items():
        shapes, logits = (record_torch if args.library == "torch" else record_haiku)(*job)
        recorded |= {f"{name}/weights": json.dumps(shapes), f"{name}/logits": logits}
    files = torch_files() if args.library == "torch" else haiku_files()
    recorded |= {f"files/{name}": np.frombuffer(content, np.uint8) for name, content in files.items()}
    np.savez_compressed(args.output, **recorded)


if __name__ == "__main__":
    main()
