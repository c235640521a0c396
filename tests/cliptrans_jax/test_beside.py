"""Settings that the tensors do not show are read from JSON files, taken from flags, or listed as
assumed: activation, heads and epsilons of towers, and the base of an M-CLIP."""

import copy
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch_files
import transformers
from published_files import (
    CLIP,
    MCLIP,
    OPENAI_TEXT,
    TEXT,
    VISION,
    hf_mbart,
    make_params,
    make_tensors,
    write_folder,
)
from same import assert_same
from tiny_cliptrans import UNEVEN
from torch_files import Global, New, state_dict

from cliptrans_jax import pretrained
from cliptrans_jax.tensors import kinds, open_clip
from cliptrans_jax.tensors.config_json import (
    clip_text_config,
    clip_vision_config,
    mbart_config,
    mclip_config,
)
from common_jax.weights import write_tensors

OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "layers": 2, "width": 16, "patch_size": 4},
        "text_cfg": {
            "context_length": 10,
            "vocab_size": 40,
            "width": 16,
            "heads": 2,
            "layers": 2,
            "mlp_ratio": 1.5,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


def open_clip_folder(folder, content, *, name="open_clip_model.safetensors"):
    """OpenCLIP's weights, under OpenAI's names, and the files that come with them."""
    folder.mkdir()
    write_tensors(folder / name, make_tensors("clip_text", TEXT, layout=1))
    if content is not None:
        (folder / open_clip.FILE).write_text(json.dumps(content))
    return folder


def test_activation_is_read_from_the_open_clip_config(tmp_path):
    folder = open_clip_folder(tmp_path / "gelu", OPEN_CLIP)
    for source in (folder, folder / "open_clip_model.safetensors"):
        found = pretrained.load(source)
        assert found.kind == "clip_text" and found.account.assumed == ()
        assert found.config == dataclasses.replace(TEXT, activation="gelu")
        assert_same(found.params, make_params(kinds.KINDS["clip_text"][1], TEXT))
    quick = OPEN_CLIP | {"model_cfg": OPEN_CLIP["model_cfg"] | {"quick_gelu": True}}
    folder = open_clip_folder(tmp_path / "quick", quick)
    assert pretrained.load(folder, kind="clip_text").config == TEXT
    with pytest.raises(ValueError, match=r"says activation='quick_gelu', but .*_activation='gelu'"):
        pretrained.load(folder, activation="gelu")


def test_image_tower_under_openai_names_is_read(tmp_path):
    """The tensors of Hugging Face's file for the same tower, renamed by hand."""
    params = make_params(kinds.KINDS["clip_vision"][0], VISION)
    tensors = {
        "visual.class_embedding": params["class_token"],
        "visual.positional_embedding": params["positions"],
        "visual.conv1.weight": params["patches"]["kernel"]
        .reshape(4, 4, 3, 16)
        .transpose(3, 2, 0, 1),
        "visual.proj": params["projection"]["kernel"],
        "visual.ln_pre.weight": params["pre_norm"]["scale"],
        "visual.ln_pre.bias": params["pre_norm"]["bias"],
        "visual.ln_post.weight": params["post_norm"]["scale"],
        "visual.ln_post.bias": params["post_norm"]["bias"],
        "logit_scale": np.ones((), np.float32),
    }
    for i in range(2):
        layer, name = params[f"layer_{i}"], f"visual.transformer.resblocks.{i}"
        qkv = layer["attention"]["qkv"]  # (D, 3, H, K) and (3, H, K)
        tensors |= {
            f"{name}.attn.in_proj_weight": qkv["kernel"].reshape(16, 48).T,
            f"{name}.attn.in_proj_bias": qkv["bias"].reshape(48),
            f"{name}.attn.out_proj.weight": layer["attention"]["out"]["kernel"].reshape(16, 16).T,
            f"{name}.attn.out_proj.bias": layer["attention"]["out"]["bias"],
        }
        for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            tensors[f"{name}.{theirs}.weight"] = layer[ours]["scale"]
            tensors[f"{name}.{theirs}.bias"] = layer[ours]["bias"]
        for theirs, ours in (("c_fc", "up"), ("c_proj", "down")):
            tensors[f"{name}.mlp.{theirs}.weight"] = layer["mlp"][ours]["kernel"].T
            tensors[f"{name}.mlp.{theirs}.bias"] = layer["mlp"][ours]["bias"]
    folder = tmp_path / "open_clip"
    folder.mkdir()
    both = tensors | make_tensors("clip_text", TEXT, layout=1)
    write_tensors(folder / "open_clip_model.safetensors", both)
    model = OPEN_CLIP["model_cfg"]
    vision = model["vision_cfg"] | {"head_width": 8, "mlp_ratio": 1.5}
    content = OPEN_CLIP | {"model_cfg": model | {"vision_cfg": vision}}
    (folder / open_clip.FILE).write_text(json.dumps(content))
    found = pretrained.load(folder)
    assert (found.kind, found.config) == (
        "clip_vision",
        dataclasses.replace(VISION, activation="gelu"),
    )
    assert_same(found.params, params)
    assert pretrained.load(folder, kind="clip_text").config.activation == "gelu"
    # In a bare file, shapes tell everything except heads and epsilon.
    file = tmp_path / "vit.safetensors"
    write_tensors(file, tensors)
    found = pretrained.load(file, activation="quick_gelu")
    assert found.config == dataclasses.replace(VISION, heads=1)
    assert dict(found.account.assumed) == {"heads": "1", "eps": "1e-05"}
    content["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / open_clip.FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"open_clip_config\.json says mean=\[0\.5, 0\.5, 0\.5\]"):
        pretrained.load(folder)


@pytest.mark.parametrize("name", ["visual.conv1.weight", "visual.positional_embedding"])
def test_tower_with_an_empty_tensor_is_reported(tmp_path, name):
    tensors = {
        "visual.conv1.weight": np.zeros((16, 3, 4, 4), "f4"),
        "visual.positional_embedding": np.zeros((5, 16), "f4"),
        "visual.proj": np.zeros((16, 8), "f4"),
        "visual.ln_pre.weight": np.zeros(16, "f4"),
        "visual.transformer.resblocks.99999999999.mlp.c_fc.weight": np.zeros((64, 16), "f4"),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": np.zeros((64, 16), "f4"),
    }
    tensors[name] = tensors[name][:0]
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        pretrained.load(tmp_path / "a.safetensors", activation="gelu")


def test_unknown_activation_is_refused(tmp_path, caplog):
    folder = open_clip_folder(tmp_path / "a", None)
    with pytest.raises(
        ValueError, match=r"does not say which activation .*open_clip_config\.json b"
    ):
        pretrained.load(folder)
    torch_files.save(tmp_path / "epoch_32.pt", make_tensors("clip_text", OPENAI_TEXT, layout=1))
    with pytest.raises(
        ValueError, match=r"epoch_32\.pt .*config\.sources\.clip_activation=quick_g"
    ):
        pretrained.load(tmp_path / "epoch_32.pt")
    found = pretrained.load(tmp_path / "epoch_32.pt", activation="gelu")
    assert found.config == dataclasses.replace(OPENAI_TEXT, activation="gelu")
    assert dict(found.account.assumed) == {"heads": "2", "eps": "1e-05"}
    assert "epoch_32.pt does not say, so assumed: heads=2, eps=1e-05" in caplog.text
    # Without its config.json, a file with Hugging Face's names may be OpenAI's or OpenCLIP's too.
    write_tensors(tmp_path / "tower.safetensors", make_tensors("clip_vision"))
    with pytest.raises(
        ValueError, match=r"tower\.safetensors does not say .* put its config\.json"
    ):
        pretrained.load(tmp_path / "tower.safetensors")


def test_activation_follows_from_openai_modules_or_file_names(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tensors = make_tensors("clip_text", OPENAI_TEXT, layout=1)
    torch_files.save(tmp_path / "ViT-B-32.pt", tensors)
    found = pretrained.load(tmp_path / "ViT-B-32.pt")
    assert found.config == OPENAI_TEXT
    assert dict(found.account.assumed)["activation"] == "'quick_gelu'"
    # A TorchScript archive under any name: modules are identified by class.
    storages, root = {}, {}
    for name, held in state_dict(tensors, storages).items():
        *path, last = name.split(".")
        place = root
        for part in path:
            place = place.setdefault(part, {})
        place[last] = held

    def module(state):
        state = {k: module(v) if isinstance(v, dict) else v for k, v in state.items()}
        return New(Global("__torch__.multimodal.model", "Block"), state)

    root["act"] = {}
    top = module(root)
    top.state["act"] = New(Global("__torch__.multimodal.model.transformer", "QuickGELU"), {})
    path = tmp_path / "mine.pt"
    torch_files.write_archive(path, top, storages, extra={"constants.pkl": b""})
    found = pretrained.load(path)
    assert found.config == OPENAI_TEXT
    assert dict(found.account.assumed) == {"heads": "2", "eps": "1e-05"}
    assert "activation='quick_gelu', from its QuickGELU modules" in caplog.text
    with pytest.raises(ValueError, match=r"mine\.pt has QuickGELU modules, but .*='gelu'"):
        pretrained.load(path, activation="gelu")
    # The content decides what a file is: modules are found under any suffix, and not looked for in
    # safetensors with PyTorch's suffix.
    path.rename(tmp_path / "mine")
    assert pretrained.load(tmp_path / "mine").config == OPENAI_TEXT
    write_tensors(tmp_path / "bare.safetensors", tensors)
    (tmp_path / "bare.safetensors").rename(tmp_path / "bare.pt")
    assert pretrained.load(tmp_path / "bare.pt", activation="gelu").config.activation == "gelu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_type": "eos"}, "pool_type='eos' of text_cfg .* must be 'argmax'"),
        ({"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base'"),
        ({"width": "16"}, "width='16' of text_cfg in open_clip_config.json must be a whole number"),
        ({"mlp_ratio": [4]}, r"mlp_ratio=\[4\] .* must be a positive number"),
        ({"ls_init_value": 1e-5}, "ls_init_value=1e-05"),
    ],
)
def test_unsupported_open_clip_is_reported(tmp_path, change, message):
    model = OPEN_CLIP["model_cfg"]
    content = {"model_cfg": model | {"text_cfg": model["text_cfg"] | change}}
    with pytest.raises(ValueError, match=message):
        pretrained.load(open_clip_folder(tmp_path / "a", content))
    with pytest.raises(
        ValueError, match=r"model_cfg=\[\] in open_clip_config\.json must be a dict"
    ):
        open_clip.text_config({"model_cfg": []})


