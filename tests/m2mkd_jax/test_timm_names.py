"""timm's folders: what an architecture's name says, and names that cannot be read."""

import dataclasses
import json
import re

import pytest
from weight_files import deit

from common_jax.weights import write_tensors
from m2mkd_jax import pretrained
from m2mkd_jax.config import Config
from m2mkd_jax.pretrained.timm_config import timm_config
from m2mkd_jax.pretrained.timm_names import TIMM_VITS, UNSUPPORTED


def infer(folder, given=(), **about):
    """The config that is inferred from a folder of DeiT-Ti's tensors with this config.json."""
    folder.mkdir()
    write_tensors(folder / "model.safetensors", deit())
    (folder / "config.json").write_text(json.dumps(about))
    return pretrained.infer_config(pretrained.find_source(pretrained.read_files(folder)), given)


@pytest.mark.parametrize(
    ("name", "heads", "activation", "norm_eps"),
    [
        ("vit_base_patch16_gap_224", 16, "gelu", 1e-6),
        ("vit_base_patch16_siglip_gap_512", 12, "gelu", 1e-6),
        ("vit_base_patch32_siglip_gap_256", 12, "gelu_tanh", 1e-6),
        ("vit_large_patch16_siglip_gap_384", 16, "gelu", 1e-6),
        ("vit_large_patch16_siglip_gap_512", 16, "gelu_tanh", 1e-6),
        ("vit_base_patch16_clip_quickgelu_224.openai", 12, "quick_gelu", 1e-5),
        ("vit_small_patch16_224.augreg_in1k", 6, "gelu", 1e-6),
        ("vit_huge_patch14_224", 16, "gelu", 1e-6),
    ],
)
def test_name_gives_what_tensors_do_not(tmp_path, name, heads, activation, norm_eps):
    inferred = infer(tmp_path / "a", architecture=name, model_args={"embed_dim": 192})
    teacher = inferred.config.teacher
    assert (teacher.heads, teacher.activation) == (heads, activation)
    assert teacher.norm_eps == norm_eps and "config.teacher.heads" in inferred.read
    arguments = {"embed_dim": 192, "num_heads": 4, "act_layer": "quick_gelu"}
    teacher = infer(tmp_path / "b", architecture=name, model_args=arguments).config.teacher
    assert (teacher.heads, teacher.activation) == (4, "quick_gelu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_rpn_224", "a network with norms after attention and MLP, which m2mKD's"),
        ("vit_base_patch16_rope_ape_224", "a network with rotary positions, which m2mKD's"),
        ("vit_pe_core_base_patch16_224.fb", "a network with rotary positions, which m2mKD's"),
        ("vit_base_patch16_radio_v3", "a network with no norm after its blocks, which m2mKD's"),
        ("vit_dwee_patch16_reg1_gap_256", "a network with differential attention, which m2mKD's"),
        ("test_vit3.r160_in1k", "architecture='test_vit3', a network with a pooling that also"),
    ],
)
def test_network_that_its_name_reveals_to_be_another_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=rf"config\.json says .*{message}.*take another model"):
        infer(tmp_path / "a", architecture=name, model_args={"embed_dim": 192, "num_heads": 3})


def test_unknown_name_needs_what_tensors_do_not_reveal(tmp_path):
    about = {"architecture": "vit_of_tomorrow"}
    with pytest.raises(
        ValueError,
        match=r"'vit_of_tomorrow', which is none of the \d+ known ViTs.*give "
        r"--config\.teacher\.heads, --config\.teacher\.activation of the network",
    ):
        infer(tmp_path / "a", **about)
    with pytest.raises(ValueError, match=r"give --config\.teacher\.activation of the network"):
        infer(tmp_path / "b", **about, model_args={"num_heads": 4})
    both = {"teacher.heads", "teacher.activation"}
    assert infer(tmp_path / "c", both, **about).assumed["config.teacher.norm_eps"] == 1e-6
    arguments = {"num_heads": 4, "act_layer": "gelu"}
    assert infer(tmp_path / "d", **about, model_args=arguments).config.teacher.heads == 4


def test_name_of_another_width_needs_what_tensors_do_not_reveal(tmp_path):
    about = {"architecture": "vit_small_patch16_224"}
    with pytest.raises(ValueError, match=r"which is 384 wide in timm, not 192 like the tensors; "):
        infer(tmp_path / "a", **about)
    assert infer(tmp_path / "b", {"teacher.heads", "teacher.activation"}, **about)


def test_no_known_name_is_refused():
    assert not [x for x in TIMM_VITS for regex in UNSUPPORTED if re.fullmatch(regex, x)]


@pytest.mark.parametrize("name", TIMM_VITS)
def test_names_agree_with_timm(name):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from timm.models.vision_transformer import Block, VisionTransformer

    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    block, facts = model.blocks[0], TIMM_VITS[name]
    assert type(model) is VisionTransformer and type(block) is Block
    act = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
    assert facts == {
        "width": model.embed_dim,
        "heads": block.attn.num_heads,
        "activation": act[type(block.mlp.act).__name__],
        "norm_eps": block.norm1.eps,
    }


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({}, None),
        ({"interpolation": "bicubic", "crop_mode": "center", "crop_pct": 0.875}, None),
        ({"input_size": [3, 32, 32], "crop_pct": 1.0}, None),  # such images are not cropped here
        ({"input_size": [3, 32, 32], "crop_pct": 0.875}, "says crop_pct=0.875 for"),
        ({"input_size": [3, 48, 48], "crop_pct": 1.0}, "says crop_pct=1.0 for"),
        ({"input_size": "32", "crop_pct": 1.0}, "says crop_pct=1.0 for"),
        ({"interpolation": "bilinear"}, "says interpolation='bilinear' for"),
        ({"crop_pct": 0.9, "crop_mode": "squash"}, "says crop_mode='squash', crop_pct=0.9 for"),
    ],
)
def test_other_preparation_of_images_is_noted(tmp_path, cfg, said):
    about = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(about))
    write_tensors(tmp_path / "model.safetensors", deit())
    source = pretrained.find_source(pretrained.read_files(tmp_path))
    notes = pretrained.load(source, pretrained.infer_config(source).config).account.notes
    assert len(notes) == (said is not None)
    for note in notes:
        assert said in note and "resized with bicubic, and images above 32 pixels" in note


@pytest.mark.parametrize(("ours", "written"), [(None, None), (0.0, 1e-5), (0.1, 0.1)])
def test_exported_layer_scale_is_none_only_if_there_is_none(ours, written):
    sizes = dataclasses.replace(Config().teacher, layer_scale=ours)
    about = timm_config(Config(), sizes, ["a"])
    assert about["model_args"]["init_values"] == written
