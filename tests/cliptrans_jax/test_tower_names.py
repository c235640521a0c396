"""The towers' published tensors: every name is known, and the numbers are right."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from same import assert_same
from tiny import random_like

from cliptrans_jax.tensors import open_clip
from cliptrans_jax.tensors.config_json import clip_text_config, clip_vision_config, mclip_config
from cliptrans_jax.towers import clip, clip_names, mclip, mclip_names, resnet, resnet_names
from cliptrans_jax.towers.labse import LabseConfig
from cliptrans_jax.towers.table import tower_of
from common_jax.weights import table as tables

SIZES = {"width": 16, "layers": 2, "heads": 2, "hidden": 24, "features": 8}
MCLIP = mclip.MClipConfig(vocab=40, positions=12, **SIZES)
VISION = clip.ClipVisionConfig(image=8, patch=4, **SIZES)
TEXT = clip.ClipTextConfig(vocab=40, positions=10, **SIZES)
RESNET = resnet.ResNetConfig(image=64, layers=(2, 1, 1, 1), width=4, features=8)
IDS, F32 = jnp.zeros((1, 4), jnp.int32), jnp.float32
TOWERS = {  # network, table, example
    "mclip": (mclip.MClip(MCLIP, F32), mclip_names.table(MCLIP), (IDS, IDS)),
    "clip_vision": (
        clip.ClipVision(VISION, F32),
        clip_names.vision_table(VISION),
        (jnp.zeros((1, 8, 8, 3)),),
    ),
    "clip_text": (clip.ClipText(TEXT, F32), clip_names.text_table(TEXT), (IDS, None)),
    "openai_resnet": (
        resnet.ClipResNet(RESNET, F32),
        resnet_names.table(RESNET),
        (jnp.zeros((1, 64, 64, 3)),),
    ),
    "openai_text": (clip.ClipText(TEXT, F32), clip_names.openai_text_table(TEXT), (IDS, None)),
}
# What the files hold besides the towers.
EXTRA = {
    "mclip": {
        "transformer.embeddings.position_ids": (1, 12),
        "transformer.pooler.dense.weight": (16, 16),
        "transformer.pooler.dense.bias": (16,),
    },
    "clip": {
        "logit_scale": (),
        "text_model.embeddings.position_ids": (1, 10),
        "vision_model.embeddings.position_ids": (1, 5),
    },
    "openai": {
        "logit_scale": (),
        "input_resolution": (),
        "context_length": (),
        "vocab_size": (),
        "visual.bn1.num_batches_tracked": (),
        "visual.layer1.0.downsample.1.num_batches_tracked": (),
    },
}
SHAPES = {
    "mclip": {
        "transformer.embeddings.word_embeddings.weight": (40, 16),
        "transformer.embeddings.token_type_embeddings.weight": (1, 16),
        "transformer.encoder.layer.1.attention.self.key.weight": (16, 16),
        "transformer.encoder.layer.0.intermediate.dense.weight": (24, 16),
        "transformer.encoder.layer.1.output.dense.weight": (16, 24),
        "LinearTransformation.weight": (8, 16),
    },
    "clip_vision": {
        "vision_model.embeddings.class_embedding": (16,),
        "vision_model.embeddings.patch_embedding.weight": (16, 3, 4, 4),
        "vision_model.embeddings.position_embedding.weight": (5, 16),
        "vision_model.pre_layrnorm.weight": (16,),
        "vision_model.encoder.layers.1.mlp.fc1.weight": (24, 16),
        "visual_projection.weight": (8, 16),
    },
    "clip_text": {
        "text_model.embeddings.token_embedding.weight": (40, 16),
        "text_model.encoder.layers.0.self_attn.out_proj.weight": (16, 16),
        "text_projection.weight": (8, 16),
    },
    "openai_resnet": {
        "visual.conv1.weight": (2, 3, 3, 3),
        "visual.bn3.running_var": (4,),
        "visual.layer1.1.conv1.weight": (4, 16, 1, 1),
        "visual.layer2.0.conv2.weight": (8, 8, 3, 3),
        "visual.layer4.0.downsample.0.weight": (128, 64, 1, 1),
        "visual.layer4.0.downsample.1.running_mean": (128,),
        "visual.attnpool.positional_embedding": (5, 128),
        "visual.attnpool.c_proj.weight": (8, 128),
    },
    "openai_text": {
        "token_embedding.weight": (40, 16),
        "transformer.resblocks.1.attn.in_proj_weight": (48, 16),
        "transformer.resblocks.1.attn.in_proj_bias": (48,),
        "transformer.resblocks.0.mlp.c_fc.weight": (24, 16),
        "text_projection": (16, 8),
    },
}
FILES = {
    "mclip": ("mclip",),
    "clip": ("clip_vision", "clip_text"),
    "openai": ("openai_resnet", "openai_text"),
}
XLMR_LARGE = {
    "model_type": "xlm-roberta",
    "vocab_size": 250002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-05,
    "pad_token_id": 1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "position_embedding_type": "absolute",
}
LABSE = XLMR_LARGE | {
    "model_type": "bert",
    "vocab_size": 501153,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
MCLIP_LARGE = {"modelBase": "xlm-roberta-large", "transformerDimensions": 1024, "numDims": 512}


def shapes_of(tower):
    network, _, arrays = TOWERS[tower]
    return jax.eval_shape(network.init, jax.random.key(0), *arrays)["params"]


def tensors_of(file):
    """Everything that a file of these towers would hold."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in EXTRA[file].items()}
    for tower in FILES[file]:
        tensors |= tables.write(TOWERS[tower][1], random_like(shapes_of(tower)))
    return tensors


