"""Reading the encoders' published tensors: every name has a place, and the numbers come out
right."""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from same import assert_same
from tiny import random_like

from cliptrans_jax import names
from cliptrans_jax.convert_towers import (
    CLIP_TEXT_DROPPED,
    CLIP_VISION_DROPPED,
    MCLIP_DROPPED,
    OPENAI_RESNET_DROPPED,
    OPENAI_TEXT_DROPPED,
    clip_text_config,
    clip_text_table,
    clip_vision_config,
    clip_vision_table,
    mclip_config,
    mclip_table,
    openai_resnet_table,
    openai_text_table,
)
from cliptrans_jax.models import clip, resnet, xlmr

NO_TORCH = "the reference is computed by torch and transformers, which are not installed"
SIZES = {"width": 16, "layers": 2, "heads": 2, "hidden": 24, "features": 8}
MCLIP = xlmr.MClipConfig(vocab=40, positions=12, **SIZES)
VISION = clip.ClipVisionConfig(image=8, patch=4, **SIZES)
TEXT = clip.ClipTextConfig(vocab=40, positions=10, **SIZES)
RESNET = resnet.ResNetConfig(image=64, layers=(2, 1, 1, 1), width=4, features=8)
IDS, F32 = jnp.zeros((1, 4), jnp.int32), jnp.float32
TOWERS = {  # network, table, what is dropped, example
    "mclip": (xlmr.MClip(MCLIP, F32), mclip_table(MCLIP), MCLIP_DROPPED, (IDS, IDS)),
    "clip_vision": (
        clip.ClipVision(VISION, F32),
        clip_vision_table(VISION),
        CLIP_VISION_DROPPED,
        (jnp.zeros((1, 8, 8, 3)),),
    ),
    "clip_text": (clip.ClipText(TEXT, F32), clip_text_table(TEXT), CLIP_TEXT_DROPPED, (IDS, None)),
    "openai_resnet": (
        resnet.ClipResNet(RESNET, F32),
        openai_resnet_table(RESNET),
        OPENAI_RESNET_DROPPED,
        (jnp.zeros((1, 64, 64, 3)),),
    ),
    "openai_text": (
        clip.ClipText(TEXT, F32),
        openai_text_table(TEXT),
        OPENAI_TEXT_DROPPED,
        (IDS, None),
    ),
}
# What the files hold beside the towers.
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
MCLIP_LARGE = {"modelBase": "xlm-roberta-large", "transformerDimensions": 1024, "numDims": 512}


pytestmark = pytest.mark.usefixtures("little_optimised")


def shapes_of(tower):
    network, _, _, arrays = TOWERS[tower]
    return jax.eval_shape(network.init, jax.random.key(0), *arrays)["params"]


