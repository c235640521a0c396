"""`m2mkd`: the commands that use trained runs."""

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import os
import shutil

import convert_weights
import jax
import numpy as np
import pytest
from meshes import one_device
from PIL import Image
from same import assert_same
from tiny import feed_of, fill, tiny_config, write_averaged

import m2mkd_jax
from common_jax import checkpoint
from common_jax.command_line import dispatch
from common_jax.config import freeze, unfreeze
from common_jax.workdir import write_json
from m2mkd_jax import pretrained
from m2mkd_jax.commands import COMMANDS
from m2mkd_jax.commands import evaluate as evaluation
from m2mkd_jax.commands.predict import Prediction, show_csv, show_json, show_table
from m2mkd_jax.config import Config, SourcesConfig
from m2mkd_jax.data import digits
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.training import with_feed
from m2mkd_jax.pretrained.folder import read_run_config, write_folder
from m2mkd_jax.trained import choose_batch, open_run, read_classes, read_run

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A meta model, two modules in it, and a whole student, all untrained."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in configs(folder).items():
        params = fill(PHASES[config.phase].describe(config, one_device()).init)
        checkpoint.write_params(folder / name, params, unfreeze(config).to_dict())
    write_json(folder / "meta" / "result.json", {"steps": 0, "test/accuracy": 0.5})
    return folder


