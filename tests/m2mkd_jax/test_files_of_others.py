"""ViTs from elsewhere: timm's folders, training checkpoints, wrapped names, and networks that
m2mKD's ViT does not support."""

import dataclasses
import json

import convert_weights
import numpy as np
import pytest
import torch_files
from meshes import one_device
from torch_files import Global, New, state_dict
from weight_files import deit

from common_jax import checkpoint
from common_jax.config import freeze, unfreeze
from common_jax.weights import write_tensors
from m2mkd_jax import pretrained
from m2mkd_jax.config import Config, SourcesConfig
from m2mkd_jax.phases import networks
from m2mkd_jax.phases.sources import weights
from m2mkd_jax.pretrained.parts import foreign_parts, is_headless

HALF = [0.5, 0.5, 0.5]
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 7,
    "num_features": 192,
    "global_pool": "token",
    "pretrained_cfg": {
        "tag": "augreg_in21k_ft_in1k",
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "mean": HALF,
        "std": HALF,
        "num_classes": 7,
    },
}


def timm_folder(folder, about=TIMM, tensors=None, *, file="config.json"):
    """A folder like the ones timm's push_to_hf_hub writes."""
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors or deit())
    (folder / file).write_text(json.dumps(about))
    return folder


def read(path, *, weights="", kind=None, **given):
    """Reads a file like the command does without --config."""
    files = pretrained.read_files(path, weights=weights)
    source = pretrained.find_source(files, kind)
    inferred = pretrained.infer_config(source, given)
    return inferred, pretrained.load(source, inferred.config)


def head(found):
    return found.params["teacher"]["stage_0"]["head"]["kernel"].T


@pytest.mark.parametrize("single", [False, True])
def test_timm_folder_gives_normalisation(tmp_path, single):
    folder = timm_folder(tmp_path / "hub")
    inferred, found = read(folder / "model.safetensors" if single else folder)
    assert found.config.data.mean == found.config.data.std == (0.5, 0.5, 0.5)
    assert inferred.read["config.data.mean"] == (0.5, 0.5, 0.5)
    assert "config.data.mean" not in inferred.assumed
    bare = tmp_path / "vit.safetensors"
    write_tensors(bare, deit())
    inferred, found = read(bare)
    assert found.config.data.mean == (0.485, 0.456, 0.406) == inferred.assumed["config.data.mean"]


def test_hugging_face_preprocessor_gives_normalisation(tmp_path):
    about = {"image_mean": [0.1, 0.2, 0.3], "image_std": HALF, "size": {"height": 224}}
    folder = timm_folder(tmp_path / "hub", about, file="preprocessor_config.json")
    assert read(folder)[1].config.data.mean == (0.1, 0.2, 0.3)
    # Newer versions write another file.
    newer = folder / "processor_config.json"
    newer.write_text(json.dumps({"image_processor": about}))
    assert read(folder)[1].config.data.mean == (0.1, 0.2, 0.3)
    newer.write_text(json.dumps({"image_processor": about | {"image_mean": HALF}}))
    with pytest.raises(ValueError, match=r"'processor_config\.json' say different things.* remove"):
        read(folder)
    (folder / "preprocessor_config.json").unlink()
    assert read(folder)[1].config.data.mean == (0.5, 0.5, 0.5)


def test_mean_differing_from_folder_needs_override(tmp_path):
    source = pretrained.find_source(pretrained.read_files(timm_folder(tmp_path / "hub")))
    inferred = pretrained.infer_config(source)
    other = dataclasses.replace(inferred.config.data, mean=(0.485, 0.456, 0.406))
    config = dataclasses.replace(inferred.config, data=other)
    with pytest.raises(
        ValueError, match=r"hub/config\.json says mean=\(0\.5, 0\.5, 0\.5\)"
    ) as raised:
        pretrained.load(source, config)
    assert "Give --config.data.mean=0.5,0.5,0.5" in str(raised.value)
    assert pretrained.load(source, config, overridden=["data.mean"]).config.data == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"global_pool": "avgmax"},
            r"global_pool='avgmax', but m2mKD's ViT only has token, avg, map;",
        ),
        ({"model_args": {"act_layer": "relu"}}, r"'relu', but m2mKD's ViT only has gelu,"),
        ({"model_args": {"global_pool": ["avg"]}}, r"\['avg'\], but m2mKD's ViT only has"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, r"model_args with \['norm_layer'\]"),
        ({"architecture": 3}, "architecture=3 must be a string"),
        ({"model_args": [3]}, r"model_args=\[3\] must be a dictionary"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg='x' must be a dictionary"),
        ({"pretrained_cfg": {"mean": "0.5"}}, "mean='0.5' must be a list of numbers"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, r"std=\[0, 1, 1\] must be"),
        ({"pretrained_cfg": {"mean": [float("nan")]}}, r"mean=\[nan\] must be"),
    ],
)
def test_unsupported_timm_config_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.read_files(timm_folder(tmp_path / "hub", TIMM | change))
    assert "config.json" in str(raised.value)