def tensors_of(file):
    """Everything that a file of these towers would hold."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in EXTRA[file].items()}
    for tower in FILES[file]:
        tensors |= names.write(TOWERS[tower][1], random_like(shapes_of(tower)))
    return tensors


def read(tower, tensors):
    _, table, dropped, _ = TOWERS[tower]
    return names.read(
        table, tensors, shapes=shapes_of(tower), file="model.safetensors", dropped=dropped
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_tensors_go_there_and_back_unchanged(tower):
    table, params = TOWERS[tower][1], random_like(shapes_of(tower))
    tensors = names.write(table, params)
    shapes = {name: tensors[name].shape for name in SHAPES[tower]}
    assert shapes == SHAPES[tower]
    back, _ = read(tower, tensors)
    assert_same(back, params)
    assert_same(names.write(table, back), tensors)


@pytest.mark.parametrize("file", FILES)
def test_each_tower_takes_its_own_of_a_whole_file(file):
    tensors, taken = tensors_of(file), []
    for tower in FILES[file]:
        params, account = read(tower, tensors)
        assert_same(params, random_like(shapes_of(tower)))
        own = [name for name, _, _ in account.taken]
        assert sorted(own + [name for name, _ in account.dropped]) == sorted(tensors)
        taken += own
    assert sorted(taken + list(EXTRA[file])) == sorted(tensors)


@pytest.mark.parametrize("file", FILES)
def test_what_is_missing_unknown_or_of_another_shape_is_named(file):
    for tower in FILES[file]:
        tensors = tensors_of(file)
        missing, reshaped = list(SHAPES[tower])[:2]
        shape = tensors[reshaped].shape
        del tensors[missing]
        tensors[reshaped] = np.zeros((*shape, 7), np.float32)
        tensors["surplus.weight"] = np.zeros(3)
        with pytest.raises(ValueError, match=r"model\.safetensors does not hold") as raised:
            read(tower, tensors)
        for part in (
            f"{missing} is missing",
            f"{reshaped} is {(*shape, 7)} and should be {shape}",
            "surplus.weight (3,) has no place",
        ):
            assert part in str(raised.value)


def test_openai_s_text_tower_is_the_same_under_its_own_names():
    params = random_params("clip_text")
    theirs = names.write(openai_text_table(TEXT), params)
    hugging = names.write(clip_text_table(TEXT), params)
    for i in range(TEXT.layers):
        block, layer = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [hugging[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            stacked = theirs[f"{block}.attn.in_proj_{kind}"]
            np.testing.assert_array_equal(stacked, np.concatenate(parts))
        for ours, other in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1")):
            np.testing.assert_array_equal(
                theirs[f"{block}.{ours}.weight"], hugging[f"{layer}.{other}.weight"]
            )
    np.testing.assert_array_equal(theirs["text_projection"], hugging["text_projection.weight"].T)


def test_the_published_configs_are_the_defaults():
    assert mclip_config(MCLIP_LARGE, XLMR_LARGE) == xlmr.MClipConfig()
    assert mclip_config(MCLIP_LARGE, None) == xlmr.MClipConfig()
    other = mclip_config(MCLIP_LARGE | {"numDims": 768}, None)
    assert other == xlmr.MClipConfig(features=768)
    sizes = {"hidden_act": "quick_gelu", "attention_dropout": 0.0, "dropout": 0.0}
    whole = {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": sizes | {"hidden_size": 512, "eos_token_id": 2},
        "vision_config": sizes | {"hidden_size": 768, "num_channels": 3},
    }
    assert clip_vision_config(whole) == clip.ClipVisionConfig()
    assert clip_text_config(whole) == clip.ClipTextConfig()


def test_a_tower_s_own_config_is_read_too():
    tower = {"model_type": "clip_vision_model", "patch_size": 16, "hidden_act": "gelu"}
    want = clip.ClipVisionConfig(patch=16, activation="gelu", features=64)
    assert clip_vision_config(tower | {"projection_dim": 64}) == want
    tower = {"model_type": "clip_text_model", "vocab_size": 100, "eos_token_id": 99}
    assert clip_text_config(tower) == clip.ClipTextConfig(vocab=100)


@pytest.mark.parametrize(
    ("hf", "transformer_hf", "message"),
    [
        ({"numDims": 512}, None, "modelBase is missing"),
        (MCLIP_LARGE, {}, "vocab_size is missing in XLM-R"),
        (MCLIP_LARGE | {"modelBase": "x"}, None, "modelBase='x' .* not one of .*'xlm-roberta-la"),
        (MCLIP_LARGE, XLMR_LARGE | {"hidden_size": 768}, "sions=1024 .* its transformer, 768"),
        (MCLIP_LARGE, XLMR_LARGE | {"hidden_act": "silu"}, "hidden_act='silu' .* must be 'gelu'"),
        (MCLIP_LARGE, XLMR_LARGE | {"model_type": "bert"}, "model_type='bert' of XLM-RoBERTa's"),
    ],
)
def test_an_mclip_that_cannot_be_computed_is_named(hf, transformer_hf, message):
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
        ("text", {"text_config": {"attention_dropout": 0.1}}, "attention_dropout=0.1 .* be 0.0"),
        ("text", {"text_config": {"eos_token_id": 7}}, "eos_token_id=7 .* 2 or 49407"),
    ],
)
def test_a_clip_that_cannot_be_computed_is_named(tower, hf, message):
    reader = {"vision": clip_vision_config, "text": clip_text_config}[tower]
    if "vision_config" in hf or "text_config" in hf:
        hf = hf | {"model_type": "clip"}
    with pytest.raises(ValueError, match=message):
        reader(hf)


def randomize(torch, module):
    """Random numbers in every parameter and every statistic, so that each of them shows."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.eval()


