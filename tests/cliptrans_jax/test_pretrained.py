"""Published weights as our parameters, and ours exported for other software."""

import dataclasses

import jax
import numpy as np
import pytest
import torch_files
from published_files import (
    MCLIP,
    MODEL,
    OPENAI_TEXT,
    RESNET,
    TEXT,
    VISION,
    hf_mbart,
    make_params,
    make_tensors,
    write_folder,
)
from same import assert_same
from tiny_cliptrans import UNEVEN

from cliptrans_jax import pretrained
from cliptrans_jax.models import cliptrans_names
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.tensors import kinds, sizes
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.resnet import ResNetConfig
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.weights import read_tensors, write_tensors
from common_jax.weights import table as tables


def test_saved_folder_round_trips_exactly(tmp_path):
    params = make_params(kinds.MBART, UNEVEN)
    config = dataclasses.replace(UNEVEN, scale_embedding=False, start=7, pad=3, dropout=0.2)
    vocabulary = tmp_path / "sentencepiece.bpe.model"
    vocabulary.write_bytes(b"pieces")
    folder = tmp_path / "new" / "mbart"
    for _ in range(2):  # and once more
        pretrained.save(folder, jax.device_put(params), config, tokenizer_files=[vocabulary])
    found = pretrained.load(folder)
    assert (found.kind, found.config, found.source) == ("mbart", config, str(folder))
    assert_same(found.params, params)
    held = {path.name for path in folder.iterdir()}
    assert held == {"config.json", "model.safetensors", "sentencepiece.bpe.model"}
    assert list(folder.parent.iterdir()) == [folder]


def test_saving_does_not_overwrite_other_files(tmp_path):
    params, folder = make_params(kinds.MBART, UNEVEN), tmp_path / "mbart"
    pretrained.save(folder, params, UNEVEN)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = make_params(kinds.MBART, UNEVEN, seed=1)
    extra = tmp_path / "vocab.json"
    extra.touch()
    for changed, files in ((other, ()), (params, (extra,))):
        with pytest.raises(FileExistsError, match="mbart exists and holds something else"):
            pretrained.save(folder, changed, UNEVEN, tokenizer_files=files)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"vocab\.json exists"):
        pretrained.save(extra, params, UNEVEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mbart", "vocab.json"]


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, tensors):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "write_tensors", fail)
    with pytest.raises(OSError, match="No space left"):
        pretrained.save(tmp_path / "mbart", make_params(kinds.MBART, UNEVEN), UNEVEN)
    assert list(tmp_path.iterdir()) == []


def test_invalid_saves_are_refused(tmp_path):
    params = make_params(kinds.MBART, UNEVEN)
    with pytest.raises(FileNotFoundError, match=r"tokenizer_files: there is no .*vocab\.json"):
        pretrained.save(tmp_path / "a", params, UNEVEN, tokenizer_files=[tmp_path / "vocab.json"])
    clash = tmp_path / "config.json"
    clash.touch()
    with pytest.raises(ValueError, match=r"tokenizer_files=\[.*config.json'\] must differ"):
        pretrained.save(tmp_path / "a", params, UNEVEN, tokenizer_files=[clash])
    other = dataclasses.replace(UNEVEN, encoder_layers=1, decoder_heads=4)
    with pytest.raises(ValueError, match="do not belong to this model") as raised:
        pretrained.save(tmp_path / "a", params, other)
    assert "encoder/layer_1/mlp/up/bias (24,) has no place" in str(raised.value)
    assert "memory/bias is (2, 2, 8) and should be (2, 4, 4)" in str(raised.value)
    del params["logits_bias"]
    with pytest.raises(ValueError, match=r"logits_bias \(40,\) is missing"):
        pretrained.save(tmp_path / "a", params, UNEVEN)
    assert list(tmp_path.iterdir()) == [clash]


