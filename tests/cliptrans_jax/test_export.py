"""What an exported folder says about generation, and networks that cannot be exported."""

import dataclasses
import types

import pytest
from tiny_cliptrans import tiny_config

from cliptrans_jax import pretrained
from cliptrans_jax.export.folder import _generation
from cliptrans_jax.export.towers import write_tower
from cliptrans_jax.models import cliptrans_names
from cliptrans_jax.models.mapper import MapperConfig


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
