"""Exported folders: complete, read by transformers, uploaded; and what cannot be exported."""

import dataclasses
import types

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
from hugging_face import NO_TORCH
from jax import numpy as jnp
from tiny_cliptrans import TEST, read_split, tiny_config

from cliptrans_jax import pretrained
from cliptrans_jax.commands import COMMANDS
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.export.folder import _generation
from cliptrans_jax.export.tokenizers import language_token, write_tokenizer
from cliptrans_jax.export.towers import write_tower
from cliptrans_jax.models import cliptrans_names
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.models.mapper import MapperConfig
from common_jax.command_line import dispatch
from common_jax.weights import read_tensors
from common_jax.workdir import write_json


@pytest.mark.parametrize(("stage", "token"), [("translate", 6), ("caption", 5), ("text_recon", 5)])
def test_forced_bos_token_is_the_output_language(stage, token):
    tokenizer = types.SimpleNamespace(language_id={"en": 5, "de": 6}.__getitem__)
    run = types.SimpleNamespace(config=tiny_config(stage, None), load_tokenizer=lambda: tokenizer)
    assert _generation(run)["forced_bos_token_id"] == token


@dataclasses.dataclass(frozen=True)
class NewConfig:
    """Sizes of a network that no table of published names has."""


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (lambda folder: pretrained.save(folder, {}, NewConfig()), r"NewConfig .* KINDS of"),
        (lambda folder: write_tower(folder, {}, NewConfig()), r"NewConfig .* HUB of"),
    ],
)
def test_network_without_published_names_is_refused_naming_the_table(tmp_path, export, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "out")


def test_mapping_network_without_names_is_refused_naming_the_table(monkeypatch):
    monkeypatch.setattr(cliptrans_names, "MAPPERS", {"other": None})
    with pytest.raises(ValueError, match=r"mapper\.kind='mlp' .* MAPPERS of .*, only other have"):
        cliptrans_names.mapper_table(MapperConfig())


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