def read(tower, tensors):
    shapes = shapes_of(tower)
    return tables.read(TOWERS[tower][1], tensors, shapes=shapes, file="model.safetensors")


@pytest.mark.parametrize("tower", TOWERS)
def test_tensors_round_trip_unchanged(tower):
    table, params = TOWERS[tower][1], random_like(shapes_of(tower))
    assert table.entries.keys() == traverse_util.flatten_dict(params, sep="/").keys()
    tensors = tables.write(table, params)
    shapes = {name: tensors[name].shape for name in SHAPES[tower]}
    assert shapes == SHAPES[tower]
    back, _ = read(tower, tensors)
    assert_same(back, params)
    assert_same(tables.write(table, back), tensors)


@pytest.mark.parametrize("file", FILES)
def test_each_tower_takes_its_tensors_from_a_combined_file(file):
    tensors, taken = tensors_of(file), []
    for tower in FILES[file]:
        params, account = read(tower, tensors)
        assert_same(params, random_like(shapes_of(tower)))
        own = [name for name, _, _ in account.taken]
        assert sorted(own + [name for name, _ in account.dropped]) == sorted(tensors)
        taken += own
    assert sorted(taken + list(EXTRA[file])) == sorted(tensors)


@pytest.mark.parametrize("file", FILES)
def test_missing_unknown_and_misshapen_tensors_are_reported(file):
    for tower in FILES[file]:
        tensors = tensors_of(file)
        missing, reshaped = list(SHAPES[tower])[:2]
        shape = tensors[reshaped].shape
        lost = tensors.pop(missing).shape
        tensors[reshaped] = np.zeros((*shape, 7), np.float32)
        tensors["surplus.weight"] = np.zeros(3)
        tensors[f"{next(iter(EXTRA[file]))}.more"] = np.zeros(4)
        with pytest.raises(ValueError, match=r"model\.safetensors does not fit") as raised:
            read(tower, tensors)
        for part in (
            f"{missing} {lost} is missing, for ",
            f"{reshaped} is {(*shape, 7)} and should be {shape}",
            "surplus.weight (3,) has no place",
            ".more (4,) has no place",  # though its prefix may be dropped
        ):
            assert part in str(raised.value)


RENAMED = {  # Hugging Face's names -> OpenAI's
    r"^text_model\.embeddings\.token_embedding": "token_embedding",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.encoder\.layers": "transformer.resblocks",
    r"^text_model\.final_layer_norm": "ln_final",
    r"^text_projection\.weight": "text_projection",
    r"^vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"^vision_model\.embeddings\.patch_embedding": "visual.conv1",
    r"^vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"^vision_model\.encoder\.layers": "visual.transformer.resblocks",
    r"^vision_model\.pre_layrnorm": "visual.ln_pre",
    r"^vision_model\.post_layernorm": "visual.ln_post",
    r"^visual_projection\.weight": "visual.proj",
    r"self_attn\.": "attn.",
    r"layer_norm(\d)": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"attn\.[qkv]_proj\.": "attn.in_proj_",
}