@pytest.mark.parametrize("side", ["text", "vision"])
def test_older_clip_sections_are_read_as_by_hugging_face(side):
    """`text_config_dict` replaces `text_config`, with Hugging Face's defaults for missing keys."""
    older = {"hidden_size": 32, "num_attention_heads": 4, "hidden_act": "gelu"}
    hf = CLIP | {f"{side}_config_dict": older}
    read = {"text": clip_text_config, "vision": clip_vision_config}[side]
    found, theirs = (
        read(hf),
        getattr(transformers.CLIPConfig(**copy.deepcopy(hf)), f"{side}_config"),
    )
    assert (found.width, found.heads, found.activation) == (32, 4, "gelu")
    assert found.layers == 12 == theirs.num_hidden_layers
    assert found.hidden == theirs.intermediate_size
    assert (found.width, found.activation) == (theirs.hidden_size, theirs.hidden_act)
    assert found.features == 8
    assert read(CLIP | {f"{side}_config_dict": None}) == {"text": TEXT, "vision": VISION}[side]
    for key in (f"{side}_config_dict", f"{side}_config"):
        with pytest.raises(ValueError, match=rf"{key}='x' of CLIP's config\.json must be a dict"):
            read(CLIP | {key: "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": "16"},
            "hidden_size='16' of text_config in CLIP's config.json must be a w",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads=0 .* from 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 .* from 1 to 1000"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan .* a number from 0"),
        ({"layer_norm_eps": True}, "layer_norm_eps=True"),
        ({"hidden_act": ["gelu"]}, r"hidden_act=\['gelu'\]"),
        ({"vocab_size": None}, "vocab_size=None"),
    ],
)
def test_size_of_the_wrong_type_is_reported_with_its_file(tmp_path, change, message):
    hf = CLIP | {"text_config": CLIP["text_config"] | change}
    folder = write_folder(tmp_path / "clip", hf, make_tensors("clip_text"))
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.load(folder, kind="clip_text")
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("key", ["d_model", "scale_embedding", "dropout"])
def test_mbart_config_with_wrong_types_is_reported(tmp_path, key):
    folder = write_folder(tmp_path / "a", hf_mbart(**{key: "x"}), {"a": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="holds no 'mbart'"):
        pretrained.load(folder)
    with pytest.raises(ValueError, match=rf"{key}='x' of mBART's config\.json must be"):
        mbart_config(hf_mbart(**{key: "x"}))


def test_model_type_must_be_a_string(tmp_path):
    for odd in ({"model_type": ["mbart"]}, {"architectures": 5, "model_type": "x"}):
        folder = write_folder(tmp_path / str(len(odd)), odd, {"a": np.ones(2, np.float32)})
        with pytest.raises(ValueError, match="of no known kind"):
            pretrained.load(folder)


def test_missing_logits_bias_becomes_zeros_with_a_note(tmp_path):
    tensors = make_tensors("mbart")
    del tensors["final_logits_bias"]
    found = pretrained.load(write_folder(tmp_path / "mbart", hf_mbart(), tensors))
    np.testing.assert_array_equal(found.params["logits_bias"], np.zeros(40, np.float32))
    assert found.account.notes == ("final_logits_bias is not in the file: zeros",)
    del tensors["model.encoder.layer_norm.bias"]
    with pytest.raises(ValueError, match=r"model\.encoder\.layer_norm\.bias \(16,\) is missing"):
        pretrained.load(write_folder(tmp_path / "other", hf_mbart(), tensors))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "net.translator."])
