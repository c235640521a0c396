"""The commands that use a trained run: scores, translations, vectors and exported folders."""

import dataclasses
import io
import json
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
from etils import epath
from hugging_face import NO_TORCH
from jax import numpy as jnp
from tiny_cliptrans import TEST, read_split, tiny_config, write_run

from cliptrans_jax import loading
from cliptrans_jax.commands import COMMANDS
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.evaluators.scores import score
from cliptrans_jax.evaluators.show import read_translations
from cliptrans_jax.export.tokenizers import language_token, write_tokenizer
from cliptrans_jax.lines import Line, read_stream, translate_lines
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.runs.finished import find, image_tower, text_tower
from common_jax.command_line import dispatch
from common_jax.config import unfreeze
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.weights import read_tensors
from common_jax.workdir import write_json


@pytest.fixture(scope="module")
def pipeline(corpus, tmp_path_factory):
    """The workdir of a pipeline of two runs, with untrained parameters."""
    folder = epath.Path(tmp_path_factory.mktemp("pipeline"))
    config = tiny_config("translate", corpus)
    sources = dataclasses.replace(config.sources, clip=str(folder / "clip"))
    write_run(folder / "clip", tiny_config("clip", corpus))
    write_run(folder / "translate", dataclasses.replace(config, sources=sources))
    write_json(folder / "config.json", unfreeze(tiny_config("pipeline", corpus)).to_dict())
    return folder


@pytest.fixture(scope="module")
def model(pipeline):
    """The pipeline's model, which translates 8 sentences at a time."""
    mesh = make_mesh(MeshConfig())
    return loading.load_finished(find(pipeline).with_batch(8, mesh), mesh=mesh)


@pytest.fixture
def loaded(model, monkeypatch):
    """Commands find the model already loaded and compiled."""
    monkeypatch.setattr(loading, "load_finished", lambda run, mesh: model)