@pytest.mark.parametrize(
    ("openai", "tower"),
    [
        (clip_names.openai_text_table, "clip_text"),
        (clip_names.openai_vision_table, "clip_vision"),
    ],
)
def test_openai_names_give_the_same_towers(openai, tower):
    network, hugging, _ = TOWERS[tower]
    params, wanted = random_like(shapes_of(tower)), {}
    for name, tensor in tables.write(hugging, params).items():
        theirs = functools.reduce(lambda x, pair: re.sub(*pair, x), RENAMED.items(), name)
        if "in_proj" in theirs:  # queries, keys and values, in this order
            parts = [wanted[theirs]] if theirs in wanted else []
            wanted[theirs] = np.concatenate([*parts, tensor])
        else:
            wanted[theirs] = tensor.T if theirs.endswith(("text_projection", ".proj")) else tensor
    table = openai(network.config)
    assert_same(tables.write(table, params), wanted)
    back, _ = tables.read(table, wanted, shapes=shapes_of(tower), file="openai")
    assert_same(back, params)


def test_published_configs_are_the_defaults():
    assert mclip_config(MCLIP_LARGE, XLMR_LARGE) == mclip.MClipConfig()
    assert mclip_config(MCLIP_LARGE, None) == mclip.MClipConfig()
    other = mclip_config(MCLIP_LARGE | {"numDims": 768}, None)
    assert other == mclip.MClipConfig(features=768)
    base = MCLIP_LARGE | {"modelBase": "FacebookAI/xlm-roberta-large"}
    assert mclip_config(base, None) == mclip.MClipConfig()
    labse = {"modelBase": "setu4993/LaBSE", "transformerDimensions": 768, "numDims": 768}
    assert mclip_config(labse, None) == mclip_config(labse, LABSE) == LabseConfig()
    sizes = {"hidden_act": "quick_gelu", "attention_dropout": 0.0, "dropout": 0.0}
    whole = {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": sizes | {"hidden_size": 512, "eos_token_id": 2},
        "vision_config": sizes | {"hidden_size": 768, "num_channels": 3},
    }
    assert clip_vision_config(whole) == clip.ClipVisionConfig()
    assert clip_text_config(whole) == clip.ClipTextConfig()


def test_all_released_mclip_configs_are_read_with_image_towers():
    large = {"modelBase": "xlm-roberta-large", "transformerDimensions": 1024}
    labse = {"modelBase": "setu4993/LaBSE", "transformerDimensions": 768}
    sides = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    l_14 = {"vision_config": sides | {"intermediate_size": 4096, "patch_size": 14}}
    l_14 = clip_vision_config({"model_type": "clip", "projection_dim": 768} | l_14)
    sizes = {"image_size": 240, "layers": 12, "width": 896, "patch_size": 16}
    b_16_plus = open_clip.vision_config({"model_cfg": {"embed_dim": 640, "vision_cfg": sizes}})
    assert (b_16_plus.heads, b_16_plus.hidden, b_16_plus.activation) == (14, 3584, "gelu")
    for about, kind, image in (
        (large | {"numDims": 512}, "xlmr", clip.ClipVisionConfig()),
        (large | {"numDims": 768}, "xlmr", l_14),
        (large | {"numDims": 640}, "xlmr", b_16_plus),
        (labse | {"numDims": 768}, "labse", l_14),
    ):
        text = mclip_config(about, None)
        assert tower_of(text).sentences.tokenizer == kind
        assert text.features == image.features == about["numDims"]


