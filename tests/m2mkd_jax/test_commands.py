"""`m2mkd`: the commands that use trained runs."""

import csv
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from meshes import one_device
from PIL import Image
from tiny import tiny_config

import m2mkd_jax
from common_jax import checkpoint
from common_jax.command_line import dispatch
from m2mkd_jax import pretrained
from m2mkd_jax.commands import COMMANDS
from m2mkd_jax.config import SourcesConfig
from m2mkd_jax.data import digits
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.phases.pipeline import run_phase
from m2mkd_jax.trained import choose_batch, open_run, read_run

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compiled_quickly):
    """A meta model, two modules in it, and a whole student, each trained for some steps."""
    folder = tmp_path_factory.mktemp("runs")
    sources = SourcesConfig(meta=str(folder / "meta"))
    configs = {
        "meta": tiny_config("pretrain_meta"),
        "modules": dataclasses.replace(tiny_config("train_module"), module="0+2", sources=sources),
        "student": dataclasses.replace(
            tiny_config("end_to_end"), ood=OodConfig(source="digits_r", split="test")
        ),
    }
    for name, config in configs.items():
        run_phase(config, folder / name, one_device())
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three digits as files: one of their own size, one enlarged, and one damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    images, _ = digits.load_split("test")
    Image.fromarray(images[0, ..., 0]).save(folder / "a.png")
    (folder / "below").mkdir()
    Image.fromarray(images[1, ..., 0]).resize((60, 80)).save(folder / "below" / "b.png")
    (folder / "c.png").write_bytes(b"not a picture")
    return folder


def call(capsys, *argv):
    """(exit status, standard output, standard error) of a command."""
    status = dispatch("m2mkd", COMMANDS, [str(one) for one in argv])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# Names of classes.


def test_training_writes_the_names_of_the_classes(runs):
    for name in ("meta", "modules", "student"):
        content = json.loads((runs / name / "classes.json").read_text())
        assert content == {"names": list("0123456789")}


def test_names_of_an_older_run_are_those_of_its_training_set(runs, tmp_path):
    old = runs / "meta"
    checkpoint.write_params(tmp_path / "run", checkpoint.load(old), checkpoint.load_config(old))
    assert not list(tmp_path.rglob("classes.json"))
    assert read_run(tmp_path / "run").classes == tuple("0123456789")


# predict


def test_a_prediction_is_what_the_network_says(runs, pictures, capsys):
    status, out, _ = call(capsys, "predict", runs / "student", pictures / "a.png", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["picture"] == str(pictures / "a.png")
    apply, params = m2mkd_jax.load_model(runs / "student")
    images, _ = digits.load_split("test")
    shares = np.asarray(jax.nn.softmax(apply(params, images[:1]))[0])
    best = np.argsort(-shares)[:5]
    assert [one["class"] for one in found["classes"]] == [str(label) for label in best]
    np.testing.assert_allclose(
        [one["probability"] for one in found["classes"]], shares[best], rtol=1e-3
    )


def test_a_folder_s_pictures_are_classified_whatever_their_size(runs, pictures, capsys):
    status, out, err = call(
        capsys, "predict", runs / "modules", "--module=2", pictures, "--csv", "--top=2"
    )
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 1  # of the damaged one
    assert [row["picture"].removeprefix(f"{pictures}/") for row in rows] == [
        *("a.png", "a.png", "below/b.png", "below/b.png")
    ]
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])
    assert err == ""


def test_an_unreadable_picture_has_its_line(runs, pictures, capsys):
    status, out, _ = call(capsys, "predict", runs / "meta", pictures)
    lines = out.splitlines()
    assert status == 1 and len(lines) == 3
    assert lines[2].split() == [str(pictures / "c.png"), "unreadable"]
    assert lines[0].count("%") == 5
    _, out, _ = call(capsys, "predict", runs / "meta", pictures / "a.png", "--top=1")
    assert out.count("%") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("modules", "{pictures}"), "holds modules 0, 2, each for its place in the meta model"),
        (("modules", "{pictures}", "--module=1"), "choose one with --module=K"),
        (("meta", "{pictures}", "--module=1"), "holds a whole network"),
        (("meta", "/nowhere/x.png"), "/nowhere/x.png does not exist; beside it: there is no"),
        (("nowhere", "{pictures}"), "no finished checkpoint at"),
        (("meta", "{pictures}", "--config.meta.width=8"), "would make another network than was"),
        (("meta", "{pictures}", "--config.data.labels=8"), "would make another network than was"),
        (("meta", "{pictures}", "--batch=3"), "--batch=3 must be a multiple of the mesh's 8"),
    ],
)
def test_what_cannot_be_predicted_is_said(flags, message, runs, pictures, capsys):
    run, *rest = (one.format(pictures=pictures) for one in flags)
    status, out, err = call(capsys, "predict", runs / run, *rest)
    assert (status, out) == (2, "")
    assert message in err


def test_few_pictures_make_a_small_batch(runs):
    trained = open_run(runs / "meta", {"mesh.data": "8"})
    assert [choose_batch(trained, count) for count in (1, 9, 17, 1000)] == [8, 16, 32, 64]


# evaluate


@pytest.mark.parametrize(
    ("run", "flags", "key"),
    [
        ("meta", (), "test/{}"),
        ("modules", ("--module=2",), "test/module_2/{}"),
        ("student", (), "test/{}"),
    ],
)
def test_an_evaluation_repeats_that_of_the_run(run, flags, key, runs, capsys):
    status, out, _ = call(capsys, "evaluate", runs / run, "--json", *flags)
    assert status == 0
    found, result = json.loads(out), json.loads((runs / run / "result.json").read_text())
    for metric in ("accuracy", "accuracy_top5", "loss"):
        assert found["test"][metric] == pytest.approx(result[key.format(metric)], rel=1e-4), metric
    test = found["test"]
    assert test["images"] == 360 and list(test["classes"]) == list("0123456789")
    right = sum(one["images"] * one["accuracy"] for one in test["classes"].values())
    wrong = sum(pair["images"] for pair in test["confused"])
    assert right == pytest.approx(360 * test["accuracy"]) and right + wrong == pytest.approx(360)
    if run == "student":
        assert found["ood"]["accuracy"] == pytest.approx(result["ood/accuracy"], rel=1e-4)
        assert list(found["ood"]["classes"]) == list("01234578")