def configs(folder):
    sources = SourcesConfig(meta=str(folder / "meta"))
    student = tiny_config("end_to_end")
    return {
        "meta": tiny_config("pretrain_meta"),
        "modules": dataclasses.replace(tiny_config("train_module"), module="0+2", sources=sources),
        "student": dataclasses.replace(student, ood=OodConfig(source="digits_r", split="test")),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three digits as files: one in its own size, one enlarged, and one corrupted."""
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


# Class names.


def test_class_names_come_from_run_or_training_set(runs):
    assert read_run(runs / "student").classes == digits.NAMES
    write_json(runs / "modules" / "classes.json", {"names": NAMES})
    assert read_run(runs / "modules" / "checkpoints" / "0").classes == NAMES
    (runs / "modules" / "classes.json").unlink()
    config = configs(runs)["modules"]
    training = PHASES[config.phase].describe(config, one_device())
    task = with_feed(training, feed_of(config, runs), one_device())
    assert task.files == {"classes.json": {"names": list(digits.NAMES)}}


def test_modules_of_a_moved_pipeline_find_their_meta_model(runs, tmp_path):
    for name in ("meta", "modules"):
        shutil.copytree(runs / name, tmp_path / name)
    path = tmp_path / "modules" / "checkpoints" / "0" / "config" / "metadata"
    path.write_text(path.read_text().replace(str(runs), "/old/pipe"))
    (tmp_path / "config.json").write_text("{}")
    trained = open_run(tmp_path / "modules")
    assert trained.config.sources.meta == str(tmp_path / "meta")
    with pytest.raises(FileNotFoundError, match=r"config\.sources\.meta='/given'"):
        open_run(tmp_path / "modules", {"sources.meta": "/given"})


def test_modules_are_used_in_the_average_of_their_meta_model(runs, tmp_path):
    """It is what trained them, and what the meta model's own evaluation uses."""
    params, config = checkpoint.load(runs / "meta"), configs(runs)["meta"]
    average = write_averaged(tmp_path / "meta", params, config, more=1)
    trained = open_run(runs / "modules", {"sources.meta": str(tmp_path / "meta")})
    assert_same(trained.helpers["meta"], average["meta"])


def test_unfinished_run_gives_a_warning(runs, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(runs / "student", run)
    read_run(run)
    assert "is not finished" not in caplog.text  # converted weights are no run
    write_json(run / "config.json", checkpoint.load_config(run))
    read_run(run)
    assert f"{run} is not finished; one of its checkpoints so far is used" in caplog.text
    caplog.clear()
    write_json(run / "result.json", {"steps": 0})
    read_run(run)
    assert "is not finished" not in caplog.text


@pytest.mark.parametrize("content", [{"names": ["a"]}, {"names": list(range(10))}, {}])
def test_mismatched_class_names_are_refused(content, runs, tmp_path):
    config, params = checkpoint.load_config(runs / "meta"), checkpoint.load(runs / "meta")
    checkpoint.write_params(tmp_path / "run", params, config)
    write_json(tmp_path / "run" / "classes.json", content)
    with pytest.raises(ValueError, match=r"classes\.json (must list .*=10 class|lacks 'names')"):
        read_run(tmp_path / "run")


# predict


def test_predict_matches_the_network(runs, pictures, capsys):
    status, out, _ = call(capsys, "predict", runs / "student", pictures / "a.png", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["picture"] == str(pictures / "a.png")
    apply, params = m2mkd_jax.load_model(runs / "student")
    images, _ = digits.load_split("test")
    shares = np.asarray(jax.nn.softmax(jax.jit(apply)(params, images[:1]))[0])
    best = np.argsort(-shares)[:5]
    assert [one["class"] for one in found["classes"]] == [str(label) for label in best]
    np.testing.assert_allclose(
        [one["probability"] for one in found["classes"]], shares[best], rtol=1e-3
    )


def test_predict_reads_a_folder_of_pictures_of_any_size(runs, pictures, capsys):
    status, out, err = call(
        capsys, "predict", runs / "modules", "--module=2", pictures, "--csv", "--top=2"
    )
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 1  # because of the corrupted file
    assert [row["picture"].removeprefix(f"{pictures}/") for row in rows] == [
        *("a.png", "a.png", "below/b.png", "below/b.png")
    ]
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])
    assert err == ""


def test_predict_lists_unreadable_pictures(runs, pictures, capsys):
    status, out, _ = call(capsys, "predict", runs / "meta", pictures)
    lines = out.splitlines()
    assert status == 1 and len(lines) == 3
    assert lines[2].split() == [str(pictures / "c.png"), "unreadable"]
    assert lines[0].count("%") == 5
    _, out, _ = call(capsys, "predict", runs / "meta", pictures / "a.png", "--top=1")
    assert out.count("%") == 1


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_predictions_of_pictures_with_odd_names_are_printed(form):
    """Names with a byte that is not UTF-8 and with a line break, as paths of the system have
    them."""
    names = (os.fsdecode(b"\xff.png"), "a\nb.png", "é.png")
    found = [Prediction(name, (("1", 0.5),)) for name in names]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        {"table": show_table, "json": show_json, "csv": show_csv}[form](found, width=9)
    text = out.getvalue().encode().decode()  # strict, unlike StringIO
    if form == "json":
        assert [json.loads(line)["picture"] for line in text.splitlines()] == [*names]
    elif form == "csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        assert [row["picture"] for row in rows] == ["\\udcff.png", *names[1:]]
    else:
        written = [line.split()[0] for line in text.splitlines()]
        assert written == ["\\udcff.png", "a\\nb.png", "é.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("modules", "{pictures}"), "holds modules 0, 2, each for its own stage of the meta model"),
        (("modules", "{pictures}", "--module=1"), "choose one with --module=K"),
        (("modules", "{pictures}", "--module=1"), "error: --module=1: "),
        (("meta", "{pictures}", "--module=1"), "holds a whole network"),
        (("meta", "/nowhere/x.png"), "/nowhere/x.png does not exist; beside it: there is no"),
        (("meta", "{pictures}/c.png"), "TIFF, WEBP; repair or remove them\n"),
        (("nowhere", "{pictures}"), "does not exist"),
        (("meta", "{pictures}", "--config.meta.width=8"), "is fixed by the run that trained"),
        (("meta", "{pictures}", "--config.data.labels=8"), "is fixed by the run that trained"),
        (("meta", "{pictures}", "--batch=3"), "--batch=3 must be a multiple of the mesh's 8"),
    ],
)
def test_predict_error_messages(flags, message, runs, pictures, capsys):
    run, *rest = (one.format(pictures=pictures) for one in flags)
    status, out, err = call(capsys, "predict", runs / run, *rest)
    assert (status, out) == (2, "")
    assert message in err


def test_choose_batch_is_small_for_few_pictures(runs):
    trained = open_run(runs / "meta", {"mesh.data": "8"})
    assert [choose_batch(trained, count) for count in (1, 9, 17, 1000)] == [8, 16, 32, 64]


# evaluate


def test_own_batch_that_does_not_divide_over_the_devices_is_named(runs, capsys):
    status, out, err = call(capsys, "evaluate", runs / "meta", "--config.optim.batch=12")
    assert (status, out) == (2, "")
    assert "12 images at a time" in err and "8 devices: give --batch=16" in err


