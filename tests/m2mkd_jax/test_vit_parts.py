"""Files of DeiT III, DINOv2, SigLIP and the like: every part is read if present and omitted if not,
and writing returns the same tensors."""

import dataclasses
import json
import re

import convert_weights
import numpy as np
import pytest
from meshes import one_device
from same import assert_same
from tiny import tiny_config
from weight_files import deit

from common_jax import checkpoint
from common_jax.config import freeze
from common_jax.weights import Origin, read_tensors, write_tensors
from m2mkd_jax import pretrained
from m2mkd_jax.config import Config, InitConfig, SourcesConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.phases import PHASES, networks
from m2mkd_jax.phases.end_to_end import upcycle
from m2mkd_jax.phases.sources import weights

WIDTH = 192
PLAIN = {"mlp_ratio": 4.0, "heads": 3, "norm_eps": 1e-6, "activation": "gelu"}
HEAD = r"teacher/stage_\d+/head/.*"


def make(shapes):
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def scales(*names):
    return make({f"blocks.{i}.{name}": (WIDTH,) for i in (0, 1) for name in names})


TIMM_S_SCALES = scales("ls1.gamma", "ls2.gamma")
POOL = make(
    {
        "attn_pool.latent": (1, 1, WIDTH),
        "attn_pool.q.weight": (WIDTH, WIDTH),
        "attn_pool.q.bias": (WIDTH,),
        "attn_pool.kv.weight": (2 * WIDTH, WIDTH),
        "attn_pool.kv.bias": (2 * WIDTH,),
        "attn_pool.proj.weight": (WIDTH, WIDTH),
        "attn_pool.proj.bias": (WIDTH,),
        "attn_pool.norm.weight": (WIDTH,),
        "attn_pool.norm.bias": (WIDTH,),
        "attn_pool.mlp.fc1.weight": (4 * WIDTH, WIDTH),
        "attn_pool.mlp.fc1.bias": (4 * WIDTH,),
        "attn_pool.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        "attn_pool.mlp.fc2.bias": (WIDTH,),
    }
)
PATCHES = make({"pos_embed": (1, 4, WIDTH)})
# File -> tensors it has in addition to a DeiT's, those it lacks, and the fields that say so.
FILES = {
    "deit": ({}, (), {}),
    "deit_iii": (
        TIMM_S_SCALES | PATCHES,
        (),
        {"layer_scale": 1e-5, "positions": "patches"},
    ),
    "dinov2": (TIMM_S_SCALES, (), {"layer_scale": 1e-5}),
    "dinov2_registers": (
        TIMM_S_SCALES | PATCHES | make({"reg_token": (1, 4, WIDTH)}),
        (),
        {"layer_scale": 1e-5, "registers": 4, "positions": "patches"},
    ),
    "registers_with_positions": (
        make({"reg_token": (1, 4, WIDTH), "pos_embed": (1, 4 + 5, WIDTH)}),
        (),
        {"registers": 4},
    ),
    "siglip": (
        POOL | PATCHES,
        ("cls_token",),
        {"class_token": False, "pool": "attention"},
    ),
    "siglip_gap": (PATCHES, ("cls_token",), {"class_token": False, "pool": "mean"}),
    "mean": (
        make({"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,)}),
        ("norm.weight", "norm.bias"),
        {"pool": "mean", "norm_after_pool": True},
    ),
    "no_bias": ({}, ("patch_embed.proj.bias",), {"patch_bias": False}),
    "linear_classifier": (
        make({"head.weight": (7, 2 * WIDTH)}),
        (),
        {"pool": "class_and_mean"},
    ),
}


def tensors_of(name):
    more, less, _ = FILES[name]
    return {key: x for key, x in (deit() | more).items() if key not in less}


def read(path, given=(), **fields):
    """Reads a file like the command does without --config."""
    source = pretrained.find_source(pretrained.read_files(path))
    inferred = pretrained.infer_config(source, given)
    teacher = dataclasses.replace(inferred.config.teacher, **fields)
    return inferred, pretrained.load(
        source, dataclasses.replace(inferred.config, teacher=teacher), overridden=given
    )


@pytest.mark.parametrize("name", FILES)
def test_parts_are_read_and_written_back(tmp_path, name):
    state, file = tensors_of(name), tmp_path / "vit.safetensors"
    write_tensors(file, state)
    inferred, found = read(file)
    config, fields = found.config, FILES[name][2]
    assert found.kind == "teacher" and config.data.labels == 7 and config.data.image_size == 32
    plain = dataclasses.replace(Config().teacher, width=WIDTH, depths=(2,), **PLAIN)
    assert config.teacher == dataclasses.replace(plain, **fields)
    assert found.account.taken and not found.account.dropped
    assert_same(pretrained.to_tensors(found), state)
    said = {
        key for key in fields if key != "layer_scale" and (name, key) not in {("mean", "pool")}
    } - ({"positions", "registers"} if name == "registers_with_positions" else set())
    assert {f"config.teacher.{key}" for key in said} <= inferred.read.keys()
    assert ("config.teacher.layer_scale" in inferred.assumed) == ("layer_scale" in fields)
    half = name.startswith("siglip")
    assert (inferred.assumed["config.data.mean"] == (0.5,) * 3) == half


def test_tensors_of_parts_go_to_their_parameters(tmp_path):
    write_tensors(tmp_path / "a.safetensors", tensors_of("siglip"))
    pool = read(tmp_path / "a.safetensors")[1].params["teacher"]["stage_0"]["pool"]
    np.testing.assert_array_equal(pool["probe"], POOL["attn_pool.latent"])
    x = np.random.default_rng(2).standard_normal(WIDTH)
    query = np.einsum("D,DHK->HK", x, pool["attention"]["query"]["kernel"]).ravel()
    np.testing.assert_allclose(query, POOL["attn_pool.q.weight"] @ x, rtol=1e-5)
    both = np.einsum("D,DQHK->QHK", x, pool["attention"]["key_value"]["kernel"]).ravel()
    np.testing.assert_allclose(both, POOL["attn_pool.kv.weight"] @ x, rtol=1e-5)
    bias = pool["attention"]["key_value"]["bias"].reshape(2, -1)
    np.testing.assert_array_equal(bias.ravel(), POOL["attn_pool.kv.bias"])
    state = tensors_of("deit_iii")
    write_tensors(tmp_path / "b.safetensors", state)
    block = read(tmp_path / "b.safetensors")[1].params["teacher"]["stage_0"]["block_1"]
    np.testing.assert_array_equal(block["scale2"], state["blocks.1.ls2.gamma"])


def test_names_of_authors_are_read_and_names_of_timm_written(tmp_path):
    own = scales("gamma_1", "gamma_2") | make({"register_tokens": (1, 4, WIDTH)})
    masked = make({"mask_token": (1, WIDTH)})
    write_tensors(tmp_path / "a.safetensors", deit() | own | masked)
    _, found = read(tmp_path / "a.safetensors")
    assert found.config.teacher.positions == "class" and found.config.teacher.registers == 4
    assert [name for name, _ in found.account.dropped] == ["mask_token"]
    renamed = {
        re.sub(r"gamma_(\d)", r"ls\1.gamma", name).replace("register_tokens", "reg_token"): x
        for name, x in own.items()
    }
    assert_same(pretrained.to_tensors(found), deit() | renamed)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("siglip", "attn_pool.kv.bias", r"attn_pool\.kv\.bias \(384,\) is missing, for stage_0/po"),
        ("siglip", "attn_pool.latent", r"attn_pool\.latent \(1, 1, 192\) is missing"),
        ("dinov2", "blocks.1.ls2.gamma", r"blocks\.1\.ls2\.gamma \(192,\) is missing, for stage_0"),
        ("mean", "fc_norm.bias", r"fc_norm\.bias \(192,\) is missing, for stage_0/norm/bias"),
        ("deit", "norm.bias", r"(?s)norm\.bias \(192,\) is missing.*config\.teacher\.norm_after_p"),
    ],
)
def test_missing_tensor_of_a_part_is_named(tmp_path, name, missing, message):
    state = tensors_of(name)
    del state[missing]
    write_tensors(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "field", "value", "tensor"),
    [
        ("deit_iii", "layer_scale", None, r"blocks\.0\.ls1\.gamma \(192,\) has no place"),
        ("dinov2_registers", "registers", 0, r"reg_token \(1, 4, 192\) has no place"),
        ("dinov2_registers", "positions", "all", r"pos_embed is \(1, 4, 192\) and should be"),
        ("siglip", "pool", "mean", r"attn_pool\.latent \(1, 1, 192\) has no place"),
        ("mean", "norm_after_pool", False, r"fc_norm\.bias \(192,\) has no place"),
        ("no_bias", "patch_bias", True, r"patch_embed\.proj\.bias \(192,\) is missing"),
    ],
)
def test_field_contradicting_the_file_is_named(tmp_path, name, field, value, tensor):
    write_tensors(tmp_path / "a.safetensors", tensors_of(name))
    with pytest.raises(ValueError, match=tensor) as raised:
        read(tmp_path / "a.safetensors", **{field: value})
    assert f"config.teacher.{field}" in str(raised.value)