@pytest.fixture
def call(capsys):
    """call(command, *arguments): returns its standard output."""

    def run(*arguments):
        assert dispatch("cliptrans", COMMANDS, [str(x) for x in arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys):
    """refusal(command, *arguments): the message of a command that refuses."""

    def run(*arguments):
        assert dispatch("cliptrans", COMMANDS, [str(x) for x in arguments]) == 2
        return capsys.readouterr().err

    return run


def test_commands_are_listed_without_jax():
    code = (
        "import argparse, sys; from cliptrans_jax.commands import COMMANDS\n"
        "for command in COMMANDS.values(): command.add_arguments(argparse.ArgumentParser())\n"
        "print(*COMMANDS, 'jax' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.split() == [*COMMANDS, "False"], printed.stderr


# translate


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
    assert "--config.model.mapper.prefix=2 would make a different network" in refusal(
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


# export


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    scores = {"set": f"multi30k {TEST}", "step": 1, "sentences": 5, "bleu": 12.3456}
    write_json(pipeline / "translate" / "scores.json", scores | {"signatures": {"bleu": "tok:13a"}})
    for source, name in ((pipeline, "model"), (pipeline / "clip", "towers")):
        assert dispatch("cliptrans", COMMANDS, ["export", str(source), str(folder / name)]) == 0
    (pipeline / "translate" / "scores.json").unlink()
    return folder


def test_exported_folder_is_complete(exported):
    towers = {
        *("text_tower/config.json", "text_tower/model.safetensors"),
        *("text_tower/projection.safetensors", "text_tower/tokenizer.json"),
        *("text_tower/tokenizer_config.json", "image_tower/config.json"),
        *("image_tower/model.safetensors", "image_tower/preprocessor_config.json"),
    }
    translator = {
        *("config.json", "generation_config.json", "model.safetensors", "mapper.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }

    def files(folder):
        return {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}

    assert files(exported / "model") == {"README.md", *translator, *towers}
    assert files(exported / "towers") == {"README.md", *towers}
    names = read_tensors(exported / "model" / "mapper.safetensors")
    assert {"adapter.hidden.0.weight", "adapter.hidden.0.bias"} <= set(names)


def test_model_card_describes_the_model(exported, corpus):
    card = (exported / "model" / "README.md").read_text()
    for text in (
        "license: unknown",
        'language: ["en", "de"]',
        "as a plain mBART, without the prefix",
        "| `model.mapper.prefix` | `4` |",
        "| bleu | 12.35 | `tok:13a` |",
        "trained on `train`",
        "To be filled in",
    ):
        assert text in card, text
    assert str(corpus) not in card  # nor any other path of this machine
    assert "AutoImageProcessor" in (exported / "towers" / "README.md").read_text()


def test_exported_tokenizers_match_in_transformers(exported, model):
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    texts = ["a red square", "ein grünes Quadrat", "Ü  de 漢", "a"]
    for folder, language, ours in (
        ("model", "en", model.tokenizer),
        ("model/text_tower", None, model.data.text_tower.tokenizer),
    ):
        theirs = transformers.AutoTokenizer.from_pretrained(exported / folder)
        found = theirs(texts)["input_ids"]
        assert found == [ids.tolist() for ids in ours.encode(texts, language)]
        assert theirs.batch_decode(found, skip_special_tokens=True) == texts
        assert theirs.convert_tokens_to_ids(language_token("de")) == ours.language_id("de")


def test_published_tokenizer_is_exported_with_its_languages(tmp_path):
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    (tmp_path / "published").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["two men are outside near many bushes"] * 4),
        model_prefix=str(tmp_path / "published" / "sentencepiece.bpe"),
        vocab_size=22,
        minloglevel=2,
    )
    config = TokenizerConfig("mbart50", str(tmp_path / "published"))
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, config, tmp_path / "none", (), limit=20, pair=("en", "cs"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours, texts = load_tokenizer(config), ["two men", "many men are near"]
    assert theirs(texts)["input_ids"] == [ids.tolist() for ids in ours.encode(texts, "en")]
    targets = theirs(text_target=texts)["input_ids"]
    assert targets == [ids.tolist() for ids in ours.encode(texts, "cs")]
    (tmp_path / "published" / "sentencepiece.bpe.model").unlink()
    with pytest.raises(FileNotFoundError, match="no longer has the tokenizer of the run"):
        write_tokenizer(out, config, tmp_path / "none", (), limit=20, pair=("en", "cs"))


def test_exported_model_matches_in_transformers(exported, model):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    folder = exported / "model"
    theirs, report = transformers.MBartForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = transformers.AutoTokenizer.from_pretrained(folder)(["a red square"])["input_ids"]
    labels = np.array([[5, 6, 7, 2]])  # the decoder reads them shifted right
    with torch.no_grad():
        decoder = torch.tensor([[2, 5, 6, 7]])
        expected = theirs.eval()(torch.tensor(ids), decoder_input_ids=decoder).logits.numpy()
        generated = theirs.generate(torch.tensor(ids))
    assert generated[0, 1] == model.tokenizer.language_id("de")
    mapper = dataclasses.replace(model.config.model.mapper, prefix=0)
    plain = Translator(dataclasses.replace(model.config.model, mapper=mapper))
    found = plain.train_logits(model.params, None, jnp.array(ids), jnp.array(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_exported_towers_match_in_transformers(exported, model, corpus):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    english, _, pictures = read_split(corpus, TEST)
    folder = exported / "towers"
    text, image = model.data.text_tower, model.data.image_tower
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder / "image_tower")
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "image_tower")
    with torch.no_grad():
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        expected = tower.eval()(pixels).image_embeds.numpy()
    prepared = np.stack([image.prepare(x) for x in pictures])
    np.testing.assert_allclose(pixels.permute(0, 2, 3, 1), prepared, rtol=1e-4, atol=1e-4)
    found = image.apply(image.params, jnp.asarray(prepared))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "text_tower")
    tower = transformers.XLMRobertaModel.from_pretrained(
        folder / "text_tower", add_pooling_layer=False
    )
    last = read_tensors(folder / "text_tower" / "projection.safetensors")
    with torch.no_grad():
        inputs = tokenizer(english, return_tensors="pt", padding=True)
        mask = inputs["attention_mask"][..., None]
        mean = (tower.eval()(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    expected = (
        mean.numpy() @ last["LinearTransformation.weight"].T + last["LinearTransformation.bias"]
    )
    found = text.encode(text.tokenizer.encode(english, None), mesh=model.mesh)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_exported_folder_is_uploaded_on_request(call, refusal, pipeline, tmp_path, monkeypatch):
    asked = []

    class Hub:
        def create_repo(self, name, *, private, exist_ok):
            asked.append((name, private, exist_ok))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, *, repo_id, folder_path):
            if repo_id == "me/other":
                raise huggingface_hub.errors.HfHubHTTPError("not yours", response=None)
            asked.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "one"
    printed = call("export", pipeline / "clip", out, "--push", "me/model")
    assert "uploaded to https://huggingface.co/me/model" in printed
    assert asked == [("me/model", True, True), ("me/model", out)]
    message = refusal("export", pipeline / "clip", tmp_path / "two", "--push", "me/other")
    assert "could not be uploaded to me/other" in message and "hf upload me/other" in message
    assert f"{out} exists" in refusal("export", pipeline / "clip", out)


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