def test_heads_are_read_from_timm_config(tmp_path):
    folder = timm_folder(tmp_path / "hub", TIMM | {"model_args": {"num_heads": 6, "img_size": 32}})
    inferred, found = read(folder)
    assert found.config.teacher.heads == 6 == inferred.read["config.teacher.heads"]
    assert "config.teacher.heads" not in inferred.assumed


def training_file(path, **weights):
    """A checkpoint like DeiT's main.py writes."""
    storages = {}
    args = New(Global("argparse", "Namespace"), {"lr": 5e-4, "model": "deit_tiny_patch16_224"})
    value = {"optimizer": {"state": {}}, "epoch": 299, "args": args, "scaler": {"scale": 65536.0}}
    value |= {key: state_dict(tensors, storages) for key, tensors in weights.items()}
    torch_files.write_archive(path, value, storages)
    return path


def test_training_checkpoint_needs_choice_of_weights_or_ema(tmp_path, capsys):
    raw = deit()
    average = {name: x + 1 for name, x in raw.items()}
    file = training_file(tmp_path / "checkpoint.pth", model=raw, model_ema=average)
    with pytest.raises(SystemExit) as stop:
        convert_weights.main([str(file), str(tmp_path / "teacher")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "checkpoint.pth holds weights under 'model' and 'model_ema'" in said
    assert not (tmp_path / "teacher").exists()
    convert_weights.main([str(file), str(tmp_path / "teacher"), "--weights=model_ema"])
    shown = capsys.readouterr().out
    assert "note: the weights are those under 'model_ema'" in shown
    account = json.loads((tmp_path / "teacher" / "conversion.json").read_text())
    assert account["notes"] == ["the weights are those under 'model_ema'"]
    assert ["config.teacher.heads", "3"] in account["assumed"]
    kernel = checkpoint.load(tmp_path / "teacher", subtree="teacher/stage_0/head")["kernel"]
    np.testing.assert_array_equal(kernel, average["head.weight"].T)
    np.testing.assert_array_equal(head(read(file, weights="model")[1]), raw["head.weight"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "model.backbone._orig_mod."])
def test_wrapper_prefixes_are_stripped(tmp_path, prefix):
    tensors = {prefix + name: x for name, x in deit().items()}
    tensors["criterion.center"] = np.ones(3, np.float32)
    if prefix in ("_orig_mod.", "module."):
        del tensors["criterion.center"]
    torch_files.save(tmp_path / "last.ckpt", tensors)
    _, found = read(tmp_path / "last.ckpt")
    np.testing.assert_array_equal(head(found), deit()["head.weight"])
    assert any("prefix" in note or "was removed" in note for note in found.account.notes)
    dropped = dict(found.account.dropped)
    assert ("criterion.center" in dropped) == ("criterion.center" in tensors)


def test_state_dict_with_student_and_teacher_needs_a_choice(tmp_path):
    raw = deit()
    tensors = {f"student.{name}": x for name, x in raw.items()}
    tensors |= {f"teacher.{name}": x + 2 for name, x in raw.items()}
    write_tensors(tmp_path / "dino.safetensors", tensors)
    with pytest.raises(ValueError, match=r"networks below 'student\.', 'teacher\.': choose"):
        read(tmp_path / "dino.safetensors")
    _, found = read(tmp_path / "dino.safetensors", weights="teacher.")
    np.testing.assert_array_equal(head(found), raw["head.weight"] + 2)
    assert dict(found.account.dropped)["student.cls_token"] == "belongs to the rest of the model"
    with pytest.raises(ValueError, match=r"no network below weights='x\.'; there are: 'student\.'"):
        read(tmp_path / "dino.safetensors", weights="x.")


@pytest.mark.parametrize("kind", [None, "teacher"])
def test_headless_vit_is_refused(tmp_path, kind):
    tensors = {name: x for name, x in deit().items() if not name.startswith("head.")}
    write_tensors(tmp_path / "headless.safetensors", tensors)
    with pytest.raises(
        ValueError, match=r"(?s)headless\.safetensors .*num_classes=0.* its head"
    ) as raised:
        read(tmp_path / "headless.safetensors", kind=kind)
    assert "--kind" not in str(raised.value) and "give the config" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("dist_token", (1, 1, 192), "a distillation token"),
        ("head_dist.weight", (7, 192), "a distillation token"),
        ("blocks.0.mlp.w12.weight", (192, 192), "gated or normed MLPs"),
        ("blocks.0.attn.rope.freqs", (8,), "rotary positions"),
        ("attn_pool.q_norm.weight", (64,), "norms of queries and keys"),
        ("attn_pool.pos_embed", (4, 192), "positions in its pooling"),
        ("blocks.1.attn.q_norm.weight", (64,), "norms of queries and keys"),
        ("pre_logits.fc.weight", (192, 192), "a layer before the head"),
    ],
)
def test_unsupported_parts_are_named(tmp_path, name, shape, what):
    write_tensors(tmp_path / "a.safetensors", deit() | {name: np.ones(shape, np.float32)})
    with pytest.raises(ValueError, match=r"with any config: take a model without") as raised:
        read(tmp_path / "a.safetensors")
    assert f"{what}" in str(raised.value) and name in str(raised.value)
    source = pretrained.find_source(pretrained.read_files(tmp_path / "a.safetensors"))
    plain = tmp_path / "plain.safetensors"
    write_tensors(plain, deit())
    config = pretrained.infer_config(pretrained.find_source(pretrained.read_files(plain))).config
    with pytest.raises(ValueError, match=r"m2mKD's ViT does not support") as raised:
        pretrained.load(source, config)
    assert "give the config.teacher" not in str(raised.value)


