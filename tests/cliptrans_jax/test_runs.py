"""The whole method at its smallest: stages run, pass on their weights, resume after a kill, and
compute the same on eight devices."""

import dataclasses
import json
import logging
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from meshes import one_device, split_mesh
from same import assert_same
from tiny_cliptrans import OPTIM, TEST, read_split, tiny_config, tiny_pipeline

import cliptrans_jax
from cliptrans_jax.evaluators import scores
from cliptrans_jax.evaluators import translation as validation
from cliptrans_jax.evaluators.scores import METRICS
from cliptrans_jax.evaluators.show import Row, read_translations, write_translations
from cliptrans_jax.main import main
from cliptrans_jax.runs import evaluate, scoring
from cliptrans_jax.runs.finished import find
from cliptrans_jax.runs.pipeline import plan, run_stage
from cliptrans_jax.runs.translation import best_step
from common_jax import checkpoint
from common_jax.config import unfreeze
from common_jax.metrics import read_metrics

STAGES = ("clip", "caption", "translate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """The folder of a pipeline run by the command, on eight devices except for its mesh."""
    workdir = epath.Path(tmp_path_factory.mktemp("pipeline"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cliptrans_jax.main.make_mesh", lambda _: one_device())
        main(unfreeze(tiny_pipeline(corpus)), workdir)
    return workdir


@pytest.fixture(scope="module")
def runs(finished, corpus):
    """The configs of the pipeline's stages."""
    return dict(plan(tiny_pipeline(corpus), finished))


def values(workdir, name):
    return [line[name] for line in read_metrics(workdir / "metrics.jsonl") if name in line]


def flat(source, *, subtree=""):
    return traverse_util.flatten_dict(checkpoint.load(source, subtree=subtree), sep="/")


def outputs(workdir):
    return [row.output for row in read_translations(workdir / "translations.tsv")]


def test_every_stage_writes_its_records(finished, corpus):
    for stage in STAGES:
        folder = finished / stage
        result = json.loads((folder / "result.json").read_text())
        assert (result["steps"], result["skipped"]) == (6, 0)
        assert len(values(folder, "train/loss")) == 6
        assert checkpoint.finished_steps(folder / "checkpoints") == [3, 6]
        assert (folder / "tokenizer.json").read_text() == (
            finished / "clip" / "tokenizer.json"
        ).read_text()
    english, german, _ = read_split(corpus, TEST)
    for stage, source, reference in (
        ("caption", english, english),
        ("translate", english, german),
    ):
        held = json.loads((finished / stage / "scores.json").read_text())
        assert (held["set"], held["sentences"]) == (f"multi30k {TEST}", len(english))
        rows = read_translations(finished / stage / "translations.tsv")
        assert [row.index for row in rows] == list(range(len(english)))
        assert [row.source for row in rows] == source
        assert [row.reference for row in rows] == reference
        assert [row.key for row in rows] == [f"{x.replace(' ', '_')}.png" for x in english]
        assert all(len(row.others) == 1 and row.score >= row.others[0].score for row in rows)
    assert not (finished / "clip" / "scores.json").exists()


def test_stages_learn_and_report(finished):
    for stage in STAGES:
        losses = values(finished / stage, "train/loss")
        assert losses[-1] < losses[0]
    report = (finished / "report.html").read_text()
    assert "CLIPTrans, pipeline" in report and "Scores of the test split" in report
    assert report.count("<img") >= 5  # including the pictures of all five sentences
    names = {f"val/{name}" for name in (*METRICS, "loss", "token_accuracy")}
    result = json.loads((finished / "translate" / "result.json").read_text())
    assert names <= set(result)


def test_config_metrics_are_those_logged():
    found = scores.as_metrics(scores.score(["a"], ["a"], language="en"))
    assert set(found) == set(METRICS)


def test_finished_pipeline_is_not_run_again(finished, corpus):
    def times():
        files = (path for path in pathlib.Path(finished).rglob("*.*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    result = run_stage(tiny_pipeline(corpus), finished, one_device())
    assert result["test"] == json.loads((finished / "translate" / "scores.json").read_text())
    after = {path for path, time in times().items() if before.get(path) != time}
    assert {path.name for path in after} <= {"config.json"}


def test_command_suggests_how_to_use_a_pipeline(finished, corpus, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("cliptrans_jax.main.make_mesh", lambda _: one_device())
    main(unfreeze(tiny_pipeline(corpus)), finished)
    assert "stage 2 of 3: caption" in caplog.messages
    assert caplog.messages[-2].startswith("finished: bleu ")
    assert caplog.messages[-1].endswith(f'translate {finished / "translate"} "SENTENCE"')


def test_captioning_leaves_encoder_and_embedding_unchanged(finished):
    folder = finished / "caption" / "checkpoints"
    before, after = flat(folder / "3"), flat(folder / "6")
    moved = {path for path in before if np.any(before[path] != after[path])}
    held = {path for path in before if path.startswith(("mbart/encoder/", "mbart/embedding"))}
    assert held and moved == set(before) - held - {"mbart/logits_bias"}
    assert any(path.startswith("mapper/") for path in moved)


def test_translation_starts_from_captioning_and_trains_everything(finished):
    account = json.loads((finished / "translate" / "warm_start.json").read_text())
    assert [entry["as"] for entry in account["taken"]] == ["mapper", "mbart"]
    assert account["left"] == account["fresh"] == []
    start, end = flat(finished / "caption"), flat(finished / "translate")
    assert {path for path in start if np.all(start[path] == end[path])} == {"mbart/logits_bias"}


def test_every_split_caches_image_and_text_features(finished):
    held = {path.name for path in (finished / "features").iterdir()}
    names = {f"multi30k_{split}" for split in ("train", "val", TEST)}
    assert held == {f"{name}.{what}.npz" for name in names for what in ("pictures", "en")}


def test_killed_run_resumes_byte_for_byte(finished, runs, tmp_path):
    whole, cut = finished / "translate", epath.Path(tmp_path / "cut")
    shutil.copytree(whole, cut)
    for name in ("result.json", "scores.json", "translations.tsv"):
        (cut / name).unlink()
    shutil.rmtree(cut / "checkpoints" / "6")
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tra')
    run_stage(runs["translate"], cut, one_device())
    for name in ("metrics.jsonl", "result.json", "scores.json", "translations.tsv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_images_read_in_a_worker_process_are_the_same(finished, runs, tmp_path):
    """In the remainder of a run that started without one."""
    whole, cut = finished / "clip", epath.Path(tmp_path / "cut")
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "6")
    config = runs["clip"]
    data = dataclasses.replace(config.data, workers=1)
    run_stage(dataclasses.replace(config, data=data), cut, one_device())
    for name in ("metrics.jsonl", "result.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def evaluation(runs, source, **changes):
    """The config that scores a run of stage "translate"."""
    config = runs["translate"]
    sources = dataclasses.replace(config.sources, model=str(source))
    return dataclasses.replace(config, stage="evaluate", sources=sources, **changes)


def test_scoring_a_run_again_gives_the_same_files(finished, runs, tmp_path):
    run = finished / "translate"
    result = run_stage(evaluation(runs, run), epath.Path(tmp_path), one_device())
    for name in ("scores.json", "translations.tsv"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    assert result["stage"] == "evaluate"
    assert result["step"] == int(best_step(run, runs["translate"].run).name)


def test_loaded_model_translates_as_the_run_did(finished, corpus):
    english, _, _ = read_split(corpus, TEST)
    model = cliptrans_jax.load_model(finished / "translate")
    found = model.translate(english)
    rows = read_translations(finished / "translate" / "translations.tsv")
    assert [hypotheses[0].text for hypotheses in found] == [row.output for row in rows]
    assert [hypotheses[0].score for hypotheses in found] == pytest.approx(
        [row.score for row in rows], rel=1e-5
    )
    assert all(len(hypotheses) == 2 for hypotheses in found)
    with pytest.raises(ValueError, match="5 sentences and 1 pictures"):
        model.translate(english, pictures=[np.zeros((9, 9, 3), np.uint8)])
    padded = model.translate(f" {text}\n" for text in english)
    assert padded == found
    assert model.translate(np.array([english[0].replace(" ", "\n", 1)])) == found[:1]
    for sentences, message in (
        ([], "sentences is empty"),
        ("red apple", r"must be a list of sentences and is 'red apple'.*give \['red apple'\]"),
        (b"red apple", "must be a list of sentences"),
        (None, "must be a list of sentences and is None"),
        ({"red apple"}, "must be a list of sentences"),
        (["red apple", None], r"sentences\[1\] must be a str and is None"),
        ([7], r"sentences\[0\] must be a str and is 7"),
        (["red apple", " \n"], r"sentences\[1\] is empty"),
        (["red \ud83d apple"], r"sentences\[0\] has half of a surrogate pair"),
    ):
        with pytest.raises(ValueError, match=message):
            model.translate(sentences)
    for picture, message in (
        (np.zeros((9, 9, 3), np.float32), r"pictures\[0\] must be .* float32 \(9, 9, 3\)"),
        (np.zeros((0, 9, 3), np.uint8), r"pictures\[0\] must be"),
        (np.zeros((9, 9, 2), np.uint8), r"pictures\[0\] must be"),
        ("a.png", r"pictures\[0\] must be .* is str"),
    ):
        with pytest.raises(ValueError, match=message):
            model.translate(english[:1], pictures=[picture])
    with pytest.raises(ValueError, match=r"give \[picture\] for one"):
        model.translate(english[:1], pictures=np.zeros((1, 9, 3), np.uint8))


def test_images_may_replace_the_text(finished, runs, corpus, tmp_path):
    run = finished / "translate"
    run_stage(evaluation(runs, run, test_side="image"), epath.Path(tmp_path), one_device())
    english, _, pictures = read_split(corpus, TEST)
    model = cliptrans_jax.load_model(run / "checkpoints")  # finds the run that it belongs to
    found = model.translate(english, pictures=pictures)
    rows = read_translations(tmp_path / "translations.tsv")
    assert [hypotheses[0].text for hypotheses in found] == [row.output for row in rows]
    shown = [hypotheses[0].score for hypotheses in found]
    assert shown == pytest.approx([row.score for row in rows], rel=1e-5)
    by_text = [row.score for row in read_translations(run / "translations.tsv")]
    assert shown != pytest.approx(by_text, rel=1e-5)


def test_only_translation_models_are_loaded(finished, tmp_path):
    with pytest.raises(ValueError, match="run of stage 'clip', which trains no translation model"):
        cliptrans_jax.load_model(finished / "clip")
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        cliptrans_jax.load_model(tmp_path)


def test_model_of_a_pipeline_is_that_of_its_last_run(finished):
    assert find(finished) == find(finished / "translate")
    assert find(finished, ("clip", "caption")).workdir == finished / "caption"


def test_unfrozen_text_tower_is_trained(finished, runs, corpus, tmp_path):
    config = dataclasses.replace(
        runs["translate"],
        unfreeze_clip=True,
        optim=dataclasses.replace(OPTIM, steps=1),
        valid_decode=False,
        run=dataclasses.replace(runs["translate"].run, best=None),
    )
    run_stage(config, epath.Path(tmp_path), one_device())
    account = json.loads((tmp_path / "warm_start.json").read_text())
    assert [entry["as"] for entry in account["taken"]] == ["mapper", "mbart", "clip"]
    before = flat(finished / "clip", subtree="clip/text")
    after = flat(tmp_path, subtree="clip")
    assert {path for path in before if np.any(before[path] != after[path])} == set(before)
    english, _, _ = read_split(corpus, TEST)
    found = cliptrans_jax.load_model(tmp_path).translate(english)
    assert [hypotheses[0].text for hypotheses in found] == outputs(tmp_path)
    # Such a model must not be scored or trained on unnoticed without the trained tower.
    lost = dataclasses.replace(evaluation(runs, tmp_path), unfreeze_clip=False)
    with pytest.raises(ValueError, match=r"clip/.* has no place"):
        run_stage(lost, epath.Path(tmp_path / "lost"), one_device())


def test_text_features_need_not_be_cached(finished, longer, runs, tmp_path):
    """Neither for training, as in `longer`, nor for scoring."""
    workdir, _, _ = longer
    assert not (workdir / "features").exists()
    assert {path.split("/")[0] for path in flat(workdir)} == {"mbart", "mapper"}
    kept = finished / "translate"
    again = evaluation(runs, kept, features="", keep_text_features=False)
    run_stage(again, epath.Path(tmp_path), one_device())
    assert not (tmp_path / "features").exists()
    assert outputs(tmp_path) == outputs(kept)


def test_no_features_are_needed_without_a_prefix(corpus, tmp_path):
    config = tiny_config("translate", corpus)
    mapper = dataclasses.replace(config.model.mapper, prefix=0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mapper=mapper),
        optim=dataclasses.replace(OPTIM, steps=1, ema=0.5),
        valid_decode=False,
        run=dataclasses.replace(config.run, best="val/token_accuracy"),
    )
    run_stage(config, epath.Path(tmp_path), one_device())
    assert set(checkpoint.load_shapes(tmp_path)) == {"mbart"}
    assert not (tmp_path / "features").exists()
    english, _, _ = read_split(corpus, TEST)
    model = cliptrans_jax.load_model(tmp_path)
    found = model.translate(english)
    assert [hypotheses[0].text for hypotheses in found] == outputs(tmp_path)
    # What is scored and loaded is the average of the parameters.
    averaged, last = (checkpoint.load(tmp_path, average=average) for average in (True, False))
    assert_same(model.params, averaged)
    scored = [row.score for row in read_translations(tmp_path / "translations.tsv")]
    for params, same in ((averaged, True), (last, False)):
        found = dataclasses.replace(model, params=params).translate(english)
        assert ([x[0].score for x in found] == pytest.approx(scored, rel=1e-5)) is same
    again = dataclasses.replace(
        config,
        stage="evaluate",
        sources=dataclasses.replace(config.sources, model=str(tmp_path)),
        run=dataclasses.replace(config.run, best="val/bleu"),  # not measured there, and not read
    )
    with pytest.MonkeyPatch.context() as patch:
        taken = []

        def keep(config, workdir, chosen, translate, params, *, step):
            taken.append(params)
            return {"set": "test", "bleu": 0.0}

        patch.setattr(evaluate, "score_split", keep)
        run_stage(again, epath.Path(tmp_path / "again"), one_device())
    assert_same(*taken, averaged)
    with pytest.raises(ValueError, match=r"config\.model\.mapper\.prefix=0"):
        model.translate(english[:1], pictures=[np.zeros((9, 9, 3), np.uint8)])


@pytest.fixture(scope="module")
def longer(runs, tmp_path_factory):
    """Stage "translate" for one more epoch, on eight devices, with the text tower in its step and a
    falling BLEU on the validation set: its folder, its result, and the sets that were scored, in
    order."""
    workdir = epath.Path(tmp_path_factory.mktemp("longer"))
    real, asked = scores.score, []

    def falling(outputs, references, *, language):
        asked.append("val")
        found = real(outputs, references, language=language)
        return dataclasses.replace(found, bleu=9.0 - len(asked))

    def tested(outputs, references, *, language):
        asked.append("test")
        return real(outputs, references, language=language)

    config = runs["translate"]
    config = dataclasses.replace(
        config,
        features="",
        keep_text_features=False,
        optim=dataclasses.replace(OPTIM, steps=9),
        run=dataclasses.replace(config.run, keep=1),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "score", falling)
        patch.setattr(scoring, "score", tested)
        result = run_stage(config, workdir, split_mesh())
    return workdir, result, asked


def test_validation_selects_and_the_test_set_is_scored_once(longer):
    workdir, result, asked = longer
    assert asked == ["val", "val", "val", "test"]
    assert checkpoint.finished_steps(workdir / "checkpoints") == [3, 9]
    assert result["test"]["step"] == 3
    assert json.loads((workdir / "scores.json").read_text())["step"] == 3
    # Scoring the run again uses the same checkpoint; scoring a step's folder uses that step.
    for source, step in ((workdir, "3"), (workdir / "checkpoints" / "9", "9")):
        assert find(str(source)).step.name == step


def test_selected_checkpoint_is_the_one_scored(longer):
    workdir, _, _ = longer
    rows = read_translations(workdir / "translations.tsv")
    scored = pytest.approx([row.score for row in rows], rel=1e-5)

    def translated(step):  # on one device
        model = cliptrans_jax.load_model(workdir / "checkpoints" / step)
        return [found[0] for found in model.translate([row.source for row in rows])]

    chosen = translated("3")
    assert [found.text for found in chosen] == [row.output for row in rows]
    assert [found.score for found in chosen] == scored
    assert [found.score for found in translated("9")] != scored


def test_eight_devices_match_one(longer, finished):
    workdir, _, _ = longer
    for name, count in (("train/loss", 6), ("val/loss", 2)):
        one, eight = values(finished / "translate", name), values(workdir, name)
        np.testing.assert_allclose(eight[:count], one, rtol=1e-5)


def test_gallery_shows_each_sentence_once_beside_its_image(corpus, tmp_path):
    config = tiny_config("translate", corpus)
    english, german, pictures = read_split(corpus, TEST)
    rows = [
        Row(index=9 - i, key=f"{text.replace(' ', '_')}.png", source=text, reference=ref,
            output=ref, score=0.0)
        for i, (text, ref) in enumerate(zip(english, german, strict=True))
    ]  # fmt: skip
    write_translations(tmp_path / "translations.tsv", rows)
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "picture_table", lambda rows, limit: shown.extend(rows))
        scoring.gallery(config, epath.Path(tmp_path))
    assert [row.source for row in shown] == english
    for row, picture in zip(shown, pictures, strict=True):
        np.testing.assert_array_equal(row.picture, picture)