@pytest.mark.parametrize(
    ("run", "flags", "prefix"),
    [("meta", (), ""), ("modules", ("--module=2",), "module_2/"), ("student", (), "")],
)
def test_evaluate_matches_evaluation_in_training(run, flags, prefix, runs, capsys):
    status, out, _ = call(capsys, "evaluate", runs / run, "--json", *flags)
    assert status == 0
    found, trained, config = json.loads(out), open_run(runs / run), configs(runs)[run]
    training = PHASES[config.phase].describe(config, trained.mesh)
    task = with_feed(training, feed_of(config, runs), trained.mesh)
    assert found.keys() == task.evaluators.keys()
    for name, evaluate in task.evaluators.items():
        scores, classes = found[name], found[name]["classes"]
        with jax.set_mesh(trained.mesh):
            expected = evaluate(trained.params, trained.helpers, 0)
        for metric in ("accuracy", "accuracy_top5", "loss"):
            assert scores[metric] == pytest.approx(expected[f"{prefix}{metric}"], rel=1e-4), metric
        count = sum(one["images"] for one in classes.values())
        right = sum(one["images"] * one["accuracy"] for one in classes.values())
        wrong = sum(pair["images"] for pair in scores["confused"])
        assert scores["images"] == count == {"test": 360, "ood": 1430}[name]
        assert right == pytest.approx(count * scores["accuracy"])
        assert right + wrong == pytest.approx(count)
    if run == "student":
        assert list(found["test"]["classes"]) == list(digits.NAMES)
        assert list(found["ood"]["classes"]) == list(digits.RENDERED)


def test_tally_counts_by_class():
    pairs = {(1, 1): 2, (0, 0): 3, (1, 0): 4, (2, 0): 1}
    images, correct, confused = evaluation.tally(pairs, ["cat", "ant", "bee"])
    assert list(images.items()) == [("ant", 6), ("bee", 1), ("cat", 3)]
    assert correct == {"ant": 2, "cat": 3}
    assert confused == {("ant", "cat"): 4, ("bee", "cat"): 1}


def test_evaluate_takes_another_dataset_by_flags(runs, tmp_path, capsys):
    images, labels = digits.load_split("test")
    for label in (3, 8):  # the other classes have no image, and labels go by name
        (tmp_path / "val" / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:5]:
            Image.fromarray(images[i, ..., 0]).save(tmp_path / "val" / str(label) / f"{i}.png")
    flags = ("--data.source=folder", f"--config.data.path={tmp_path}", "--data.test_split=val")
    status, out, _ = call(capsys, "evaluate", runs / "meta", *flags)
    assert status == 0
    head, _, classes, *_ = out.splitlines()[0], None, *out.splitlines()[3:]
    assert head == f"test: 10 images of 2 classes, folder {tmp_path}, split val"
    assert classes.split() == ["class", "images", "accuracy"]


def test_evaluate_resets_test_share_for_a_dataset_with_splits(tmp_path, monkeypatch):
    def opened(run, settings):
        raise ValueError(settings)

    monkeypatch.setattr("m2mkd_jax.trained.open_run", opened)
    for flags, share in (
        (("--data.path=/x", "--data.test_split=val"), {"data.test_share": "0"}),
        (("--data.path=/moved",), {}),
        (
            ("--data.path=/x", "--data.test_split=a", "--data.test_share=0.5"),
            {"data.test_share": "0.5"},
        ),
    ):
        args = argparse.Namespace(run="runs/x", rest=flags)
        with pytest.raises(ValueError) as error:
            evaluation.evaluate(args)
        given = error.value.args[0]
        assert {key: given[key] for key in given if key == "data.test_share"} == share


# features


def test_feature_maps_have_the_rows_and_columns_of_the_image(runs, pictures, tmp_path, capsys):
    out = tmp_path / "features.npz"
    flags = (pictures / "a.png", pictures / "below", "--out", out)
    status, said, _ = call(capsys, "features", runs / "student", *flags)
    assert status == 0 and "maps (2, 2, 2, 16)" in said
    with np.load(out) as arrays:
        assert arrays["names"].tolist() == [str(pictures / "a.png"), str(pictures / "below/b.png")]
        assert arrays["pooled"].shape == (2, 16)
        # The head applied to its recorded input gives the logits.
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
    assert status == 0 and "pooled (2, 16), names (2,)\n" in said
    status, said, _ = call(capsys, "features", runs / "meta", *flags, "--size=16", "--stage=1")
    assert status == 0 and "maps (2, 4, 4, 16)" in said
    status, _, err = call(capsys, "features", runs / "modules", *flags)
    assert status == 2 and "holds modules, but only whole networks have token maps" in err


# export


def test_exported_vit_reads_as_a_timm_folder(runs, tmp_path, capsys):
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