def test_ambiguous_position_table_is_marked_as_assumed(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, tensors_of("registers_with_positions"))
    inferred, _ = read(file)  # 9 rows could also be just 3 x 3 patches
    assert inferred.assumed["config.teacher.positions"] == "all"
    state = tensors_of("registers_with_positions")
    folder = timm_folder(tmp_path / "timm", state, model_args={"no_embed_class": True})
    inferred, found = read(folder)
    assert found.config.data.image_size == 48 and found.config.teacher.positions == "patches"
    assert "config.teacher.positions" not in inferred.assumed
    write_tensors(file, tensors_of("dinov2_registers"), replace=True)
    inferred, _ = read(file)
    assert "config.teacher.positions" not in inferred.assumed


def clip():
    state = deit() | make({"norm_pre.weight": (WIDTH,), "norm_pre.bias": (WIDTH,)})
    del state["patch_embed.proj.bias"]
    return state


def test_clip_like_network_needs_explicit_settings(tmp_path):
    file = tmp_path / "clip.safetensors"
    write_tensors(file, clip())
    flags = {"teacher.activation": "quick_gelu", "teacher.norm_eps": "1e-5"}
    flags |= {"data.mean": "0.1,0.2,0.3", "data.std": "0.5,0.5,0.5"}
    for name in flags:
        with pytest.raises(ValueError, match=rf"norm_pre.*: give --config\.{re.escape(name)}$"):
            read(file, given=flags.keys() - {name})
    given = [f"--config.{name}={value}" for name, value in flags.items()]
    convert_weights.main([str(file), str(tmp_path / "run"), *given])
    saved = freeze(Config, checkpoint.load_config(tmp_path / "run")).teacher
    assert (saved.norm_pre, saved.patch_bias, saved.norm_eps) == (True, False, 1e-5)
    assert saved.activation == "quick_gelu"
    convert_weights.main([str(tmp_path / "run"), str(tmp_path / "back.safetensors")])
    assert_same(read_tensors(tmp_path / "back.safetensors"), clip())