@pytest.mark.parametrize("mapper", ["mlp", "hidden_mlp", "transformer", None])
def test_whole_model_round_trips_exactly(tmp_path, mapper):
    config = MapperConfig(mapper or "mlp", prefix=3 if mapper else 0, features=6)
    model = dataclasses.replace(MODEL, mapper=config)
    params = make_params(kinds.CLIPTRANS, model)
    path = tmp_path / "model.safetensors"
    pretrained.save_cliptrans(path, params, model)
    assert {name.split(".")[0] for name in read_tensors(path)} == {"mbart"} | (
        {"adapter"} if mapper else set()
    )
    found = pretrained.load(path, config=model)
    assert (found.kind, found.config) == ("cliptrans", model)
    assert_same(found.params, params)
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists"):
        pretrained.save_cliptrans(path, make_params(kinds.CLIPTRANS, model, seed=1), model)


def released(*, clip=False):
    """The tensors of a multi-device checkpoint, with the embedding under its four names."""
    tensors = make_tensors("cliptrans")
    tensors |= {a: tensors[name] for a, name in kinds.CLIPTRANS.table(MODEL).aliases.items()}
    if clip:
        below = {f"clip.text_encoder.{name}": x for name, x in make_tensors("mclip").items()}
        tensors |= below | {"clip.image_encoder.logit_scale": np.zeros((), np.float32)}
    return {f"module.{name}": x for name, x in tensors.items()}


def test_released_file_is_read(tmp_path):
    storages, path = {}, tmp_path / "model_best_test.pth"
    model = torch_files.state_dict(released(), storages)
    value = {"model": model, "optimizer": {}, "scaler": {}, "epoch": 3, "best_bleu_test": 1.5}
    torch_files.write_archive(path, value, storages)
    found = pretrained.load(path, kind="cliptrans", config=MODEL)
    assert_same(found.params, make_params(kinds.CLIPTRANS, MODEL))
    aliases = {alias for alias, _ in found.account.aliases}
    assert aliases == set(kinds.CLIPTRANS.table(MODEL).aliases) and not found.account.dropped


def test_released_shards_are_read(tmp_path):
    tensors = list(released().items())
    for i, part in enumerate((tensors[:30], tensors[30:])):
        torch_files.save(tmp_path / f"model_best_test_{i + 1}.pth", dict(part))
    found = pretrained.load(tmp_path / "model_best_test.pth", config=MODEL)
    assert_same(found.params, make_params(kinds.CLIPTRANS, MODEL))


def test_jointly_trained_tower_can_be_read_by_itself(tmp_path):
    path = tmp_path / "model.pt"
    torch_files.save(path, released(clip=True))
    whole = pretrained.load(path, config=MODEL)
    assert_same(whole.params, make_params(kinds.CLIPTRANS, MODEL))
    dropped = dict(whole.account.dropped)
    assert "read separately" in dropped["clip.text_encoder.LinearTransformation.weight"]
    tower = pretrained.load(path, kind="mclip", config=MCLIP)
    assert_same(tower.params, make_params(kinds.KINDS["mclip"][0], MCLIP))
    assert (
        dict(tower.account.dropped)["adapter.hidden.0.weight"] == "belongs to the rest of the model"
    )


def test_differing_alias_and_unknown_tensor_are_reported(tmp_path):
    tensors = released()
    tensors["module.mbart.lm_head.weight"] = np.zeros((40, 16), np.float32)
    tensors["module.adapter.gate.weight"] = np.zeros(3, np.float32)
    torch_files.save(tmp_path / "model.pt", tensors)
    with pytest.raises(ValueError, match=r"model\.pt does not fit this model") as raised:
        pretrained.load(tmp_path / "model.pt", config=MODEL)
    assert "mbart.lm_head.weight should equal mbart.model.shared.weight" in str(raised.value)
    assert "adapter.gate.weight (3,) has no place" in str(raised.value)


def hollow(config):
    """A model's tensors, without taking memory."""
    shapes = kinds.CLIPTRANS.shapes(config)
    nothing = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    return tables.write(cliptrans_names.table(config), nothing)