def test_common_prefix_is_removed(tmp_path, prefix):
    tensors = {prefix + name: x for name, x in make_tensors("mbart").items()}
    tensors |= {"criterion.weight": np.ones(3, np.float32)} if prefix == "model." else {}
    found = pretrained.load(write_folder(tmp_path / "mbart", hf_mbart(), tensors))
    assert_same(found.params, make_params(kinds.MBART, UNEVEN))
    assert any(repr(prefix) in note for note in found.account.notes)
    if prefix == "model.":
        assert dict(found.account.dropped) == {
            "criterion.weight": "belongs to the rest of the model"
        }


def test_file_with_two_networks_requires_a_choice(tmp_path):
    tensors = {
        prefix + name: x + seed
        for seed, prefix in enumerate(("model.", "ema_model."))
        for name, x in make_tensors("clip_text").items()
    }
    folder = write_folder(tmp_path / "clip", CLIP, tensors)
    with pytest.raises(
        ValueError, match=r"networks below 'ema_model\.', 'model\.': choose with weig"
    ):
        pretrained.load(folder, kind="clip_text")
    found = pretrained.load(folder, kind="clip_text", weights="model.")
    assert_same(found.params, make_params(kinds.KINDS["clip_text"][0], TEXT))
    with pytest.raises(ValueError, match=r"holds no 'clip_text' below 'x\.'"):
        pretrained.load(folder, kind="clip_text", weights="x.")


