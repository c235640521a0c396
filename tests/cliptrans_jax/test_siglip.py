"""SigLIP's towers: their outputs, their files, their preprocessing, and training from scratch."""

import dataclasses
import functools
import json

import jax
import naive_cliptrans as naive
import numpy as np
import pytest
from flax import traverse_util
from gemma_files import RECORD, VOCAB
from hugging_face import NO_TORCH
from jax import numpy as jnp
from meshes import idle_rules, one_device
from PIL import Image
from published_files import write_folder
from same import assert_same
from tiny import fill, random_like
from tiny_cliptrans import tiny_config

from cliptrans_jax import pretrained
from cliptrans_jax.config import ClipConfig, Config, SourcesConfig
from cliptrans_jax.data.pictures import prepare_picture
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.export.towers import write_tower
from cliptrans_jax.runs import contrastive
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.runs.run_towers import describe_text, text_tokenizer
from cliptrans_jax.tensors.pictures import require_pictures
from cliptrans_jax.tensors.siglip_json import text_config, vision_config
from cliptrans_jax.towers import siglip, siglip_names
from cliptrans_jax.towers.siglip import SiglipTextConfig, SiglipVisionConfig
from cliptrans_jax.towers.tower import CLIP_PICTURES
from common_jax.command_line.fields import set_field
from common_jax.config import freeze, unfreeze
from common_jax.mesh import BATCH, MeshConfig, make_mesh, match_rules
from common_jax.weights import table as tables

SIZES = {"width": 16, "layers": 1, "heads": 2, "hidden": 24, "eps": 1e-4}
# Patches cover 8 of 10 pixels.
VISION = SiglipVisionConfig(image=10, patch=4, **SIZES)
TEXT = SiglipTextConfig(vocab=len(VOCAB), positions=8, features=16, pad=3, **SIZES)
TOWERS = {
    "vision": (siglip.VISION, VISION, siglip_names.vision_table(VISION)),
    "text": (siglip.TEXT, TEXT, siglip_names.text_table(TEXT)),
}
IDS = np.array([[7, 9, 5, 39, 1], [30, 1, 3, 3, 3]], np.int32)
IMAGES = np.random.default_rng(1).normal(size=(2, 10, 10, 3)).astype(np.float32)
INPUTS = {"vision": IMAGES, "text": IDS}
# From google/siglip2-base-patch16-224 on the hub, and from so400m-patch14-384.
BASE = {
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "text_config": {"hidden_act": "gelu_pytorch_tanh", "vocab_size": 256000},
    "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": True},
}
LARGE = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
}
SO400M = {
    "model_type": "siglip",
    "text_config": LARGE | {"vocab_size": 256000, "projection_size": 1152},
    "vision_config": LARGE | {"image_size": 384, "patch_size": 14},
}


@functools.cache
def params_of(side):
    tower, config, _ = TOWERS[side]
    return fill(functools.partial(tower.init, config, jnp.float32))


@functools.cache
def program(side, dtype=jnp.float32):
    tower, config, _ = TOWERS[side]
    return jax.jit(functools.partial(tower.apply, config, dtype))


def tensors_of(side):
    """Distinct numbers in every place, under the published names."""
    tower, config, table = TOWERS[side]
    return tables.write(table, random_like(tower.shapes(config)))


def hf_of(text=TEXT, vision=VISION):
    def sizes(config):
        return {
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.hidden,
            "layer_norm_eps": config.eps,
        }

    own = {"vocab_size": text.vocab, "max_position_embeddings": text.positions}
    return {
        "model_type": "siglip",
        "text_config": sizes(text) | own | {"projection_size": text.features},
        "vision_config": sizes(vision) | {"image_size": vision.image, "patch_size": vision.patch},
    }


@pytest.fixture
def folder(tmp_path):
    """A published SigLIP, with both towers in one file."""
    extra = {"logit_scale": np.zeros(1, np.float32), "logit_bias": np.zeros(1, np.float32)}
    return write_folder(
        tmp_path / "siglip", hf_of(), tensors_of("text") | tensors_of("vision") | extra
    )


@pytest.mark.parametrize("size", [1.0, 0.02])  # small enough that every epsilon shows
@pytest.mark.parametrize("side", TOWERS)
def test_tower_matches_a_naive_implementation(side, size):
    shrunk = jax.tree.map(lambda x: size * x, params_of(side))
    found = np.asarray(program(side)(shrunk, INPUTS[side]))
    weights = naive.Weights(tables.write(TOWERS[side][2], shrunk), eps=SIZES["eps"])
    if side == "text":
        want = [naive.siglip_text(weights, ids, heads=2, pad=TEXT.pad) for ids in IDS]
    else:
        want = [naive.siglip_vision(weights, x, heads=2) for x in IMAGES.transpose(0, 3, 1, 2)]
    want = np.array(want)
    scale = np.abs(want - want.mean(axis=0)).max()  # the scale on which examples differ
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-3 * scale)