@pytest.mark.parametrize("mapper", ["mlp", "hidden_mlp", "transformer", None])
def test_sizes_are_inferred_from_shapes(mapper):
    small = MBartConfig(
        vocab=20,
        encoder_layers=1,
        decoder_layers=2,
        encoder_hidden=8,
        decoder_hidden=4,
        positions=9,
    )
    config = ModelConfig(small, MapperConfig(mapper or "mlp", prefix=2, features=6))
    if mapper is None:
        config = ModelConfig(small, MapperConfig(prefix=0))
    tensors = hollow(config)
    assert kinds.CLIPTRANS.config(tensors, None, "model.pth") == config
    alone = {name.removeprefix("mbart."): x for name, x in tensors.items()}
    alone["lm_head.weight"] = alone.pop("model.shared.weight")
    assert kinds.MBART.config(alone, None, "model.pth") == small
    if mapper == "mlp":
        tensors["adapter.hidden.0.weight"] = np.zeros((2047, 6))
        with pytest.raises(ValueError, match=r"2047 rows, which must be a multiple of .* 1024"):
            kinds.CLIPTRANS.config(tensors, None, "model.pth")
        del tensors["mbart.model.decoder.layers.0.fc1.weight"]
        with pytest.raises(
            ValueError, match=r"model\.pth .*decoder\.layers\.0\.fc1\.weight is miss"
        ):
            kinds.CLIPTRANS.config(tensors, None, "model.pth")


def test_openai_tower_sizes_are_inferred_from_shapes():
    """All but the heads, which have width 64 in OpenAI's models, and the activation."""
    shapes = {
        "visual.conv1.weight": (192, 3, 5, 5),
        "visual.positional_embedding": (10, 192),
        "visual.proj": (192, 7),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (11, 192),
        "visual.transformer.resblocks.12.mlp.c_fc.weight": (11, 192),
        "visual.transformer.resblocks.12.ln_1.weight": (192,),
        "token_embedding.weight": (30, 128),
        "positional_embedding": (9, 128),
        "text_projection": (128, 7),
        "transformer.resblocks.0.mlp.c_fc.weight": (13, 128),
    }
    tensors = {name: np.zeros(shape) for name, shape in shapes.items()}
    found = sizes.openai_vision_config(tensors, "a.pt")
    assert found == ClipVisionConfig(15, 5, width=192, layers=2, heads=3, hidden=11, features=7)
    found = sizes.openai_text_config(tensors, "a.pt")
    assert found == ClipTextConfig(30, 9, width=128, layers=1, heads=2, hidden=13, features=7)
    with pytest.raises(ValueError, match=r"a\.pt does not .*: visual\.proj is \(7,\), and must ha"):
        sizes.openai_vision_config(tensors | {"visual.proj": np.zeros(7)}, "a.pt")


def test_resnet_sizes_are_inferred_from_shapes():
    shapes = {
        "visual.attnpool.positional_embedding": (10, 64),
        "visual.attnpool.c_proj.weight": (7, 64),
        "visual.bn3.weight": (6,),
    }
    for stage, depth in enumerate((2, 1, 3, 1), 1):
        shapes |= {f"visual.layer{stage}.{i}.conv1.weight": (1, 1, 1, 1) for i in range(depth)}
    tensors = {name: np.zeros(shape) for name, shape in shapes.items()}
    wanted = ResNetConfig(image=96, layers=(2, 1, 3, 1), width=6, features=7)
    assert sizes.resnet_config(tensors, "a.pt") == wanted


def test_heads_must_be_given_if_shapes_do_not_show_them(tmp_path):
    pretrained.save_cliptrans(
        tmp_path / "a.safetensors", make_params(kinds.CLIPTRANS, MODEL), MODEL
    )
    with pytest.raises(
        ValueError,
        match=r"a\.safetensors has a translator of width 16, and its tensors do not show",
    ):
        pretrained.load(tmp_path / "a.safetensors")