def timm_folder(folder, state, **about):
    folder.mkdir()
    write_tensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224"} | about)
    )
    return folder


def test_timm_folder_gives_what_tensors_do_not(tmp_path):
    stated = {"global_pool": "avg", "model_args": {"act_layer": "gelu_tanh", "fc_norm": False}}
    folder = timm_folder(tmp_path / "a", deit(), **stated)
    inferred, found = read(folder)
    assert found.config.teacher.pool == "mean" == inferred.read["config.teacher.pool"]
    assert found.config.teacher.activation == "gelu_tanh" and not found.config.teacher.registers
    assert "config.teacher.activation" not in inferred.assumed
    with pytest.raises(
        ValueError, match=r"config\.json says pool='mean', but config\.teacher\.pool='class'.*Give "
    ):
        read(folder, pool="class")
    other = read(folder, given=("teacher.pool",), pool="class")[1]
    assert other.config.teacher.pool == "class"
    folder = timm_folder(tmp_path / "b", deit(), global_pool="map")
    with pytest.raises(ValueError, match=r"attn_pool\.latent \(1, 1, 192\) is missing"):
        read(folder)
    folder = timm_folder(tmp_path / "c", tensors_of("siglip_gap"), global_pool="token")
    with pytest.raises(ValueError, match=r"c says config\.teacher\.pool='class' needs a"):
        read(folder)


