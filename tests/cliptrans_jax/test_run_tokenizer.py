"""The tokenizer that a run trains."""

import dataclasses
import json
import zlib

import pytest
from etils import epath
from tiny_cliptrans import PREFIX, read_split, tiny_config

from cliptrans_jax.runs.run_tokenizer import train_tokenizer


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