def test_every_config_key_is_read():
    base = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 5}
    base |= {"intermediate_size": 7, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}
    want = {"width": 20, "layers": 3, "heads": 5, "hidden": 7, "eps": 1e-3, "activation": "gelu"}
    own = {"vocab_size": 30, "max_position_embeddings": 9}
    hf = {"model_type": "clip", "projection_dim": 6, "text_config": base | own}
    hf["vision_config"] = base | {"image_size": 12, "patch_size": 4}
    sizes = {"vocab": 30, "positions": 9}
    assert clip_text_config(hf) == clip.ClipTextConfig(**want, **sizes, features=6)
    assert clip_vision_config(hf) == clip.ClipVisionConfig(**want, image=12, patch=4, features=6)
    roberta = base | own | {"type_vocab_size": 2, "pad_token_id": 0, "hidden_dropout_prob": 0.2}
    about = {"transformerDimensions": 20, "numDims": 6}
    want |= sizes | {"types": 2, "pad": 0, "dropout": 0.2, "features": 6}
    assert mclip_config(about, roberta) == mclip.MClipConfig(**want)


def test_standalone_tower_config_is_read_too():
    tower = {"model_type": "clip_vision_model", "patch_size": 16, "hidden_act": "gelu"}
    want = clip.ClipVisionConfig(patch=16, activation="gelu", features=64)
    assert clip_vision_config(tower | {"projection_dim": 64}) == want
    tower = {"model_type": "clip_text_model", "vocab_size": 100, "eos_token_id": 99}
    assert clip_text_config(tower) == clip.ClipTextConfig(vocab=100)


@pytest.mark.parametrize(
    ("hf", "transformer_hf", "message"),
    [
        ({"numDims": 512}, None, "modelBase is missing"),
        (MCLIP_LARGE, {}, "vocab_size is missing in the base's config"),
        (MCLIP_LARGE | {"modelBase": "x"}, None, "modelBase='x' .* not one of .*'xlm-roberta-la"),
        (MCLIP_LARGE, XLMR_LARGE | {"hidden_size": 768}, "sions=1024 .* its transformer, 768"),
        (MCLIP_LARGE, XLMR_LARGE | {"hidden_act": "silu"}, "hidden_act='silu' .* must be 'gelu'"),
        (MCLIP_LARGE, XLMR_LARGE | {"model_type": "electra"}, "model_type='electra' of the base"),
        (MCLIP_LARGE, XLMR_LARGE | {"is_decoder": True}, "is_decoder=True .* must be False"),
        (MCLIP_LARGE, XLMR_LARGE | {"add_cross_attention": True}, "add_cross_attention=True"),
        (MCLIP_LARGE, XLMR_LARGE | {"position_embedding_type": "rotary"}, "must be 'absolute'"),
        (MCLIP_LARGE, XLMR_LARGE | {"pad_token_id": -1}, "pad_token_id=-1 .* from 0 to 10000000"),
        (MCLIP_LARGE, XLMR_LARGE | {"vocab_size": 0}, "vocab_size=0 .* from 1 to 10000000"),
        (MCLIP_LARGE, XLMR_LARGE | {"num_hidden_layers": 1001}, "=1001 .* from 1 to 1000"),
        (MCLIP_LARGE | {"numDims": 2.5}, None, "numDims=2.5 .* must be a whole number"),
    ],
)
def test_unsupported_mclip_is_reported(hf, transformer_hf, message):
    with pytest.raises(ValueError, match=message):
        mclip_config(hf, transformer_hf)


@pytest.mark.parametrize(
    ("tower", "hf", "message"),
    [
        ("vision", {}, "model_type is missing in CLIP"),
        ("text", {"model_type": "siglip"}, "model_type='siglip' of CLIP's"),
        ("vision", {"model_type": "clip_text_model"}, "model_type='clip_text_model'"),
        ("vision", {"vision_config": {"num_channels": 1}}, "num_channels=1 of .* must be 3"),
        ("text", {"text_config": {"hidden_act": "relu"}}, "='relu' .* 'gelu' or 'quick_gelu'"),
        ("text", {"text_config": {"eos_token_id": 7}}, "eos_token_id=7 .* 2 or 49407"),
    ],
)
def test_unsupported_clip_is_reported(tower, hf, message):
    reader = {"vision": clip_vision_config, "text": clip_text_config}[tower]
    if "vision_config" in hf or "text_config" in hf:
        hf = hf | {"model_type": "clip"}
    with pytest.raises(ValueError, match=message):
        reader(hf)