@pytest.mark.parametrize("side", TOWERS)
def test_features_are_float32_and_nearly_equal_in_bfloat16(side):
    exact, rough = (
        np.asarray(program(side, dtype)(params_of(side), INPUTS[side]))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert exact.shape == (2, 16) and exact.dtype == rough.dtype == np.float32
    error = np.linalg.norm(exact - rough, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.all(error > 0) and np.all(error < 0.05), error


def test_number_of_pads_has_no_effect_but_pads_are_read():
    run, params = program("text"), params_of("text")
    padded = np.pad(IDS, ((0, 0), (0, 3)), constant_values=TEXT.pad)
    np.testing.assert_allclose(run(params, IDS), run(params, padded), rtol=1e-5, atol=1e-6)
    other = np.where(padded == TEXT.pad, 4, padded)
    assert np.all(np.abs(run(params, IDS) - run(params, other)).max(axis=1) > 1e-3)
    with pytest.raises(ValueError, match="ids have 9 tokens, more than positions=8"):
        run(params, np.zeros((1, 9), np.int32))
    beyond = np.asarray(run(params, np.where(IDS == 39, TEXT.vocab, IDS)))
    assert np.isnan(beyond[0]).all() and not np.isnan(beyond[1]).any()


def test_partition_rules_shard_the_towers_over_eight_devices():
    mesh, rules = make_mesh(MeshConfig(data=1, fsdp=8)), siglip.PARTITION_RULES
    shapes = {side: tower.shapes(config) for side, (tower, config, _) in TOWERS.items()}
    assert idle_rules(rules, *shapes.values()) == []
    for side in TOWERS:
        inputs = np.repeat(INPUTS[side], 4, axis=0)
        with jax.set_mesh(mesh):
            shardings = match_rules(rules, params_of(side), mesh)
            placed = jax.device_put(params_of(side), shardings)
            assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(placed))
            found = program(side)(placed, jax.device_put(inputs, jax.NamedSharding(mesh, BATCH)))
        want = program(side)(params_of(side), INPUTS[side])
        np.testing.assert_allclose(found[::4], want, rtol=1e-4, atol=1e-5)


# Files.


def test_both_towers_are_read_from_one_folder(folder):
    taken = []
    for side, (tower, config, _) in TOWERS.items():
        found = pretrained.load(folder, kind=(tower.kind, "mclip"))
        config = dataclasses.replace(config, pad=0) if side == "text" else config
        assert (found.kind, found.config) == (tower.kind, config)
        assert_same(found.params, random_like(tower.shapes(config)))
        assert found.account.assumed == ()
        taken += [name for name, _, _ in found.account.taken]
    whole = [*tensors_of("text"), *tensors_of("vision")]
    assert sorted(taken) == sorted(whole)
    assert pretrained.load(folder).kind == "siglip_vision"
    with pytest.raises(ValueError, match=r"holds no 'clip_text': it lacks .*; it holds 'siglip"):
        pretrained.load(folder, kind="clip_text")


def test_published_configs_have_the_published_sizes():
    assert (text_config(BASE), vision_config(BASE)) == (SiglipTextConfig(), SiglipVisionConfig())
    large = {"width": 1152, "layers": 27, "heads": 16, "hidden": 4304}
    vision = SiglipVisionConfig(image=384, patch=14, **large)
    assert vision_config(SO400M) == vision
    assert (vision.tokens, vision.covered, vision.features) == (729, 378, 1152)
    assert text_config(SO400M) == SiglipTextConfig(features=1152, **large)
    old = text_config(
        {"model_type": "siglip_text_model", "hidden_size": 96, "projection_size": None}
    )
    assert (old.vocab, old.features) == (32000, 96)
    assert (text_config(hf_of()), vision_config(hf_of())) == (
        dataclasses.replace(TEXT, pad=0),
        VISION,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip2"}, "model_type='siglip2' .* NaFlex, .*/siglip2-base-patch16-224"),
        ({"model_type": "siglip2_vision_model"}, "model_type='siglip2_vision_model' .* NaFlex"),
        ({"model_type": "clip"}, "model_type='clip' of SigLIP's"),
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head=False .* must be True"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act='gelu' .* 'gelu_pytorch_tanh'"),
        ({"vision_config": {"image_size": [224, 224]}}, "image_size=.* must be a whole number"),
        ({"vision_config": {"hidden_size": 100}}, "heads=12 must divide width=100"),
    ],
)
def test_unsupported_siglip_is_reported(tmp_path, changes, message):
    folder = write_folder(tmp_path / "x", BASE | changes, tensors_of("vision"))
    for kind in ("siglip_vision", None):
        if kind or changes.get("model_type") != "clip":
            with pytest.raises(ValueError, match=message):
                pretrained.load(folder, kind=kind)