def test_another_set_is_named_by_flags(runs, tmp_path, capsys):
    images, labels = digits.load_split("test")
    for label in (3, 8):  # the others have no image, and the folders no number of their own
        (tmp_path / "val" / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:5]:
            Image.fromarray(images[i, ..., 0]).save(tmp_path / "val" / str(label) / f"{i}.png")
    flags = ("--data.source=folder", f"--config.data.path={tmp_path}", "--data.test_split=val")
    status, out, _ = call(capsys, "evaluate", runs / "meta", *flags)
    assert status == 0
    head, _, classes, *_ = out.splitlines()[0], None, *out.splitlines()[3:]
    assert head == f"test: 10 images of 2 classes, folder {tmp_path}, split val"
    assert classes.split() == ["class", "images", "accuracy"]


# features


def test_maps_have_the_image_s_rows_and_columns(runs, pictures, tmp_path, capsys):
    out = tmp_path / "features.npz"
    flags = (pictures / "a.png", pictures / "below", "--out", out)
    status, said, _ = call(capsys, "features", runs / "student", *flags)
    assert status == 0 and "maps (2, 2, 2, 16)" in said
    with np.load(out) as arrays:
        assert arrays["names"].tolist() == [str(pictures / "a.png"), str(pictures / "below/b.png")]
        assert arrays["pooled"].shape == (2, 16)
        # The head on what it reads gives the logits.
        apply, params = m2mkd_jax.load_model(runs / "student")
        head = params["stage_2"]["head"]
        images, _ = digits.load_split("test")
        np.testing.assert_allclose(
            arrays["pooled"][0] @ head["kernel"] + head["bias"],
            apply(params, images[:1])[0],
            rtol=1e-3,
            atol=1e-4,
        )
    status, said, _ = call(
        capsys, "features", runs / "meta", *flags, "--size=12", "--stage=0", "--no-maps"
    )
    assert status == 0 and "pooled (2, 16)" in said and "maps" not in said
    status, said, _ = call(capsys, "features", runs / "meta", *flags, "--size=16", "--stage=1")
    assert status == 0 and "maps (2, 4, 4, 16)" in said
    status, _, err = call(capsys, "features", runs / "modules", *flags)
    assert status == 2 and "holds modules, and token maps are of whole networks" in err


# export


def test_an_exported_vit_is_read_as_timm_s(runs, tmp_path, capsys):
    status, said, _ = call(capsys, "export", runs / "meta", tmp_path / "out")
    assert status == 0 and "README.md, config.json, model.safetensors, run_config.json" in said
    source = pretrained.find_source(pretrained.read_files(tmp_path / "out"), "meta")
    inferred = pretrained.infer_config(source, {}).config
    ours = tiny_config("pretrain_meta")
    assert dataclasses.replace(inferred.meta, depths=(3,)) == dataclasses.replace(
        ours.meta, depths=(3,)
    )
    assert (inferred.data.mean, inferred.data.std) == (ours.data.mean, ours.data.std)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["pretrained_cfg"]["label_names"] == list("0123456789")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("local-dir:FOLDER", "| test/accuracy |", "## Licence", "data `digits`"):
        assert text in card
    status, _, err = call(capsys, "export", runs / "meta", tmp_path / "out")
    assert status == 2 and "exists; give a new folder" in err


def test_timm_loads_the_folder(runs, tmp_path, capsys):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    call(capsys, "export", runs / "meta", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images, _ = digits.load_split("test")
    apply, params = m2mkd_jax.load_model(runs / "meta")
    x = (images[:4] / 255 - 0.5) / 0.5
    with torch.no_grad():
        found = model(torch.from_numpy(np.float32(x.transpose(0, 3, 1, 2)))).numpy()
    np.testing.assert_allclose(found, apply(params, images[:4]), rtol=1e-3, atol=1e-4)


def test_a_network_that_timm_has_not_is_exported_with_its_own_config(runs, tmp_path, capsys):
    status, said, _ = call(capsys, "export", runs / "modules", tmp_path / "m", "--module=2")
    assert status == 0 and "of kind module" in said
    assert not (tmp_path / "m" / "config.json").exists()
    assert "No other framework has this network" in (tmp_path / "m" / "README.md").read_text()
    status, said, _ = call(capsys, "export", runs / "student", tmp_path / "s")
    assert status == 0 and "of kind vmoe" in said


# show


def test_a_run_and_a_config_are_shown(runs, capsys):
    status, out, _ = call(capsys, "show", runs / "student")
    assert status == 0
    assert "config.optim.batch = 64   (default " in out
    assert "    examples an update, over all devices and micro-batches." in out
    assert "end_to_end: " in out and "FLOPs of products per step of 64 examples" in out
    line = next(line for line in out.splitlines() if line.startswith("student/stage_*/head/kernel"))
    assert line.split()[1:] == ["trained", "16", "x", "10", "float32", "fsdp", "1", "160"]
    flags = ("m2mkd/digits.py:phase=distill", "--config.distill.tau=3", "--only=distill")
    status, out, _ = call(capsys, "show", *flags)
    assert status == 0 and "config.distill.tau = 3.0   (default " in out
    assert "config.optim" not in out
