"""Importing as a user types it."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import call

from robust_keras.commands import evaluate, import_checkpoint
from robust_keras.saved_models import claims, load
from robust_keras.saved_models.weights_in import published
from tests.oracles import checkpoint_inputs
from tests.saved_models.weights_in import written
from tests.saved_models.weights_in.conftest import recorded, recorded_weights  # noqa: F401
from tests.saved_models.weights_in.download_test import server  # noqa: F401


@pytest.fixture
def weights(recorded_weights):  # noqa: F811
    return recorded_weights("torch", "wrn_10_1")


def import_(monkeypatch, *args):
    call(monkeypatch, import_checkpoint, *args)


def test_a_checkpoint_becomes_a_saved_model_with_its_card(tmp_path, monkeypatch, capsys, weights, recorded):  # noqa: F811
    named = {f"module.{name}": array for name, array in weights.items()}
    written.save_torch(tmp_path / "model.pt", named, nested=lambda tensors: {"state_dict": tensors})
    output = tmp_path / "imported"
    import_(
        monkeypatch,
        f"--checkpoint={tmp_path / 'model.pt'}",
        "--dataset=cifar10",
        "--activation=swish",
        f"--output={output}",
    )
    said = capsys.readouterr().out
    assert (
        f"a WRN-10-1 of 10 classes, silu, for cifar10, all of its 39 tensors, 7 of no use to it left out: {output}"
        in said
    )
    assert f"python scripts/evaluate.py --saved_model={output} --dataset=cifar10" in said
    logits_fn = load.load_logits_fn(str(output))
    logits = recorded["torch"]["wrn_10_1/logits"]
    ours = logits_fn(tf.constant(checkpoint_inputs.images("cifar10")))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    card = json.loads((output / "model_card.json").read_text())
    assert card["source"]["key"] == "state_dict.module" and card["source"]["file"] == "model.pt"
    assert len(card["source"]["sha256"]) == 64 and card["architecture"] == "WRN-10-1" and "published" not in card
    output = tmp_path / "model.keras"
    flags = ["--dataset=cifar10", "--activation=silu", "--architecture=wrn-10-1", "--key=state_dict"]
    import_(monkeypatch, f"--checkpoint={tmp_path / 'model.pt'}", *flags, f"--output={output}")
    ours = keras.models.load_model(output)(checkpoint_inputs.images("cifar10"))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_one_by_name_is_downloaded_and_measured_next_to_what_was_published(
    tmp_path,
    monkeypatch,
    capsys,
    weights,
    server,  # noqa: F811
):
    handler, url = server
    written.save_torch(tmp_path / "served.pt", weights)
    handler.content = (tmp_path / "served.pt").read_bytes()
    monkeypatch.setattr(published, "PLACE", url.rpartition("/")[0])
    known = published.Published("cifar10_linf_wrn10-1_with", 12.5, 6.25, published.GOWAL_2020)
    monkeypatch.setitem(published.PUBLISHED, known.name, known)
    monkeypatch.chdir(tmp_path)
    import_(monkeypatch, f"--published={known.name}", "--output=imported")
    said = capsys.readouterr().out
    assert "nobody has published it" in said and f"{len(handler.content):,} bytes, SHA-256" in said
    assert (
        "Published, arXiv:2010.03593: 12.50 % clean, 6.25 % under AutoAttack in Linf 8/255, on all test images." in said
    )
    card = json.loads((tmp_path / "imported" / "model_card.json").read_text())
    assert card["published"]["robust_accuracy"] == 0.0625 and card["source"]["url"] == known.url
    images = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", image=images, label=np.arange(4))
    attack = f"--gin_file={import_checkpoint.__file__.rpartition('/robust_keras/')[0]}/gin/eval/pgd20.gin"
    data = [f"--dataset=npz:{tmp_path / 'images.npz'}", "--split=train"]
    call(
        monkeypatch,
        evaluate,
        "--saved_model=imported",
        *data,
        attack,
        "--gin_param=pgd.num_steps = 1",
        "--workdir=eval",
    )
    line = "Published, arXiv:2010.03593: clean 12.50 %, robust 6.25 % (AutoAttack, Linf 8/255, 10,000 images)"
    assert line in capsys.readouterr().out
    claimed = {}
    monkeypatch.setattr(claims, "attach", lambda directory, **options: claimed.update(options))
    import_(monkeypatch, f"--published={known.name}", "--output=claimed", "--evaluation=eval")
    card = json.loads((tmp_path / "claimed" / "model_card.json").read_text())
    assert claimed["evaluation"] == "eval" and card["evaluation"]["num_examples"] == len(claimed["load_images"]({})[1])
    capsys.readouterr()
    for flags, match in (
        (["--dataset=cifar100"], "Expected --dataset=cifar10, as of the published model. Received: cifar100"),
        (["--activation=relu"], "Expected --activation=silu"),
        (["--architecture=WRN-16-1"], "Expected --architecture=WRN-10-1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            import_(monkeypatch, f"--published={known.name}", "--output=other", *flags)
        assert stopped.value.code == 2 and match in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, match",
    [
        ([], "Expected --checkpoint=FILE or --published=NAME"),
        (["--published=other"], "Expected --published out of cifar10_linf_wrn70-16_with"),
        (["--checkpoint=nowhere.pt", "--activation=silu"], "Expected --dataset"),
        (
            ["--checkpoint=nowhere.pt", "--dataset=cifar10"],
            "Expected --activation. Received: none; no checkpoint says it",
        ),
        (["--checkpoint=text.pt", "--dataset=cifar10", "--activation=silu"], "which begins with b'A text'"),
        (["--checkpoint=nowhere.pt", "--dataset=cifar10", "--activation=silu"], "nowhere.pt, which does not exist"),
        (
            [
                "--checkpoint=model.pt",
                "--dataset=cifar10",
                "--activation=silu",
                "--output=a.keras",
                "--evaluation=eval",
            ],
            "--evaluation with a SavedModel alone",
        ),
        (["--checkpoint=.", "--dataset=cifar10", "--activation=silu"], "Expected a regular file"),
        (["--checkpoint=model.pt", "--dataset=cifar100", "--activation=silu"], "logits of 100 classes"),
        (["--checkpoint=model.pt", "--dataset=cifar10", "--activation=silu", "--architecture=WRN-28-10"], "a WRN-10-1"),
        (["--checkpoint=model.pt", "--dataset=mnist", "--activation=silu"], "init_conv.weight of shape"),
        (
            ["--checkpoint=model.pt", "--dataset=cifar10", "--activation=silu", "--output=text.pt"],
            "a new file or folder",
        ),
    ],
)
def test_bad_input_leaves_one_line_and_nothing_else(tmp_path, monkeypatch, capsys, weights, flags, match):
    monkeypatch.chdir(tmp_path)
    written.save_torch(tmp_path / "model.pt", weights)
    (tmp_path / "text.pt").write_text("A text")
    output = [] if any("--output" in flag for flag in flags) else ["--output=new"]
    with pytest.raises(SystemExit) as stopped:
        import_(monkeypatch, *flags, *output)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and match in line
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.pt", "text.pt"]