SQUARE = {"height": VISION.image, "width": VISION.image}


def test_mismatched_preprocessing_is_refused(folder):
    good = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    for changes, message in (
        ({}, None),
        ({"resample": 3}, "resample=3, but the tower's pictures are resized with 2, BILINEAR"),
        ({"image_mean": [0.4] * 3}, "says image_mean="),
        ({"size": SQUARE}, None),
        (
            {"size": SQUARE | {"width": 1}},
            r"says size=\{.*'width': 1.*resized with size=\{'height'",
        ),
        ({"size": {"shortest_edge": VISION.image}}, r"says size=\{'shortest_edge': "),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(good | changes))
        if message is None:
            assert pretrained.load(folder, kind="siglip_vision").config == VISION
        else:
            with pytest.raises(ValueError, match=message):
                pretrained.load(folder, kind="siglip_vision")


def test_centre_crop_is_refused(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_center_crop": True}))
    with pytest.raises(ValueError, match=r"do_center_crop=True, .* resized to a square without a"):
        pretrained.load(folder, kind="siglip_vision")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"interpolation": "bicubic", "resize_mode": "shortest"}, None),
        ({"interpolation": "bilinear"}, "interpolation='bilinear', .* resized with BICUBIC"),
        (
            {"resize_mode": "squash"},
            r"resize_mode='squash', .* cropped to a square, 'shortest'; use",
        ),
        ({"size": [224, 224]}, None),
        ({"size": 384}, "size=384, but the tower's pictures are 224 pixels on each side"),
    ],
)
def test_open_clip_preprocessing_config_is_read_too(changes, message):
    about = {"open_clip_config.json": {"preprocess_cfg": changes}}
    if message is None:
        require_pictures(about, CLIP_PICTURES, 224, "file")
    else:
        with pytest.raises(ValueError, match=f"^file: open_clip_config.json says {message}"):
            require_pictures(about, CLIP_PICTURES, 224, "file")


def test_images_are_resized_to_a_square_without_a_crop():
    image = np.zeros((6, 12, 3), np.uint8)
    image[:, 9:] = 255  # a centre crop would leave this out
    found = prepare_picture(image, 4, siglip.VISION.pictures)
    assert found.shape == (4, 4, 3) and found.dtype == np.float32
    # The filters of the last two columns see 1 / 9 and 7 / 8 of white.
    np.testing.assert_allclose(found[0, :, 0], [-1, -1, -7 / 9, 3 / 4], atol=0.01)
    np.testing.assert_array_equal(found[0, 0], found[3, 0])


