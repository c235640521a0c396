"""The tokenizer that a run trains."""

import dataclasses
import json
import zlib

import pytest
from etils import epath
from tiny_cliptrans import PREFIX, read_split, tiny_config

from cliptrans_jax.config import SourcesConfig
from cliptrans_jax.export.tokenizers import write_tokenizer
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.runs.run_tokenizer import TOKENIZER, train_tokenizer
from common_jax.mesh import MeshConfig, make_mesh


def test_tokenizer_is_trained_on_the_training_split_in_all_languages(corpus, tmp_path):
    english, german, _ = read_split(corpus, "train")
    config = dataclasses.replace(tiny_config("translate", corpus), languages=("de", "en"))
    _, text = train_tokenizer(config, epath.Path(tmp_path))
    made_from = json.loads(text)["made_from"]
    assert made_from["languages"] == ["de", "en"]
    assert made_from["sentences"] == zlib.crc32("\n".join([*german, *english]).encode())


@pytest.mark.parametrize(("given", "limit"), [(20, 20), (None, 32 - PREFIX)])
def test_sentences_are_truncated_to_leave_room_for_the_prefix(corpus, tmp_path, given, limit):
    config = tiny_config("translate", corpus)
    config = dataclasses.replace(
        config, tokenizer=dataclasses.replace(config.tokenizer, max_length=given)
    )
    tokenizer, _ = train_tokenizer(config, epath.Path(tmp_path))
    assert tokenizer.limit == config.sentence_limit == limit


def start_from(weights, corpus, tmp_path, *, field="mbart", fresh="", vocab=None):
    """The tokenizer of a run that trains one and starts from published weights."""
    sources = SourcesConfig(fresh=fresh, **{field: str(weights)})
    config = dataclasses.replace(tiny_config("translate", corpus), sources=sources)
    if vocab is not None:
        mbart = dataclasses.replace(config.model.mbart, vocab=vocab)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, mbart=mbart))
    return RunData(config, epath.Path(tmp_path / "run"), make_mesh(MeshConfig())).tokenizer


def export_tokenizer(folder, corpus, **changes):
    """Writes the tokenizer of a run with these changes, as `cliptrans export` does."""
    config = dataclasses.replace(tiny_config("translate", corpus), **changes)
    _, text = train_tokenizer(config, epath.Path(folder))
    (folder / "trained.json").write_text(text)
    trained, languages = epath.Path(folder / "trained.json"), config.known_languages
    write_tokenizer(folder, config.tokenizer, trained, languages, limit=20, pair=("en", "de"))
    return text


def test_exported_weights_go_with_the_same_trained_tokenizer(corpus, tmp_path, caplog):
    text = export_tokenizer(tmp_path, corpus)
    start_from(tmp_path, corpus, tmp_path)
    (tmp_path / TOKENIZER).write_text(text)  # that of the run itself
    start_from(tmp_path, corpus, tmp_path)
    (tmp_path / "model.safetensors").touch()
    start_from(tmp_path / "model.safetensors", corpus, tmp_path, field="model")
    assert "its ids mean other words" not in caplog.text


@pytest.mark.parametrize("other", ["languages", "vocab", "published"])
def test_published_weights_with_another_tokenizer_are_refused(corpus, tmp_path, other):
    tokenizer = dataclasses.replace(tiny_config("translate", corpus).tokenizer, vocab=280)
    if other == "published":
        (tmp_path / "sentencepiece.bpe.model").touch()
    else:
        changes = {"languages": {"languages": ("de", "en")}, "vocab": {"tokenizer": tokenizer}}
        export_tokenizer(tmp_path, corpus, **changes[other])
    message = r"config\.sources\.mbart='.*config\.tokenizer\.kind='trained'.* another one, .*"
    with pytest.raises(
        ValueError, match=message + r"kind='mbart50' .*config\.sources\.fresh='mbart/"
    ):
        start_from(tmp_path, corpus, tmp_path)
    start_from(tmp_path, corpus, tmp_path, fresh="mbart/embedding")


def test_weights_without_a_tokenizer_are_judged_by_their_embedding(corpus, tmp_path, caplog):
    file = tmp_path / "model_best_test.pth"
    file.touch()
    (tmp_path / TOKENIZER).write_text("{}")  # of anything else in that folder
    start_from(file, corpus, tmp_path, field="model")
    assert f"config.sources.model='{file}' has no tokenizer beside it" in caplog.text
    with pytest.raises(ValueError, match=r"embedding has 250054 rows.*tokenizer\.vocab=300"):
        start_from(file, corpus, tmp_path, field="model", vocab=250054)