def test_exported_network_converts_back_with_its_run_config(runs, tmp_path, capsys):
    assert call(capsys, "export", runs / "student", tmp_path / "out")[0] == 0
    convert_weights.main([str(tmp_path / "out"), str(tmp_path / "back")])
    assert "the config is that of the exported run" in capsys.readouterr().out
    ours, theirs = (checkpoint.load_config(x) for x in (runs / "student", tmp_path / "back"))
    for section in ("model", "data"):
        assert theirs[section] == ours[section]
    found = [checkpoint.load(x, subtree="student") for x in (runs / "student", tmp_path / "back")]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("run", "flags", "kind"),
    [("meta", [], "meta"), ("modules", ["--module=2"], "module"), ("student", [], "vmoe")],
)
def test_exported_network_keeps_its_kind_and_classes(runs, tmp_path, capsys, run, flags, kind):
    """Tensor names alone do not tell a module from a student's, or a meta model from a teacher."""
    out, names = tmp_path / "out", [f"digit {i}" for i in range(10)]
    step = checkpoint.find_step(runs / run)
    stage = int(flags[0][-1]) if flags else None
    write_folder(step, out, stage=stage, classes=tuple(names))
    convert_weights.main([str(out), str(tmp_path / "back")])
    assert f"of kind {kind}" in capsys.readouterr().out
    back = checkpoint.find_step(tmp_path / "back")
    config = freeze(Config, checkpoint.load_config(back))
    assert config.phase == pretrained.KINDS[kind].phase
    assert list(read_classes(back, config)) == names
    # An earlier version wrote no kind, and numbers for unknown classes.
    stored = json.loads((out / "run_config.json").read_text())
    del stored["kind"]
    stored["classes"] = list("0123456789")
    (out / "run_config.json").write_text(json.dumps(stored))
    convert_weights.main([str(out / "model.safetensors"), str(tmp_path / "old")])
    assert f"of kind {kind}" in capsys.readouterr().out
    assert not (tmp_path / "old" / "classes.json").exists()
    with pytest.raises(SystemExit):
        convert_weights.main([str(out), str(tmp_path / "other"), "--kind=teacher"])
    assert f"--kind=teacher: {out} is of kind {kind!r}" in capsys.readouterr().err
    # A file that only lies in that folder has its own kind.
    shutil.copyfile(out / "model.safetensors", out / "a.safetensors")
    assert read_run_config(out / "a.safetensors") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kind": "mta"}, "kind='mta' must be one of"), ({"classes": [1]}, "must be a list of names")],
)
def test_damaged_run_config_is_refused(runs, tmp_path, change, said):
    write_folder(checkpoint.find_step(runs / "student"), tmp_path / "out", stage=None, classes=())
    path = tmp_path / "out" / "run_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        read_run_config(tmp_path / "out")


def test_timm_loads_exported_folder(runs, tmp_path, capsys):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    call(capsys, "export", runs / "meta", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images, _ = digits.load_split("test")
    apply, params = m2mkd_jax.load_model(runs / "meta")
    x = (images[:4] / 255 - 0.5) / 0.5
    with torch.no_grad():
        found = model(torch.from_numpy(np.float32(x.transpose(0, 3, 1, 2)))).numpy()
    np.testing.assert_allclose(found, apply(params, images[:4]), rtol=1e-3, atol=1e-4)


def test_network_unknown_to_timm_is_exported_without_timm_config(runs, tmp_path, capsys):
    status, said, _ = call(capsys, "export", runs / "modules", tmp_path / "m", "--module=2")
    assert status == 0 and "of kind module" in said
    assert not (tmp_path / "m" / "config.json").exists()
    assert "No other framework has this network" in (tmp_path / "m" / "README.md").read_text()
    status, said, _ = call(capsys, "export", runs / "student", tmp_path / "s")
    assert status == 0 and "of kind vmoe" in said


# show


def test_show_prints_a_run_and_a_config(runs, capsys):
    status, out, _ = call(capsys, "show", runs / "student")
    assert status == 0
    assert "config.optim.batch = 64   (default " in out
    assert "    examples per update, over all devices and micro-batches." in out
    assert "end_to_end: " in out and "FLOPs of products per step of 64 examples" in out
    line = next(line for line in out.splitlines() if line.startswith("student/stage_*/head/kernel"))
    assert line.split()[1:] == ["trained", "16", "x", "10", "float32", "fsdp", "1", "160"]
    flags = ("m2mkd/digits.py:phase=distill", "--config.distill.tau=3", "--only=distill")
    status, out, _ = call(capsys, "show", *flags)
    assert status == 0 and "config.distill.tau = 3.0   (default " in out
    assert "nowhere does not exist; give a run's workdir, or" in call(capsys, "show", "nowhere")[2]
    assert "config.optim" not in out