def headless(name="dinov2"):
    return {key: x for key, x in tensors_of(name).items() if not key.startswith("head.")}


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_headless_network_is_converted_on_request(tmp_path, capsys, name):
    file, run = tmp_path / "dino.safetensors", tmp_path / "run"
    write_tensors(file, headless(name))
    with pytest.raises(SystemExit):
        convert_weights.main([str(file), str(run)])
    said = capsys.readouterr().err
    assert f"give --config.sources.fresh='{HEAD}'" in said and "head.weight" in said
    with pytest.raises(SystemExit):
        convert_weights.main([str(file), str(run), "--config.sources.fresh=teacher/head/.*"])
    assert "config.sources.fresh='teacher/head/.*' matches none" in capsys.readouterr().err
    convert_weights.main([str(file), str(run), f"--config.sources.fresh={HEAD}"])
    assert "teacher/stage_0/head/kernel is left out" in capsys.readouterr().out
    assert "head" not in checkpoint.load_shapes(run)["teacher"]["stage_0"]
    convert_weights.main([str(run), str(tmp_path / "back.safetensors")])
    assert_same(read_tensors(tmp_path / "back.safetensors"), headless(name))
    write_tensors(file, tensors_of(name), replace=True)
    flags = [f"--config.sources.fresh={HEAD}", "--force"]
    convert_weights.main([str(file), str(run), *flags])
    account = json.loads((run / "conversion.json").read_text())
    assert ["head.weight", "config.sources.fresh"] in account["dropped"]
    assert "head" not in checkpoint.load_shapes(run)["teacher"]["stage_0"]


def test_headless_teacher_serves_modules_without_a_head(tmp_path):
    file, folder = tmp_path / "dino.safetensors", tmp_path / "run"
    write_tensors(file, headless())
    flags = [f"--config.sources.fresh={HEAD}", "--config.teacher.depths=1,1"]
    convert_weights.main([str(file), str(folder), *flags])
    config = dataclasses.replace(freeze(Config, checkpoint.load_config(folder)), phase="distill")
    mesh, network = one_device(), networks.teacher_network(config)

    def take(stage, fresh=""):
        run = dataclasses.replace(config, sources=SourcesConfig(teacher=str(folder), fresh=fresh))
        shapes = networks.parameter_shapes(run, network, "teacher", mesh, only=(stage,))
        name = f"teacher/stage_{stage}"
        return weights.take_weights(run, shapes, [Origin(folder, name, name)], frozen=True)

    assert "block_0" in take(0).params["teacher"]["stage_0"]
    with pytest.raises(ValueError, match=r"teacher/stage_1/head/bias .* is in none of the sources"):
        take(1)
    with pytest.raises(
        ValueError, match=r"matches teacher/stage_1/head/bias, but phase='distill' do"
    ):
        take(1, fresh=HEAD)


def test_vmoe_is_upcycled_from_a_headless_vit(tmp_path):
    file, folder = tmp_path / "dino.safetensors", tmp_path / "run"
    write_tensors(file, headless("dinov2_registers"))
    convert_weights.main([str(file), str(folder), f"--config.sources.fresh={HEAD}"])
    config = freeze(Config, checkpoint.load_config(folder))
    model = VMoEConfig(**vars(config.teacher) | {"depths": (1, 1)}, moe=MoeConfig(experts=2))
    sources = SourcesConfig(fresh=HEAD.replace("teacher", "student"))
    config = dataclasses.replace(
        config, model=model, sources=sources, init=InitConfig(upcycle=str(folder))
    )
    shapes = networks.parameter_shapes(
        config, networks.whole_student(config), "student", one_device()
    )
    start = upcycle(config, shapes)
    tokens = start.params["student"]["stage_0"]["register_tokens"]
    np.testing.assert_array_equal(tokens, headless("dinov2_registers")["reg_token"])
    fresh = {entry["name"] for entry in start.account["fresh"] if "router" not in entry["name"]}
    assert fresh == {f"student/stage_1/head/{leaf}" for leaf in ("kernel", "bias")}


@pytest.mark.parametrize(
    ("phase", "section", "fields"),
    [
        ("distill", "teacher", {"registers": 4}),
        ("distill", "model", {"registers": 4}),
        ("distill", "meta", {"class_token": False, "pool": "mean"}),
        ("train_module", "teacher", {"registers": 4}),
    ],
)
def test_interchangeable_stages_need_the_same_leading_tokens(phase, section, fields):
    config = tiny_config(phase)
    other = dataclasses.replace(getattr(config, section), **fields)
    wrong = dataclasses.replace(config, **{section: other})
    with pytest.raises(ValueError, match=rf"config\.{section} has class_token=") as raised:
        PHASES[phase].describe(wrong, one_device())
    assert "registers=4" in str(raised.value) and "config.meta has class_token" in str(raised.value)
    same = dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name in ("meta", "teacher", "model")
        },
    )
    assert PHASES[phase].describe(same, one_device()).config == same


def test_logit_distillation_allows_different_leading_tokens():
    config = tiny_config("end_to_end")
    teacher = dataclasses.replace(config.teacher, registers=4)
    config = dataclasses.replace(config, teacher=teacher)
    assert PHASES["end_to_end"].describe(config, one_device()).config == config