def saved(model, folder):
    """What Hugging Face writes of a model: its tensors, its config."""
    safetensors = pytest.importorskip("safetensors.numpy", reason=NO_TORCH)
    model.save_pretrained(folder, safe_serialization=True)
    tensors = safetensors.load_file(folder / "model.safetensors")
    return tensors, json.loads((folder / "config.json").read_text())


def read_with(network, table, tensors, dropped, *arrays):
    shapes = jax.eval_shape(network.init, jax.random.key(0), *arrays)["params"]
    return names.read(table, tensors, shapes=shapes, file="saved", dropped=dropped)[0]


def test_mclip_agrees_with_xlm_roberta_of_hugging_face(tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    torch.manual_seed(0)
    base = transformers.XLMRobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=14,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    roberta = randomize(torch, transformers.XLMRobertaModel(base))
    linear = randomize(torch, torch.nn.Linear(16, 6))
    tensors, hf = saved(roberta, tmp_path)
    tensors = {f"transformer.{name}": x for name, x in tensors.items()} | {
        f"LinearTransformation.{name}": x.detach().numpy() for name, x in linear.named_parameters()
    }
    about = {"modelBase": "some", "transformerDimensions": 16, "numDims": 6}
    config = mclip_config(about, hf)
    network = xlmr.MClip(config, F32)
    table = mclip_table(config)
    params = read_with(network, table, tensors, MCLIP_DROPPED, IDS, IDS)
    ids = np.array([[0, 7, 49, 30, 2, 1], [0, 12, 1, 9, 2, 1], [0, 2, 1, 1, 1, 1]])
    mask = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        heard = torch.tensor(mask)
        states = roberta(torch.tensor(ids), attention_mask=heard).last_hidden_state
        mean = (states * heard[:, :, None]).sum(1) / heard.sum(1, keepdim=True)
        want = linear(mean).numpy()
    found = network.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_agrees_with_hugging_face(activation, tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "hidden_act": activation,
    }
    text = {"vocab_size": 50, "hidden_size": 16, "max_position_embeddings": 10, "eos_token_id": 49}
    vision = {"hidden_size": 20, "image_size": 12, "patch_size": 4}
    config = transformers.CLIPConfig(
        text_config=sizes | text, vision_config=sizes | vision, projection_dim=6
    )
    model = randomize(torch, transformers.CLIPModel(config))
    tensors, hf = saved(model, tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    ids = np.array([[48, 7, 9, 30, 49, 1], [48, 12, 49, 1, 1, 1]])
    mask = (ids != 1).astype(np.int64)
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        vision = model.vision_model(pixel_values=pixels).pooler_output
        text = model.text_model(torch.tensor(ids), attention_mask=torch.tensor(mask)).pooler_output
        want = (model.visual_projection(vision).numpy(), model.text_projection(text).numpy())
    vision, text = clip_vision_config(hf), clip_text_config(hf)
    image_tower, text_tower = clip.ClipVision(vision, F32), clip.ClipText(text, F32)
    for network, table, dropped, arrays, features in (
        (image_tower, clip_vision_table(vision), CLIP_VISION_DROPPED, (images,), want[0]),
        (text_tower, clip_text_table(text), CLIP_TEXT_DROPPED, (ids, mask), want[1]),
    ):
        arrays = tuple(map(jnp.asarray, arrays))
        params = read_with(network, table, tensors, dropped, *arrays)
        found = network.apply({"params": params}, *arrays)
        np.testing.assert_allclose(found, features, rtol=1e-5, atol=1e-5)