def test_plain_deit_has_no_unsupported_parts():
    assert foreign_parts(deit()) == "" and not is_headless(deit())


def test_tensor_names_of_other_libraries_are_recognised(tmp_path):
    for name, whose in (
        ("vit.encoder.layer.0.attention.attention.query.weight", "Hugging Face's"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision's"),
    ):
        file = tmp_path / f"{whose[:5]}.safetensors"
        write_tensors(file, {name: np.ones((3, 3), np.float32)})
        with pytest.raises(ValueError, match=rf"a ViT under {whose} names, which are not"):
            read(file)


def test_file_of_unknown_kind_names_the_closest(tmp_path):
    tensors = {name: x for name, x in deit().items() if not name.endswith("norm1.weight")}
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"(?s)matches none of the kinds .*'vmoe'") as raised:
        read(tmp_path / "a.safetensors")
    assert "closest is kind='meta':\n  blocks.*.norm1.weight is missing" in str(raised.value)
    write_tensors(tmp_path / "b.safetensors", {"a.weight": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"its tensors are called \['a\.weight'\]$"):
        read(tmp_path / "b.safetensors")


def test_many_unknown_tensors_give_a_short_error(tmp_path):
    tensors = deit() | {f"decoder.{i}.weight{'x' * 90}": np.ones(1, "f4") for i in range(300)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match="does not fit kind='teacher'") as raised:
        read(tmp_path / "a.safetensors")
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": (1, 7, 192)}, "position table of 7 rows, which are not a square"),
        ({"reg_token": (4, 192)}, r"cannot infer the sizes of .*: reg_token is \(4, 192\)"),
        ({"reg_token": (1, 0, 192)}, r"cannot infer the sizes of .*: reg_token is \(1, 0, 192\)"),
        ({"blocks.0.norm1.weight": (3, 4)}, r"blocks norm1\.weight is \(3, 4\)"),
        ({"blocks.0.norm1.weight": ()}, r"blocks norm1\.weight is \(\)"),
        ({"blocks.0.norm1.weight": (0,)}, r"blocks norm1\.weight is \(0,\)"),
        ({"head.weight": ()}, r"head\.weight is \(\) and should be"),
        ({"blocks.9999.norm1.weight": (192,)}, "does not fit kind='teacher'"),
    ],
)
def test_malformed_shapes_are_named(tmp_path, change, message):
    tensors = deit() | {name: np.ones(shape, np.float32) for name, shape in change.items()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(raised.value)


def test_malformed_metadata_is_named(tmp_path):
    storages = {}
    tensors = {n: x for n, x in deit().items() if n.startswith("blocks.")}
    for beside, message in (
        ({"divided_depths": "ab"}, "divided_depths='ab', which should be the number of blocks"),
        ({"divided_depths": [10**8]}, r"divided_depths=\[100000000\]"),
        ({"model_name": ["a"]}, "cannot infer from .* how many blocks"),
    ):
        value = {"block_state_dict": state_dict(tensors, storages), "model_name": "x"} | beside
        torch_files.write_archive(tmp_path / "a.pth", value, storages)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.pth")


def test_heads_that_cannot_be_inferred_come_from_a_flag(tmp_path):
    write_tensors(tmp_path / "wide.safetensors", deit(width=48))
    with pytest.raises(ValueError, match=r"give --config\.teacher\.heads=N"):
        read(tmp_path / "wide.safetensors")
    arguments = [str(tmp_path / "wide.safetensors"), str(tmp_path / "run")]
    convert_weights.main([*arguments, "--config.teacher.heads=4"])
    saved = freeze(Config, checkpoint.load_config(tmp_path / "run"))
    assert saved.teacher.heads == 4 and saved.teacher.norm_eps == 1e-6


def test_teacher_with_different_normalisation_is_refused(tmp_path, caplog):
    file = tmp_path / "vit.safetensors"
    write_tensors(file, deit(width=192, blocks=1))
    convert_weights.main([str(file), str(tmp_path / "teacher"), "--config.data.mean=0.5,0.5,0.5"])
    config = freeze(Config, checkpoint.load_config(tmp_path / "teacher"))
    weights.compare_images(config, str(tmp_path / "teacher"), frozen=True)
    assert not caplog.text
    other = dataclasses.replace(config.data, mean=(0.485, 0.456, 0.406), image_size=48)
    run = dataclasses.replace(
        config, data=other, sources=SourcesConfig(teacher=str(tmp_path / "teacher"))
    )
    mesh = one_device()
    shapes = networks.parameter_shapes(run, networks.teacher_network(run), "teacher", mesh)
    origins = [weights.Origin(run.sources.teacher, "teacher", "teacher")]
    with pytest.raises(
        ValueError, match=r"teacher was made for images normalised with mean"
    ) as raised:
        weights.take_weights(run, shapes, origins, frozen=True)
    assert "Give --config.data.mean=0.5,0.5,0.5, or another source" in str(raised.value)
    weights.compare_images(run, run.sources.teacher, frozen=False)
    assert "from now on it trains on images normalised differently" in caplog.text
    assert "of side 32, but config.data.image_size=48" in caplog.text
    with pytest.raises(ValueError, match="teacher was made for images normalised with"):
        # As a pipeline does before its first phase.
        weights.take_weights(run, shapes, origins, frozen=True, planned={})
    assert unfreeze(config).data.mean == (0.5, 0.5, 0.5)


def test_the_command_names_a_file_that_needs_no_conversion(tmp_path, capsys):
    write_tensors(tmp_path / "a.safetensors", {"text_projection.weight": np.ones(2)})
    with pytest.raises(SystemExit):
        convert_weights.main([str(tmp_path / "a.safetensors"), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "is of kind 'clip_text', which needs no conversion" in said
    assert "as --config.sources.clip_text" in said


def test_url_of_weights_is_refused():
    with pytest.raises(ValueError, match=r"^https://x/y\.pth must be on a local disk; copy it"):
        pretrained.read_files("https://x/y.pth")
