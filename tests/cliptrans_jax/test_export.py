"""What an exported folder says about generation."""

import types

import pytest
from tiny_cliptrans import tiny_config

from cliptrans_jax.export.folder import _generation


@pytest.mark.parametrize(("stage", "token"), [("translate", 6), ("caption", 5), ("text_recon", 5)])
def test_forced_bos_token_is_the_output_language(stage, token):
    tokenizer = types.SimpleNamespace(language_id={"en": 5, "de": 6}.__getitem__)
    run = types.SimpleNamespace(config=tiny_config(stage, None), load_tokenizer=lambda: tokenizer)
    assert _generation(run)["forced_bos_token_id"] == token
