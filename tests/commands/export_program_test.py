"""Programs that travel: a folder that runs where there are JAX and NumPy alone, and what it leaves for the project."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import arguments, call, refused, rows

import gin
from robust_keras import storage
from robust_keras.commands import bound_functions, export, export_program, train

pytest.importorskip("jax")
from robust_keras.engines.on_jax import artifacts, runner
from robust_keras.training import metrics_log

# Linf steps take signs, of which rounding decides some.
L2 = {"NORM": "'L2'", "EPSILON": "'128/255'", "training/pgd.step_size": "'64/255'"}
# In place of an environment that has JAX and NumPy alone.
BARE = """
import runpy, sys
for name in {missing}:
    sys.modules[name] = None
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@keras.saving.register_keras_serializable(package="export_program_test")
class OnTheHost(keras.layers.Layer):
    def call(self, x):
        return tf.ensure_shape(tf.py_function(lambda values: values, [x], tf.float32), x.shape)


def on_the_host(*, num_classes, mean, std, input_shape):
    images = keras.Input(input_shape)
    return keras.Model(images, keras.layers.Dense(num_classes)(keras.layers.Flatten()(OnTheHost()(images))))


with gin.unlock_config():
    gin.external_configurable(bound_functions.partial(on_the_host), "on_the_host", module="export_program_test")


@pytest.fixture(scope="module")
def one(images, tmp_path_factory):
    """The folder of a run by TensorFlow, on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, train, *arguments(images, workdir, **L2), "--strategy=one")
    return workdir


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """The folder of its program."""
    workdir = tmp_path_factory.mktemp("programs") / "at"
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, export_program, *arguments(images, workdir, **L2))
    return workdir


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(made, tmp_path / "copied")


def go(folder, *args, missing=("tensorflow", "keras", "robust_keras", "absl", "gin")):
    """Runs a folder's program in a process of its own."""
    program = BARE.format(missing=missing)
    command = [sys.executable, "-c", program, folder / "run.py", *args]
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)


def left(workdir, step):
    """The arrays of a run's state after a step."""
    arrays = storage.read(workdir / "checkpoints", step).arrays
    return {name: each for name, each in arrays.items() if not name.startswith("best/")}


