"""Packaging. `gin/` stands at the top of the checkout and inside the package of the wheel."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "robust_keras" / "__init__.py").read_text())[1]
DOCS = ["furo>=2024.8.6", "myst-parser>=4", "sphinx>=8"]
COMMANDS = (
    "train",
    "evaluate",
    "evaluate_checkpoints",
    "export",
    "export_program",
    "report",
    "reproduce",
    "pseudo_label",
    "check_tpu",
    "self_test",
    "import_checkpoint",
    "inspect_model",
    "verify",
)

setuptools.setup(
    name="robust_keras",
    version=VERSION,
    description="Adversarial training and evaluation of image classifiers in TensorFlow 2 and Keras",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    url="https://github.com/robust-keras/robust_keras",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "adversarial training",
        "adversarial examples",
        "robustness",
        "AutoAttack",
        "TRADES",
        "TensorFlow",
        "Keras",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.14",
    packages=[*setuptools.find_packages(include=["robust_keras", "robust_keras.*"]), "robust_keras.gin"],
    package_dir={"robust_keras.gin": "gin"},
    package_data={
        "robust_keras": ["py.typed"],
        "robust_keras.data": ["digits.npz", "digits_LICENSE.txt"],
        "robust_keras.gin": ["*.gin", "*/*.gin", "*.csv"],
    },
    entry_points={
        "console_scripts": [
            f"robust-keras-{name.replace('_', '-')} = robust_keras.commands.{name}:command" for name in COMMANDS
        ]
    },
    # No TensorFlow: which variant is the installer's choice, and a plain requirement would replace a TPU wheel.
    install_requires=[
        "absl-py>=1.4",
        "gin-config>=0.5",
        "importlib-resources",
        "keras>=3.5",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "scipy>=1.11",
        "tensorboard>=2.18",
        "tensorflow-datasets>=4.9.6",
        "tqdm>=4.62",
    ],
    extras_require={
        "cpu": ["tensorflow-cpu>=2.18,<2.22"],
        "gpu": ["tensorflow[and-cuda]>=2.18,<2.22"],
        # TensorFlow makes the programs, from 2.19 on, and JAX runs them. Its range leaves an installed one alone, whose
        # jaxlib and libtpu fit the devices. 0.6.2 is the last for Python 3.10.
        "jax": ["tensorflow-cpu>=2.19,<2.22", "jax>=0.6.2"],
        # TensorFlow 2.20 made the gs:// file system an extra.
        "tpu": ["tensorflow-tpu[gcs-filesystem]>=2.18,<2.21"],
        # The first that works with NumPy 2 and TensorFlow's protobuf.
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "tf2onnx>=1.17"],
        "signing": ["model-signing>=1.1", "pyopenssl>=24"],
        "docs": DOCS,
        "test": [
            "cleverhans>=4",
            "jax>=0.6.2",
            "ipykernel>=6.29",
            "mypy==2.4.1",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            "setuptools>=77",
            *DOCS,
        ],
        "oracles": ["tensorflow-addons==0.23.0; python_version < '3.12'"],
    },
)