def test_towers_are_read_with_the_sizes_in_their_files(tmp_path):
    clip = write_folder(
        tmp_path / "clip",
        {
            "model_type": "clip",
            "projection_dim": 8,
            **{
                name: {
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 24,
                    **own,
                }
                for name, own in {
                    "vision_config": {"image_size": 8, "patch_size": 4},
                    "text_config": {"vocab_size": 40, "max_position_embeddings": 10},
                }.items()
            },
        },
        make_tensors("clip_vision") | make_tensors("clip_text"),
    )
    openai = tmp_path / "RN50x64.pt"
    text = make_tensors("clip_text", OPENAI_TEXT, layout=1)
    torch_files.save(openai, make_tensors("clip_res") | text)
    about = {"modelBase": "xlm-roberta-large", "transformerDimensions": 1024, "numDims": 8}
    mclip = write_folder(tmp_path / "mclip", about, make_tensors("mclip"))
    for source, asked, kind, config, layout, given in (
        (clip, None, "clip_vision", VISION, 0, None),
        (clip, "clip_text", "clip_text", TEXT, 0, None),
        (openai, None, "clip_res", RESNET, 0, None),
        (openai, "clip_text", "clip_text", OPENAI_TEXT, 1, None),
        (mclip, None, "mclip", MCLIP, 0, MCLIP),
    ):
        found = pretrained.load(source, kind=asked, config=given)
        assert (found.kind, found.config) == (kind, config)
        assert_same(found.params, make_params(kinds.KINDS[kind][layout], config))
    # M-CLIP's own config.json states another width than these few numbers have.
    with pytest.raises(ValueError, match=r"mclip does not fit this model"):
        pretrained.load(mclip)


def test_half_precision_weights_become_float32(tmp_path):
    tensors = {name: x.astype(np.float16) for name, x in make_tensors("mbart").items()}
    folder = write_folder(tmp_path / "mbart", hf_mbart(), tensors)
    want = jax.tree.map(
        lambda x: x.astype(np.float16).astype(np.float32), make_params(kinds.MBART, UNEVEN)
    )
    assert_same(pretrained.load(folder).params, want)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1, np.int8, "holds other types than floats: logits_bias is int8"),
        (np.nan, np.float32, "not finite, in logits_bias"),
        (np.inf, np.float16, "not finite, in logits_bias"),
    ],
)
def test_non_finite_weights_are_refused(tmp_path, value, dtype, message):
    tensors = make_tensors("mbart") | {"final_logits_bias": np.full((1, 40), value, dtype)}
    with pytest.raises(ValueError, match=message):
        pretrained.load(write_folder(tmp_path / "mbart", hf_mbart(), tensors))


def test_mismatched_kind_is_reported(tmp_path):
    folder = write_folder(tmp_path / "mbart", hf_mbart(), make_tensors("mbart"))
    file = folder / "model.safetensors"
    with pytest.raises(ValueError, match=r"kind='mbert' is none of .*did you mean 'mbart'"):
        pretrained.load(folder, kind="mbert")
    with pytest.raises(
        ValueError, match=r"holds no 'mclip': it lacks its Linear.*; it holds 'mbart'"
    ):
        pretrained.load(file, kind="mclip")
    with pytest.raises(
        ValueError, match=r"config is a MClipConfig, but kind='mbart' takes a MBart"
    ):
        pretrained.load(file, config=MCLIP)
    config = folder / "config.json"
    config.write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    with pytest.raises(ValueError, match=r"of no known kind, .*'clip_res'.*model_type='t5', .*T5M"):
        pretrained.load(folder)
    for content, message in (("{", "is not JSON"), ("[]", "must hold a JSON object, not a list")):
        config.write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json {message}"):
            pretrained.load(folder)
    write_tensors(tmp_path / "other.safetensors", {"wte.weight": np.zeros(2)})
    with pytest.raises(ValueError, match=r"of no known kind: .*called \['wte.weight'\]"):
        pretrained.load(tmp_path / "other.safetensors")
    config.write_text("{}")  # states nothing, so that the tensors decide
    assert pretrained.load(folder, config=UNEVEN).kind == "mbart"


def test_file_of_unknown_kind_is_reported_with_the_nearest_kind(tmp_path):
    tensors = make_tensors("mbart")
    del tensors["model.encoder.layernorm_embedding.weight"]
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(
        ValueError, match=r"a\.safetensors is of no known kind: .*'mclip'"
    ) as raised:
        pretrained.load(tmp_path / "a.safetensors")
    assert "closest is kind='mbart':\n  model.encoder.layernorm_embedding.weight is missing" in str(
        raised.value
    )
    write_tensors(tmp_path / "b.safetensors", {"a.weight": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"called \['a\.weight'\]\ngive the weights of one of"):
        pretrained.load(tmp_path / "b.safetensors")