XLMR = {
    "model_type": "xlm-roberta",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "hidden_dropout_prob": 0.1,
    "hidden_act": "gelu",
}


def test_mclip_with_a_local_base_is_read_with_that_folder(tmp_path):
    base = tmp_path / "xlmr"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(XLMR))
    about = {"modelBase": str(base), "transformerDimensions": 16, "numDims": 8}
    folder = write_folder(tmp_path / "mclip", about, make_tensors("mclip"))
    assert pretrained.load(folder).config == MCLIP
    # If the makers' folder does not exist here, the user's is used.
    about["modelBase"] = "/home/makers/xlmr"
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"'/home/makers/xlmr' .*config\.sources\.clip_text_base"):
        pretrained.load(folder)
    found = pretrained.load(folder, base=str(base))
    assert found.config == MCLIP == mclip_config(about, XLMR)
    with pytest.raises(ValueError, match=r"transformerDimensions=16 .* 1024"):
        pretrained.load(folder, base="xlm-roberta-large")
    clip = write_folder(tmp_path / "clip", CLIP, make_tensors("clip_text"))
    with pytest.raises(ValueError, match=r"clip_text_base='x' is for an M-CLIP"):
        pretrained.load(clip, kind="clip_text", base="x")


def test_fields_not_shown_by_shapes_are_listed(tmp_path):
    shapes = {"vocab": 20, "encoder_layers": 1, "decoder_layers": 1, "positions": 9}
    small = dataclasses.replace(type(UNEVEN)(), encoder_hidden=8, decoder_hidden=4, **shapes)
    assumed = {name: getattr(small, name) for name in kinds.MBART.unstated}
    assert assumed == {
        "encoder_heads": 16,
        "decoder_heads": 16,
        "scale_embedding": True,
        "dropout": 0.1,
        "pad": 1,
        "eos": 2,
        "start": 2,
    }


def test_dropout_rates_of_translators_and_towers_are_noted(tmp_path):
    folder = write_folder(
        tmp_path / "mbart", hf_mbart(activation_dropout=0.1), make_tensors("mbart")
    )
    assert pretrained.load(folder).account.notes == (
        "activation_dropout=0.1 in its config.json has no effect here, not even in training; "
        "config.model.mbart.dropout sets the dropout",
    )
    assert hf_mbart()["activation_dropout"] == hf_mbart()["decoder_layerdrop"] == 0.0
    rates = {"attention_dropout": 0.2, "dropout": 0.0}
    sections = {key: CLIP[key] | rates for key in ("text_config", "vision_config")}
    for number, hf in enumerate((CLIP | sections, CLIP["text_config"] | rates)):
        about = {"model_type": "clip_text_model", "projection_dim": 8} | hf
        folder = write_folder(tmp_path / str(number), about, make_tensors("clip_text"))
        found = pretrained.load(folder, kind="clip_text")
        assert found.config == TEXT and found.account.notes == (
            "attention_dropout=0.2 in its config.json has no effect here, not even in training",
        )


@pytest.mark.parametrize("kind", ["mbart", "clip_text"])
def test_quantised_weights_are_refused_with_a_way_out(tmp_path, kind):
    hf = {"mbart": hf_mbart(), "clip_text": CLIP}[kind] | {"quantization_config": {"bits": 8}}
    folder = write_folder(tmp_path / "a", hf, make_tensors(kind))
    with pytest.raises(ValueError, match=r"must be left out; read the dequantised model .*save_"):
        pretrained.load(folder, kind=kind)
