"""The commands that use a trained run: scores, translations and vectors."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from jax import numpy as jnp
from tiny_cliptrans import TEST, read_split

from cliptrans_jax import loading
from cliptrans_jax.commands import COMMANDS
from cliptrans_jax.evaluators.scores import score
from cliptrans_jax.evaluators.show import read_translations
from cliptrans_jax.lines import Line, read_stream, translate_lines
from cliptrans_jax.runs.finished import find, image_tower, text_tower
from common_jax.command_line import dispatch
from common_jax.mesh import MeshConfig, make_mesh


@pytest.fixture
def loaded(model, monkeypatch):
    """Commands find the model already loaded and compiled."""
    monkeypatch.setattr(loading, "load_finished", lambda run, mesh: model)


def test_commands_are_listed_without_jax():
    code = (
        "import argparse, sys; from cliptrans_jax.commands import COMMANDS\n"
        "for command in COMMANDS.values(): command.add_arguments(argparse.ArgumentParser())\n"
        "print(*COMMANDS, 'jax' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.split() == [*COMMANDS, "False"], printed.stderr


# translate


def test_load_model_takes_a_batch_size(pipeline, model):
    small = loading.load_model(pipeline, batch=1)
    assert (small.config.decode.batch, loading.load_model(pipeline).config.decode.batch) == (1, 8)
    (found,) = small.translate(["a red square"])
    (expected,) = model.translate(["a red square"])
    assert found[0].text == expected[0].text
    with pytest.raises(ValueError, match=r"decode\.batch.*0"):
        loading.load_model(pipeline, batch=0)


def test_translations_follow_the_order_of_the_file(call, pipeline, model, corpus, tmp_path):
    english, _, _ = read_split(corpus, TEST)
    (tmp_path / "lines.txt").write_text("\n".join([english[0], "", *english[1:]]) + "\n")
    printed = call("translate", pipeline, "--file", tmp_path / "lines.txt", "--batch", 2)
    best = [hypotheses[0].text for hypotheses in model.translate(english)]
    assert printed.split("\n") == [best[0], "", *best[1:], ""]


def test_n_best_translations_are_printed_with_scores(call, pipeline, loaded, model):
    sentence = "a red square"
    expected = [(one.text, one.score) for one in model.translate([sentence])[0]]
    options = ("--n-best", 2, "--scores")
    rows = [row.split("\t") for row in call("translate", pipeline, sentence, *options).splitlines()]
    assert [(row[0], row[2]) for row in rows] == [("1", text) for text, _ in expected]
    assert [float(row[1]) for row in rows] == pytest.approx([x for _, x in expected], abs=1e-3)
    (value,) = map(json.loads, call("translate", pipeline, sentence, "--json").splitlines())
    assert (value["line"], value["source"]) == (1, sentence)
    assert [one["text"] for one in value["translations"]] == [expected[0][0]]


@pytest.mark.parametrize("form", ["column", "names", "one"])
def test_images_replace_the_features_of_sentences(
    call, pipeline, loaded, model, corpus, tmp_path, form
):
    english, _, pictures = read_split(corpus, TEST)
    names = [f"{text.replace(' ', '_')}.png" for text in english]
    folder, rows = corpus / "images" / TEST, english
    options = ["--pictures", folder]
    if form == "column":
        rows = [f"{text}\t{name}" for text, name in zip(english, names, strict=True)]
    elif form == "names":
        (tmp_path / "names.txt").write_text("\n".join(names))
        options += ["--picture-names", tmp_path / "names.txt"]
    else:
        options, pictures = ["--pictures", folder / names[0]], [pictures[0]] * len(english)
    printed = call("translate", pipeline, *rows, *options, "--json")
    found = [json.loads(line)["translations"][0] for line in printed.splitlines()]
    expected = [hypotheses[0] for hypotheses in model.translate(english, pictures=pictures)]
    assert [one["text"] for one in found] == [one.text for one in expected]
    scores = [one["score"] for one in found]
    assert scores == pytest.approx([one.score for one in expected], abs=1e-4)
    by_text = [hypotheses[0].score for hypotheses in model.translate(english)]
    assert scores != pytest.approx(by_text, abs=1e-4)


def test_translations_are_streamed(model):
    read = []

    def lines():
        for text in ("a red square", "", "a blue bar"):
            read.append(text)
            yield Line("here", text)

    found = translate_lines(model, lines(), size=2)
    line, hypotheses = next(found)
    assert (line.text, len(hypotheses), read) == ("a red square", 2, ["a red square", ""])
    assert [(line.text, len(hypotheses)) for line, hypotheses in found] == [
        ("", 0), ("a blue bar", 2),
    ]  # fmt: skip


def test_stream_is_read_line_by_line():
    stream = io.BytesIO(b"\xef\xbb\xbfa red square\r\n\nein gr\xc3\xbcnes Quadrat\nb\xff\n")
    lines = read_stream(stream, "standard input")
    assert [next(lines).text for _ in range(3)] == ["a red square", "", "ein grünes Quadrat"]
    with pytest.raises(ValueError, match="standard input, line 4 is not UTF-8"):
        next(lines)


def test_truncated_sentence_is_reported(model, caplog):
    lines = [Line("t.txt, line 1", "red"), Line("t.txt, line 2", "red " * 40)]
    assert len(list(translate_lines(model, lines, size=2))) == 2
    (message,) = [x for x in caplog.messages if "line" in x]
    assert message.startswith("t.txt, line 2 has ") and message.endswith("reads the first 18")


def test_input_errors_name_file_and_line(refusal, pipeline, loaded, corpus, tmp_path):
    file, folder = tmp_path / "lines.txt", corpus / "images" / TEST
    file.write_bytes(b"good\nb\xe4d\n")
    assert f"{file}, line 2 is not UTF-8" in refusal("translate", pipeline, "--file", file)
    file.write_text("red\tred.png\n")
    pictures = ("--file", file, "--pictures", folder)
    assert f"line 1: there is no picture {folder}/red.png" in refusal(
        "translate", pipeline, *pictures
    )
    file.write_text("\nred\n")
    assert f"{file}, line 2 names no picture" in refusal("translate", pipeline, *pictures)
    (tmp_path / "names.txt").write_text("")
    named = ("--picture-names", tmp_path / "names.txt")
    assert "more sentences than names" in refusal("translate", pipeline, *pictures, *named)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "sentence 1: the picture" in refusal(
        "translate", pipeline, "red\tbad.png", "--pictures", tmp_path
    )
    assert "2 beams of the search; add --beams=3" in refusal(
        "translate", pipeline, "red", "--n-best", 3
    )
    noise = "--config.noise.test=True"
    assert "is for `cliptrans evaluate`" in refusal("translate", pipeline, "red", noise)
    assert "give one of them" in refusal("translate", pipeline, "red", "--file", file)
    assert "trains no translation model" in refusal("translate", pipeline / "clip", "red")
    assert "--config.model.mapper.prefix=2 is fixed by the run that trained" in refusal(
        "translate", pipeline, "red", "--config.model.mapper.prefix=2"
    )


def test_another_language_pair_keeps_trained_tokenizer_ids(refusal, pipeline):
    turned = find(pipeline, settings={"data.source_language": "de", "data.target_language": "en"})
    assert turned.config.data.pair == ("de", "en")
    ids = [x.load_tokenizer().language_id("en") for x in (turned, find(pipeline))]
    assert ids[0] == ids[1]
    message = refusal("translate", pipeline, "red", "--data.target_language=fr")
    assert "config.languages=('en', 'de') must include the pair" in message


# evaluate


def test_run_can_be_scored_on_any_split(call, pipeline, model, corpus, tmp_path):
    out = tmp_path / "out"
    printed = call("evaluate", pipeline, "--split", "val", "--out", out)
    english, german, _ = read_split(corpus, "val")
    outputs = [hypotheses[0].text for hypotheses in model.translate(english)]
    expected = score(outputs, german, language="de")
    assert printed.startswith(f"multi30k val: {len(english)} sentences")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    assert rows["chrf"] == [f"{expected.chrf:.2f}", expected.signatures["chrf"]]
    assert [row.output for row in read_translations(out / "translations.tsv")] == outputs
    assert json.loads((out / "scores.json").read_text())["bleu"] == pytest.approx(expected.bleu)


def test_evaluate_does_not_overwrite_the_scores_of_a_run(refusal, pipeline):
    before = {path: path.read_bytes() for path in pathlib.Path(pipeline).rglob("*.json")}
    for out in (pipeline, pipeline / "translate"):
        message = refusal("evaluate", pipeline, "--split", "val", "--out", out)
        assert f"--out={out} is the folder of a run" in message and "give another one" in message
    assert {path: path.read_bytes() for path in pathlib.Path(pipeline).rglob("*.json")} == before


def test_scores_are_only_printed_without_an_output_folder(call, pipeline):
    before = sorted(path.name for path in (pipeline / "translate").iterdir())
    settings = ("--data.source_language=en", "--data.further_tests=('of_another_corpus',)")
    scores = json.loads(call("evaluate", pipeline, "--json", *settings))
    assert (scores["set"], scores["step"]) == (f"multi30k {TEST}", 1)
    assert sorted(path.name for path in (pipeline / "translate").iterdir()) == before


# features


def test_sentence_and_image_features_share_one_file(call, pipeline, corpus, tmp_path):
    english, _, pictures = read_split(corpus, TEST)
    (tmp_path / "lines.txt").write_text("\n\n".join(english))
    folder, out = corpus / "images" / TEST, tmp_path / "vectors.npz"
    printed = call("features", pipeline / "clip", tmp_path / "lines.txt", folder, "--out", out)
    assert "10 vectors of 8 numbers, of 5 sentences and 5 pictures" in printed
    found, mesh = np.load(out), make_mesh(MeshConfig())
    files = sorted(folder.iterdir())
    names = [f"{tmp_path}/lines.txt, line {2 * i + 1}" for i in range(5)]
    assert found["names"].tolist() == [*names, *map(str, files)]
    assert found["texts"].tolist() == [*english, *[""] * 5]
    run = find(pipeline)  # its towers are those of the first run
    text, image = text_tower(run, mesh), image_tower(run, mesh)
    expected = text.encode(text.tokenizer.encode(english, None), mesh=mesh)
    np.testing.assert_allclose(found["features"][:5], expected, rtol=1e-4, atol=1e-5)
    by_file = {
        f"{text.replace(' ', '_')}.png": x for text, x in zip(english, pictures, strict=True)
    }
    prepared = np.stack([image.prepare(by_file[file.name]) for file in files])
    expected = np.asarray(image.apply(image.params, jnp.asarray(prepared)))
    np.testing.assert_allclose(found["features"][5:], expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    inputs = [str(x) for x in (tmp_path / "bad.png", files[0])]
    flags = ["--unit", "--out", str(out)]
    assert dispatch("cliptrans", COMMANDS, ["features", str(pipeline), *inputs, *flags]) == 1
    unit = np.load(out)["features"]
    np.testing.assert_allclose(unit[0], expected[0] / np.linalg.norm(expected[0]), rtol=1e-4)


def test_features_command_refuses_missing_inputs(refusal, pipeline, tmp_path):
    out = ("--out", tmp_path / "x.npz")
    assert "there is no" in refusal("features", pipeline, tmp_path / "missing", *out)
    assert "has no pictures" in refusal("features", pipeline, tmp_path, *out)
    assert ".npz" in refusal("features", pipeline, tmp_path, "--out", tmp_path / "x.txt")
    assert not (tmp_path / "x.npz").exists()


# show


def test_show_covers_every_stage_at_its_tokenizer_length(call):
    shown = call("show", "cliptrans/emoji.py", "--only=seed", "--config.seed=4")
    assert "config.seed = 4   (default 0)" in shown
    titles = [line.partition(":")[0] for line in shown.splitlines() if " FLOPs" not in line]
    for stage in ("clip", "caption", "translate"):
        assert f"{stage}, 24 tokens per sentence" in titles
    assert call("show", "--config=cliptrans/emoji.py", "--only=seed", "--config.seed=4") == shown


def test_show_takes_exactly_one_config(refusal):
    assert "show takes one run or config" in refusal("show")
    assert "and got a and b" in refusal("show", "a", "--config=b")