def test_preprocessing_matches_hugging_face():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    processor = getattr(transformers, "SiglipImageProcessorPil", None)
    if processor is None:
        pytest.skip("this version of transformers has no processor without torchvision")
    image = np.random.default_rng(0).integers(0, 256, (23, 37, 3), dtype=np.uint8)
    theirs = processor(
        size={"height": 16, "width": 16}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    found = prepare_picture(image, 16, siglip.VISION.pictures)
    np.testing.assert_allclose(found, theirs.transpose(1, 2, 0), atol=1e-6)


# Runs.


def test_one_source_provides_both_towers_and_the_tokenizer(folder, tmp_path):
    sources = SourcesConfig(siglip=str(folder))
    clip_tokenizer = TokenizerConfig("xlmr", "elsewhere")  # from the config file
    config = dataclasses.replace(
        tiny_config("translate", None), sources=sources, clip_tokenizer=clip_tokenizer
    )
    assert text_tokenizer(config) == TokenizerConfig("siglip2", str(folder))
    assert describe_text(config).config == SiglipTextConfig()
    data = RunData(config, tmp_path, one_device())
    assert data.image_tower.config == VISION
    assert_same(data.image_tower.params, random_like(siglip.VISION.shapes(VISION)))
    with pytest.raises(
        FileNotFoundError, match=r"config\.sources\.siglip=.* lacks tokenizer\.json"
    ):
        _ = data.text_tower
    (folder / "tokenizer.json").write_text(json.dumps(RECORD))
    tower = data.text_tower
    assert tower.config == dataclasses.replace(TEXT, pad=0)
    (ids,) = tower.tokenizer.encode(["A Man"], None)
    assert ids.tolist() == [VOCAB["a"], VOCAB["▁man"], 1]
    features = tower.encode([ids, ids[1:]], mesh=one_device())
    assert features.shape == (2, 16) and np.abs(features[0] - features[1]).max() > 1e-3
    missing = dataclasses.replace(config, sources=SourcesConfig(siglip="nowhere"))
    with pytest.raises(FileNotFoundError, match=r"config\.sources\.siglip"):
        _ = RunData(missing, tmp_path, one_device()).image_tower


@pytest.mark.parametrize("other", ["clip", "clip_text", "clip_image"])
def test_siglip_excludes_other_tower_sources(other):
    with pytest.raises(ValueError, match=r"siglip='a'.* both towers"):
        SourcesConfig(**{"siglip": "a", other: "b"})


def from_scratch(side):
    """A tower's section, as given by a flag."""
    _, config, _ = TOWERS[side]
    return {"kind": config.kind} | {
        name: value for name, value in dataclasses.asdict(config).items() if name != "attention"
    }


def test_stage_clip_trains_towers_set_by_flags():
    raw = unfreeze(tiny_config("clip", None))
    set_field(raw, "clip.text", repr(from_scratch("text")))
    set_field(raw, "clip.image", repr(from_scratch("vision")))
    set_field(raw, "clip.loss", "sigmoid")
    config = freeze(Config, raw)
    assert (config.clip.text, config.clip.image) == (TEXT, VISION)
    params = fill(functools.partial(contrastive.init, config))
    batch = {"ids": jnp.asarray(IDS), "image": jnp.asarray(IMAGES)}

    def loss(params):
        return contrastive._loss(config, params, {}, batch, {"dropout": None}, 0)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    text, image = (
        np.asarray(program(side)(params["clip"][name], INPUTS[side]), np.float64)
        for side, name in (("text", "text"), ("vision", "image"))
    )
    text, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
    scale, bias = np.exp(params["clip"]["log_scale"]), params["clip"]["bias"]
    signs = np.array([[1, -1], [-1, 1]])
    wanted = np.log1p(np.exp(-signs * (scale * text @ image.T + bias))).sum() / 2
    assert float(value) == pytest.approx(wanted, rel=1e-4)
    flat = traverse_util.flatten_dict(gradient, sep="/")
    assert {"clip/log_scale", "clip/bias", "clip/image/pool/probe"} < flat.keys()
    assert [path for path, x in flat.items() if not np.any(np.asarray(x))] == []
    match_rules(contrastive.partition_rules(config), params, one_device())


def test_config_of_an_earlier_version_may_lack_kind():
    old = {"text": {"width": 32, "heads": 2}, "image": {"width": 32, "heads": 2}}
    found = freeze(ClipConfig, old)
    assert (found.text.kind, found.image.kind) == ("mclip", "clip_vision")
    with pytest.raises(ValueError, match=r"text\.kind='clip_text' must be one of \['mclip', 'sig"):
        freeze(ClipConfig, {"text": {"kind": "clip_text"}})
    # Stored features are looked up by it.
    assert "kind" not in repr(found)


# transformers.


@pytest.mark.parametrize("side", TOWERS)
def test_exported_tower_is_read_back_and_by_hugging_face(side, tmp_path):
    tower, config, _ = TOWERS[side]
    params = jax.tree.map(np.asarray, params_of(side))
    write_tower(tmp_path / "tower", params, config)
    names = {"text_model.head.weight", "vision_model.head.probe"}
    found = pretrained.load(tmp_path / "tower", kind=tower.kind)
    assert_same(found.params, params)
    assert len(names & {name for name, _, _ in found.account.taken}) == 1
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    cls = {"text": transformers.SiglipTextModel, "vision": transformers.SiglipVisionModel}[side]
    model, problems = cls.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not any(problems[key] for key in ("missing_keys", "unexpected_keys"))
    inputs = INPUTS[side]
    if side == "text":
        inputs = np.pad(inputs, ((0, 0), (0, 3)), constant_values=TEXT.pad)
    else:
        inputs = inputs.transpose(0, 3, 1, 2)
    with torch.no_grad():
        want = model(torch.tensor(inputs)).pooler_output.numpy()
    np.testing.assert_allclose(program(side)(params, INPUTS[side]), want, rtol=1e-5, atol=1e-5)
