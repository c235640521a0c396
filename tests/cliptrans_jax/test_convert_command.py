"""The command that converts weights, on CLIPTrans checkpoints: from shards to a workdir that a
stage starts from, and back."""

import dataclasses

import convert_weights
import jax
import numpy as np
import pytest
import tiny_cliptrans
import torch_files
from flax import traverse_util
from tiny import fill

from cliptrans_jax.config import Config, SourcesConfig
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.runs.finished import find
from cliptrans_jax.runs.initial_weights import make_warm_start
from cliptrans_jax.runs.run_tokenizer import require_same_tokenizer
from cliptrans_jax.tensors.kinds import CLIPTRANS
from common_jax import checkpoint
from common_jax.config import freeze, unfreeze
from common_jax.weights import read_tensors
from common_jax.weights import table as tables

CONFIG = """
from tiny_cliptrans import tiny_config

from common_jax.config import freeze, unfreeze


def get_config(arg=None):
    return unfreeze(tiny_config("caption", None))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of a released checkpoint, all of its tensors, our parameters, and a config."""
    folder, model = (
        tmp_path_factory.mktemp("released"),
        tiny_cliptrans.tiny_config("translate", None).model,
    )
    params = jax.tree.map(np.asarray, fill(Translator(model).init))
    tensors = tables.write(CLIPTRANS.table(model), params)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    tensors |= {alias: tensors[name] for alias, name in CLIPTRANS.table(model).aliases.items()}
    for shard in (1, 2):
        part = {f"module.{name}": tensors[name] for name in list(tensors)[shard - 1 :: 2]}
        torch_files.save(folder / f"model_best_test_{shard}.pth", part)
    (folder / "config.py").write_text(CONFIG)
    return folder, tensors, params


def convert(*arguments):
    convert_weights.main([str(argument) for argument in arguments])


def test_shards_convert_to_a_workdir_and_back(shards, tmp_path, capsys):
    folder, tensors, params = shards
    source, config_file = folder / "model_best_test.pth", folder / "config.py"
    convert(source, tmp_path / "run", f"--config={config_file}")
    shown = capsys.readouterr().out
    assert "kind cliptrans, from the tensor names" in shown
    assert "mbart.lm_head.weight the same as mbart.model.shared.weight" in shown

    config = tiny_cliptrans.tiny_config("caption", None)
    config = dataclasses.replace(config, sources=SourcesConfig(model=str(tmp_path / "run")))
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), params)
    found = make_warm_start(config, None)(wanted)
    flat = traverse_util.flatten_dict(found.params, sep="/")
    for path, want in traverse_util.flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(flat[path], want, err_msg=path)

    for name, want in (
        ("out.pth", tensors),
        (
            "out.safetensors",
            {n: x for n, x in tensors.items() if n not in CLIPTRANS.table(config.model).aliases},
        ),
    ):
        convert(tmp_path / "run", tmp_path / name)
        back = read_tensors(tmp_path / name)
        assert back.keys() == want.keys()
        for tensor, array in want.items():
            np.testing.assert_array_equal(back[tensor], array, err_msg=tensor)


def test_mismatched_sizes_and_runs_without_a_model_are_refused(shards, tmp_path, capsys):
    folder, _, _ = shards
    source, config_file = folder / "model_best_test.pth", folder / "config.py"
    for flags, said in (
        ([], "heads: give --config.model.mbart.encoder_heads=N and --config.model.mbart.decoder"),
        ([f"--config={config_file}", "--config.model.mapper.prefix=5"], "adapter.hidden.0.weight"),
    ):
        with pytest.raises(SystemExit) as stop:
            convert(source, tmp_path / "run", "--kind=cliptrans", *flags)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    config = unfreeze(tiny_cliptrans.tiny_config("clip", None)).to_dict()
    checkpoint.write_params(tmp_path / "clip", {"clip": {"scale": np.ones(2)}}, config)
    with pytest.raises(SystemExit):
        convert(tmp_path / "clip", tmp_path / "out.pth")
    assert "a run of stage 'clip', which trains no translation" in capsys.readouterr().err


HEADS = [f"--config.model.mbart.{side}_heads=2" for side in ("encoder", "decoder")]
# With fewer positions than the default search could write.
SMALL = [*HEADS, "--config.decode.max_new_tokens=8"]


def test_heads_complete_the_sizes_of_the_tensors(shards, tmp_path, capsys):
    source = shards[0] / "model_best_test.pth"
    convert(source, tmp_path / "run", *SMALL, "--config.model.mbart.start=7")
    want = dataclasses.replace(tiny_cliptrans.MBART, start=7)
    found = freeze(Config, checkpoint.load_config(tmp_path / "run"))
    assert found.model.mbart == want and found.model.mapper.prefix == tiny_cliptrans.PREFIX
    assumed = capsys.readouterr().out.partition("assumed: ")[2].partition("\n")[0]
    assert "mbart.pad=1" in assumed and "heads" not in assumed and "start" not in assumed
    with pytest.raises(SystemExit):
        convert(source, tmp_path / "half", "--kind=cliptrans", HEADS[0])
    said = capsys.readouterr().err
    assert "heads: give --config.model.mbart.decoder_heads=N (" in said
    with pytest.raises(SystemExit):
        convert(source, tmp_path / "odd", "--kind=cliptrans", HEADS[0], HEADS[1][:-1] + "3")
    assert "decoder_heads=3 must divide width=16" in capsys.readouterr().err


def test_released_checkpoint_has_the_published_tokenizers(shards, tmp_path, refusal):
    """A folder can be given in the conversion, or whenever the result is used."""
    source, run = shards[0] / "model_best_test.pth", tmp_path / "run"
    convert(source, run, *SMALL)
    config = find(run).config
    assert (config.tokenizer.kind, config.clip_tokenizer.kind) == ("mbart50", "xlmr")
    assert find(run, settings={"tokenizer.path": "files"}).config.tokenizer.path == "files"
    said = refusal("translate", run, "a", "--config.tokenizer.path=files")
    assert "config.tokenizer.path='files' lacks tokenizer.json" in said
    ours = dataclasses.replace(config, sources=SourcesConfig(model=str(run)))
    require_same_tokenizer(ours, "model", "")
    trained = dataclasses.replace(ours, tokenizer=TokenizerConfig())
    with pytest.raises(ValueError, match=r"kind='mbart50', whose ids mean other words"):
        require_same_tokenizer(trained, "model", "the file of a trained tokenizer")


@pytest.mark.parametrize(
    ("flags", "kind", "path"),
    [
        (["--config.tokenizer.path=files"], "mbart50", "files"),
        (["--config.tokenizer.kind=trained"], "trained", ""),  # a file made from a run here
    ],
)
def test_tokenizer_is_chosen_in_the_conversion(shards, tmp_path, flags, kind, path):
    convert(shards[0] / "model_best_test.pth", tmp_path / "run", *SMALL, *flags)
    tokenizer = find(tmp_path / "run").config.tokenizer
    assert (tokenizer.kind, tokenizer.path) == (kind, path)