def assert_same(found, wanted):
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        name: (each.shape, each.dtype) for name, each in wanted.items()
    }
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_program_trains_and_evaluates_as_the_run_does(made, one, tmp_path, monkeypatch):
    done = go(made, "--evaluate", "--time", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "Computing on cpu, by JAX" in done.stdout and "A step of 8 images takes " in done.stdout
    wanted = left(one, 6)
    assert {name.partition("/")[0] for name in wanted} == {"step", "weights", "momentum", "averages"}
    assert wanted["step"] == 6 and abs(wanted["weights/logits/kernel"]).max() > 1e-3
    assert_same(left(tmp_path / "out", 6), wanted)
    found, other = (storage.read_newest(path / "checkpoints").info for path in (tmp_path / "out", one))
    assert found["last_validation"] == other["last_validation"] == found["best"]
    assert found["description"] == other["description"] and found["unfinished"] is None
    assert [row["loss"] for row in found["rows"]] == pytest.approx([row["loss"] for row in other["rows"]], rel=1e-5)
    assert [row["learning_rate"] for row in found["rows"]] == [row["learning_rate"] for row in other["rows"]]
    assert set(found["rows"][-1]) == set(metrics_log.METRICS)
    # The project has nothing left to do but to export it.
    call(monkeypatch, export, f"--workdir={tmp_path / 'out'}", f"--output={tmp_path / 'exported'}")
    assert (tmp_path / "exported" / "model_card.json").exists()


def test_train_goes_on_from_where_a_program_stopped(made, one, images, tmp_path, monkeypatch, capsys):
    assert go(made, "--steps=3", "--out=out").returncode == 0
    out = made / "out"
    unfinished = storage.read_newest(out / "checkpoints").info["unfinished"]
    assert unfinished["step"] == 3  # It was not told to evaluate.
    call(monkeypatch, train, *arguments(images, out, **L2), "--strategy=one")
    assert "Resuming from step 3" in capsys.readouterr().out
    assert_same(left(out, 6), left(one, 6))
    columns = ("step", "val_clean", "val_robust_averaged")
    assert [[row[name] for name in columns] for row in rows(out)] == [
        [row[name] for name in columns] for row in rows(one)
    ]
    shutil.rmtree(out)


def test_a_program_goes_on_from_a_run(images, one, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(one, tmp_path / "run")
    for path in [*run.glob("checkpoints/step-00000005.*"), *run.glob("checkpoints/step-00000006.*")]:
        path.unlink()
    told = [*arguments(images, tmp_path / "program", **L2), f"--from_run={run}"]
    call(monkeypatch, export_program, *told, "--num_images=5")
    assert "Batches of 2 steps after step 4, 5 images held out" in capsys.readouterr().out
    done = go(tmp_path / "program", "--out=out", "--evaluate")
    assert done.returncode == 0 and "Step 6: val_clean " in done.stdout
    out = tmp_path / "program" / "out"
    assert_same(left(out, 6), left(one, 6))
    info, before = storage.read_newest(out / "checkpoints").info, storage.read(run / "checkpoints", 4).info
    # Five images are not the run's validation, which is left to do.
    assert info["best"] == before["best"] and info["unfinished"]["step"] == 6
    assert storage.read_newest(out / "best").step == before["best"]["step"]
    assert [row["step"] for row in info["rows"]] == [1, 2, 3, 4, 5]
    another = [*arguments(images, tmp_path / "another", **{**L2, "SEED": 5}), f"--from_run={run}"]
    assert "SEED" in refused(monkeypatch, capsys, export_program, *another)
    finished = [*arguments(images, tmp_path / "finished", **L2), f"--from_run={one}"]
    assert "steps left. Received: one that has taken all 6" in refused(monkeypatch, capsys, export_program, *finished)
    empty = [*arguments(images, tmp_path / "empty", **L2), f"--from_run={tmp_path}"]
    assert "Expected a run with a snapshot" in refused(monkeypatch, capsys, export_program, *empty)


def test_the_manifest_says_what_is_there(made):
    manifest = json.loads((made / "manifest.json").read_text())
    files = {path.name for path in made.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == files and "unfinished" not in files
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    assert set(manifest["programs"]) == {"step", "correct", "correct_averaged"}
    assert list(manifest["programs"]["step"]["values"]) == ["labelled_fraction", "loss"]
    assert manifest["arrays"]["batches"]["image"] == ["uint8", 6, 8, 8, 8, 3] and manifest["batch_size"] == 8
    assert manifest["arrays"]["images"]["seeds"] == ["int32", 8, 2] and manifest["has_all_images"]
    assert set(manifest["made_by"]) == {"robust_keras", "tensorflow", "keras", "jax", "numpy"}
    assert "train.train_steps" in manifest["recipe"]
    assert "stablehlo.convolution" in (made / "step.mlir").read_text()
    assert (made / "run.py").read_text() == pathlib.Path(runner.__file__).read_text()


def test_an_older_jax_can_read_it(made):
    """JAX 0.7.2 reads StableHLO 1.13 and older ones."""
    for entry in json.loads((made / "manifest.json").read_text())["programs"].values():
        assert tuple(map(int, entry["stablehlo"].split("."))) <= (1, 0, 0)


def test_folders_that_hold_anything_are_left_alone(made, images, tmp_path, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    line = refused(monkeypatch, capsys, export_program, *arguments(images, made, **L2))
    assert "Expected an empty or new folder" in line and "which holds a program" in line
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    (tmp_path / "notes").write_text("mine")
    assert "which holds notes" in refused(monkeypatch, capsys, export_program, *arguments(images, tmp_path, **L2))


def test_what_was_interrupted_is_written_anew(copied, images, monkeypatch):
    (copied / "manifest.json").unlink()
    (copied / "unfinished").touch()
    (copied / "batches.npz").write_bytes(b"half")
    call(monkeypatch, export_program, *arguments(images, copied, **L2), "--num_steps=2")
    assert runner.read_manifest(str(copied))["num_steps"] == 2
    assert go(copied, "--steps=0").returncode == 0


def test_what_does_not_lower_is_named(images, tmp_path, monkeypatch, capsys):
    told = arguments(images, tmp_path / "new", **{"train.model": "@on_the_host()"})
    line = refused(monkeypatch, capsys, export_program, *told)
    assert "Expected operations that XLA compiles. Received: no kernel of XLA: EagerPyFunc" in line
    assert "export_program_test.py" in line and not list((tmp_path / "new").glob("manifest.json"))


def test_without_jax_the_extra_is_named(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)
    line = refused(monkeypatch, capsys, export_program, *arguments(images, tmp_path / "new"))
    assert "Expected the package jax" in line


@pytest.mark.parametrize("flag", ["--num_steps=0", "--num_images=0"])
def test_what_is_no_number_of_anything_is_refused(images, tmp_path, monkeypatch, capsys, flag):
    assert "integer >= 1" in refused(monkeypatch, capsys, export_program, *arguments(images, tmp_path / "new"), flag)


# The runner.


def test_without_jax_the_runner_says_so(made):
    done = go(made, missing=("jax",))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: Expected JAX 0.7.2 or newer, and NumPy." in done.stderr


def test_errors_of_the_runner_are_a_line(copied):
    (copied / "state.npz").write_bytes(b"another")
    for arguments_, code in ((["--steps=x"], 2), ([], 2)):
        done = go(copied, *arguments_)
        assert done.returncode == code and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["state.npz", "batches.npz", "step.stablehlo", "images.npz", "correct.stablehlo"])
def test_a_changed_file_is_refused(copied, name):
    with open(copied / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=rf"^Expected the SHA-256 that the manifest has of .*{name}"):
        runner.run(str(copied), num_steps=1, evaluate=True)


def change(folder, **changes):
    """Changes the manifest, and has it know the files as they are."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "another"}, "Received: format 'another'"),
        ({"format_version": 2}, "Received: format .* 2"),
        ({"num_steps": "6"}, "Received: num_steps '6'"),
        ({"num_steps": 7}, "Received: other shapes of image for step"),
        ({"programs": {"../step": {}}}, "Received: programs"),
        (
            {"programs": {"step": {"state": ["weights/none"], "batch": {}, "values": {}}}},
            "nothing named 'weights/none'",
        ),
    ],
    ids=["format", "version", "text", "more", "path", "name"],
)
def test_another_manifest_is_refused(copied, changes, message):
    change(copied, **changes)
    with pytest.raises(ValueError, match=rf"^Expected .*{message}"):
        runner.run(str(copied))


def test_no_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^Expected a folder that export_program.py has finished. Received: "):
        runner.run(str(tmp_path))


def test_pickles_are_not_read(copied):
    np.savez(copied / "state.npz", step=np.array([print], dtype=object))
    change(copied)
    with pytest.raises(ValueError, match=r"^Expected arrays of numbers in .*allow_pickle=False"):
        runner.run(str(copied))


def test_arrays_of_other_shapes_are_refused(copied):
    with np.load(copied / "state.npz") as file:
        arrays = {**file, "step": np.int32(0)}
    np.savez(copied / "state.npz", **arrays)
    change(copied)
    with pytest.raises(ValueError, match=r"^Expected arrays as the manifest has them in "):
        runner.run(str(copied))


def test_programs_of_other_arrays_are_refused(copied):
    shutil.copy(copied / "correct.stablehlo", copied / "step.stablehlo")
    change(copied)
    with pytest.raises(ValueError, match=r"^Expected a program of the manifest's arrays in .*step.stablehlo"):
        runner.run(str(copied))
    (copied / "step.stablehlo").write_bytes(b"no program")
    change(copied)
    with pytest.raises(ValueError, match=r"^Expected a StableHLO program in .*step.stablehlo"):
        runner.run(str(copied))


def test_programs_that_call_what_is_outside_are_refused(copied):
    from jax.extend.mlir.dialects import stablehlo
    from jax.interpreters import mlir

    with mlir.make_ir_context():
        module = mlir.ir.Module.parse(
            "func.func public @main(%0: tensor<f32>) -> tensor<f32> {"
            "%1 = stablehlo.custom_call @xla_python_cpu_callback(%0) : (tensor<f32>) -> tensor<f32> return %1 : tensor<f32> }"
        )
        (copied / "step.stablehlo").write_bytes(stablehlo.serialize_portable_artifact(module, "1.0.0"))
    change(copied)
    with pytest.raises(ValueError, match="^Expected operations of StableHLO that compute. .*xla_python_cpu_callback"):
        runner.run(str(copied))


def test_nothing_is_overwritten_and_no_batch_invented(made, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match=r"^Expected an empty or new folder for --out"):
        runner.run(str(made), out=str(tmp_path))
    with pytest.raises(ValueError, match=r"^Expected 0 to 6 steps, .* Received: 7"):
        runner.run(str(made), num_steps=7)


def test_what_is_not_finite_is_not_written(copied, tmp_path):
    with np.load(copied / "state.npz") as file:
        arrays = dict(file)
    arrays["weights/logits/bias"][:] = np.nan
    np.savez(copied / "state.npz", **arrays)
    change(copied)
    with pytest.raises(FloatingPointError, match=r"^Expected a finite loss. Received: nan at step 1$"):
        runner.run(str(copied), out=str(tmp_path / "out"))
    with pytest.raises(FloatingPointError, match=r"^Expected finite weights. Received: weights/logits/bias"):
        runner.run(str(copied), num_steps=0, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float32", "uint32"])
def test_types_are_named_as_stablehlo_does(dtype):
    import jax

    with artifacts.running():
        text = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((2, 3), dtype)).as_text()
    assert runner.tensor_type(dtype, 2, 3) in text
