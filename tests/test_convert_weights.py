"""The command that converts weights: every kind survives a round trip, phases accept the results,
and misfits are named before anything is written."""

import dataclasses
import json
import pathlib

import convert_weights
import numpy as np
import pytest
import torch_files
from meshes import one_device
from same import assert_same
from weight_files import deit, listed_by_stage, make_state, save_checkpoint, write_config

from common_jax import checkpoint
from common_jax.config import freeze
from common_jax.weights import read_plain, read_tensors, write_tensors
from common_jax.weights.table import expected_tensors
from m2mkd_jax import pretrained
from m2mkd_jax.config import Config, SourcesConfig
from m2mkd_jax.models import vit, vmoe
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.phases import networks
from m2mkd_jax.phases.sources import weights
from m2mkd_jax.pretrained.kinds import KINDS, guess
from m2mkd_jax.pretrained.reading import File, Source

GOLDEN = pathlib.Path(__file__).parent / "golden"
ONE = one_device()


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


def convert(*arguments):
    convert_weights.main([str(argument) for argument in arguments])


def refusal(capsys, *arguments) -> str:
    """The command's message when it refuses, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        convert(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def config_of(file, arg="") -> Config:
    command = convert_weights.parse(["in", "out", f"--config={file}:{arg}"])
    return convert_weights.read_config(command, Config)


@pytest.mark.parametrize("kind", ["meta", "teacher", "vmoe", "nac"])
def test_whole_network_round_trips(tmp_path, config_file, capsys, kind):
    arg = "nac" if kind == "nac" else ""
    config = config_of(config_file, arg)
    state = make_state(kind, config)
    depths = KINDS[kind].depths(config)
    listed = state if kind == "nac" else listed_by_stage(state, depths)
    save_checkpoint(tmp_path / "in.pth", listed)
    convert(tmp_path / "in.pth", tmp_path / "run", f"--config={config_file}:{arg}")
    shown = capsys.readouterr().out
    assert f"kind {kind}, from the tensor names" in shown and f"of kind {kind}" in shown
    convert(tmp_path / "run", tmp_path / "out.pth")
    assert_same(read_tensors(tmp_path / "out.pth"), listed)
    convert(tmp_path / "run", tmp_path / "out.safetensors")
    assert_same(read_tensors(tmp_path / "out.safetensors"), state)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("teacher_module", 0),
        ("module", 1),
        ("vmoe_student", 1),
        ("vmoe_student", 2),
        ("nac_student", 0),
        ("nac_student", 2),
        ("nac_student", 3),
    ],
)
def test_module_round_trips(tmp_path, config_file, kind, stage):
    arg = "nac" if kind == "nac_student" else ""
    config = config_of(config_file, arg)
    state, listed, key, told = make_state(kind, config, stage), None, "model", {}
    if kind == "teacher_module":
        key = "block_state_dict"
        told = {"model_name": "tiny", "block_index": stage, "divided_depths": [2, 1, 1]}
    elif kind != "nac_student":
        listed = listed_by_stage(state, (9,))
    names = {0: "ReadInStudent", 2: "MediatorStudent_2", 3: "ReadOutStudent"}
    name = names[stage] if kind == "nac_student" else "in"
    save_checkpoint(tmp_path / f"{name}.pth", listed or state, key=key, **told)
    flags = [f"--config={config_file}:{arg}", f"--kind={kind}"]
    if kind in ("module", "vmoe_student"):
        flags.append(f"--config.module={stage}")
    convert(tmp_path / f"{name}.pth", tmp_path / "run", *flags)
    role, phase = KINDS[kind].role, KINDS[kind].phase
    assert list(checkpoint.load_shapes(tmp_path / "run")[role]) == [f"stage_{stage}"]
    saved = freeze(Config, checkpoint.load_config(tmp_path / "run"))
    assert saved.phase == phase and saved.module in ("all", str(stage))
    convert(tmp_path / "run", tmp_path / "out.pth")
    assert_same(read_tensors(tmp_path / "out.pth"), listed or state)
    plain = read_plain(tmp_path / "out.pth")
    if kind != "nac_student":
        assert plain["block_index"] == stage
        assert plain["divided_depths"] == list(KINDS[kind].depths(config))


def test_module_is_cut_out_of_the_hybrid_that_trained_it(tmp_path, config_file, capsys):
    """What the original's phase MT saves: module 0 inside the meta model, also under stage
    names."""
    state = make_state("teacher", config_of(config_file))
    save_checkpoint(tmp_path / "in.pth", listed_by_stage(state, (2, 1, 1)))
    flags = [f"--config={config_file}", "--kind=module", "--config.module=0"]
    convert(tmp_path / "in.pth", tmp_path / "run", *flags)
    assert "of another stage, or listed twice" in capsys.readouterr().out
    convert(tmp_path / "run", tmp_path / "out.safetensors")
    first = ("pos_embed", "cls_token", "patch_embed.", "blocks.0.", "blocks.1.")
    want = {name: x for name, x in state.items() if name.startswith(first)}
    assert_same(read_tensors(tmp_path / "out.safetensors"), want)


def test_fused_experts_are_accepted(tmp_path, config_file):
    config = config_of(config_file)
    state = make_state("vmoe", config)
    fused = {name: x for name, x in state.items() if ".experts." not in name}
    for i in range(3):
        for tensor in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"):
            layer = f"blocks.{i}.moe.experts"
            each = [state[f"{layer}.{e}.{tensor}"] for e in range(4)]
            fused[f"{layer}.{tensor}"] = np.concatenate(each)
    torch_files.save(tmp_path / "vmoe_base.pth", fused)
    convert(tmp_path / "vmoe_base.pth", tmp_path / "run", f"--config={config_file}")
    convert(tmp_path / "run", tmp_path / "out.safetensors")
    assert_same(read_tensors(tmp_path / "out.safetensors"), state)
    account = json.loads((tmp_path / "run" / "conversion.json").read_text())
    taken = {name: (path, tuple(shape)) for name, path, shape in account["taken"]}
    assert taken.keys() == fused.keys()
    name = "blocks.2.moe.experts.htoh4.weight"
    assert taken[name] == ("student/stage_2/block_0/moe/up", (4, 32, 16))


def golden(case):
    about = json.loads((GOLDEN / f"{case}.json").read_text())
    arrays = np.load(GOLDEN / f"{case}.npz")
    params = {k.removeprefix("params/"): arrays[k] for k in arrays if k.startswith("params/")}
    return about, params


def test_split_module_files_form_one_teacher(tmp_path, config_file):
    """Names, keys and boundaries of a teacher that the original has split."""
    about, params = golden("m2mkd/split_teacher")
    starts, folder = (0, 2, 3), tmp_path / "FT_tiny"
    folder.mkdir()
    for i, (name, file) in enumerate(about["files"].items()):
        state = {}
        for local in file["block_state_dict_keys"]:
            root = local
            if local.startswith("blocks."):
                _, number, rest = local.split(".", 2)
                root = f"blocks.{int(number) + starts[i]}.{rest}"
            state[local] = params[root]
        beside = {key: file[key] for key in ("model_name", "block_index", "divided_depths")}
        save_checkpoint(folder / name, state, key="block_state_dict", **beside)
    flags = {"data.image_size": 16, "data.channels": 3, "data.labels": 1000}
    flags |= {"data.mean": "(0,0,0)", "data.std": "(1,1,1)"}
    flags |= {"teacher.patch": 8, "teacher.width": 12, "teacher.mlp_ratio": 2.0}
    overrides = [f"--config.{key}={value}" for key, value in flags.items()]
    convert(folder, tmp_path / "run", f"--config={config_file}", *overrides)
    convert(tmp_path / "run", tmp_path / "whole.safetensors")
    assert_same(read_tensors(tmp_path / "whole.safetensors"), params)
    convert(tmp_path / "run", tmp_path / "tiny_1.pth", "--config.module=1")
    assert_same(read_tensors(tmp_path / "tiny_1.pth"), read_tensors(next(folder.glob("*_1.pth"))))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm_deit_works_as_a_modular_and_a_whole_teacher(tmp_path, capsys, suffix):
    state, file = deit(), tmp_path / f"model.{suffix}"
    (write_tensors if suffix == "safetensors" else torch_files.save)(file, state)
    convert(file, tmp_path / "teacher", "--config.teacher.depths=1,1")
    shown = capsys.readouterr().out
    assert "kind teacher, from the tensor names" in shown
    assert "config.teacher.width=192" in shown and "config.data.labels=7" in shown
    assert "assumed: config.teacher.heads=3" in " ".join(shown.split())
    assert "config.teacher.depths" not in shown
    saved = freeze(Config, checkpoint.load_config(tmp_path / "teacher"))
    assert saved.data.image_size == 32 and saved.teacher.depths == (1, 1)
    # The phases ask for what they use: distill for one stage, the baseline for all stages, here
    # with larger images.
    larger = dataclasses.replace(
        saved,
        data=dataclasses.replace(saved.data, image_size=48),
        sources=SourcesConfig(teacher=str(tmp_path / "teacher")),
    )
    origin = weights.require_source(larger, "teacher")
    network = networks.teacher_network(larger)
    for stages in (None, (1,)):
        needed = networks.parameter_shapes(larger, network, "teacher", ONE, only=stages)
        part = "teacher" if stages is None else "teacher/stage_1"
        found = weights.take_weights(larger, needed, [weights.Origin(origin, part, part)])
        last = found.params["teacher"]["stage_1"]
        np.testing.assert_array_equal(last["head"]["kernel"], state["head.weight"].T)
        adapted = [entry["to"] for entry in found.account["adapted"]]
        assert adapted == ([[1, 10, 192]] if stages is None else [])


def test_distilled_deit_is_refused(tmp_path, capsys):
    torch_files.save(tmp_path / "a.pth", {**deit(), "dist_token": np.ones((1, 1, 192), "f4")})
    said = refusal(capsys, tmp_path / "a.pth", tmp_path / "run")
    assert "distillation token (dist_token)" in said and "take a model without" in said
    assert not (tmp_path / "run").exists()


def test_all_misfits_are_reported_and_nothing_is_written(tmp_path, config_file, capsys):
    state = make_state("teacher", config_of(config_file))
    del state["blocks.1.norm2.bias"], state["cls_token"]
    state |= {"blocks.3.ls1.gamma": np.ones(16, "f4"), "fc_norm.weight": np.ones(16, "f4")}
    state["head.weight"] = state["head.weight"][:4]
    torch_files.save(tmp_path / "a.pth", state)
    flags = [f"--config={config_file}", "--kind=teacher"]
    said = refusal(capsys, tmp_path / "a.pth", tmp_path / "run", *flags)
    for line in (
        "blocks.1.norm2.bias (16,) is missing, for stage_0/block_1/norm2/bias",
        "cls_token (1, 1, 16) is missing",
        "blocks.3.ls1.gamma (16,) has no place",
        "fc_norm.weight (16,) has no place",
        "head.weight is (4, 16) and should be (10, 16)",
        "give the config.teacher and config.data",
    ):
        assert line in said
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"stages.0.cls_token": s["cls_token"] + 1}, "should equal cls_token"),
        (lambda s: s | {"stages.7.norm.bias": s["norm.bias"]}, "stages.7.norm.bias (16,) has no"),
        (lambda s: s | {"head.bias": s["head.bias"] * np.nan}, "not finite, in stage_2/head/bias"),
        (lambda s: s | {"head.bias": s["head.bias"].astype(int)}, "head/bias is int64"),
        (
            lambda s: {n: x for n, x in s.items() if "blocks.3." not in n},
            "the file has 3 blocks, but config.teacher.depths=(2, 1, 1) have 4",
        ),
    ],
)
def test_invalid_teacher_is_refused(tmp_path, config_file, capsys, change, said):
    torch_files.save(tmp_path / "a.pth", change(make_state("teacher", config_of(config_file))))
    flags = [f"--config={config_file}", "--kind=teacher"]
    assert said in refusal(capsys, tmp_path / "a.pth", tmp_path / "run", *flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.teacher.dephts=2,2"], "has no field 'dephts' (did you mean 'depths'?)"),
        (["--config.teacher.depths=(4"], "config.teacher.depths=(4 must be a tuple"),
        (["--config=nowhere.py"], "--config=nowhere.py: there is no such file in"),
        ([], "has the sizes of no published network"),
        (["--kind=nac"], "give its config, such as --config=configs/m2mkd/nac_imagenet.py"),
        (["--kind=vmoe_student"], "give its config, such as --config=configs/m2mkd/vmoe_base.py"),
    ],
)
def test_invalid_requests_are_reported(tmp_path, config_file, capsys, flags, said):
    torch_files.save(tmp_path / "a.pth", make_state("teacher", config_of(config_file)))
    if "teacher" in "".join(flags):
        flags = [f"--config={config_file}", *flags]
    assert said in refusal(capsys, tmp_path / "a.pth", tmp_path / "run", *flags)


@pytest.mark.parametrize(
    ("out", "said"),
    [("run", "cannot be made a folder"), ("out.pth", "cannot be written")],
)
def test_output_is_checked_before_the_input_is_read(tmp_path, capsys, out, said):
    (tmp_path / "file").touch()
    error = refusal(capsys, "/nowhere/in.pth", tmp_path / "file" / out)
    assert error.startswith(f"error: OUT='{tmp_path}/file/{out}' {said}")


def test_module_of_a_whole_network_file_is_refused(tmp_path, config_file, capsys):
    torch_files.save(tmp_path / "a.pth", make_state("vmoe", config_of(config_file)))
    convert(tmp_path / "a.pth", tmp_path / "run", f"--config={config_file}")
    said = refusal(capsys, tmp_path / "run", tmp_path / "b.pth", "--config.module=1")
    assert "kind='vmoe', whose files hold a whole network: do not give a module, here 1" in said


def test_existing_output_is_replaced_only_with_force(tmp_path, config_file, capsys):
    config = config_of(config_file)
    for seed in (0, 1):
        torch_files.save(tmp_path / f"{seed}.pth", make_state("teacher", config, seed=seed))
    flags = [f"--config={config_file}", "--kind=teacher"]
    convert(tmp_path / "0.pth", tmp_path / "run", *flags)
    assert "run exists" in refusal(capsys, tmp_path / "1.pth", tmp_path / "run", *flags)
    convert(tmp_path / "1.pth", tmp_path / "run", *flags, "--force")
    convert(tmp_path / "run", tmp_path / "0.pth", "--force")
    first, second = read_tensors(tmp_path / "0.pth"), read_tensors(tmp_path / "1.pth")
    assert_same({name: first[name] for name in second}, second)
    said = refusal(capsys, tmp_path / "run", tmp_path / "b.pth", "--kind=meta")
    assert "is of kind 'teacher', not --kind=meta" in said
    said = refusal(capsys, tmp_path / "run", tmp_path / "b.pth", "--config.module=9")
    assert "holds stage_0, stage_1, stage_2 of kind='teacher_module'" in said
    said = refusal(capsys, tmp_path / "run", tmp_path / "b.pth", "--config.seed=1")
    assert "only --config.module=K" in said
    assert "no finished checkpoint" in refusal(capsys, tmp_path, tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize("out", ["own", "own/weights", "own/other"])
def test_force_deletes_only_what_a_conversion_wrote(tmp_path, config_file, capsys, out):
    (tmp_path / "own/weights").mkdir(parents=True)
    (tmp_path / "own/other").mkdir()
    (tmp_path / "own/other/notes.txt").write_text("precious")
    weights = tmp_path / "own/weights/0.pth"
    torch_files.save(weights, make_state("teacher", config_of(config_file)))
    said = refusal(capsys, weights, tmp_path / out, f"--config={config_file}", "--force")
    assert ("--force would delete IN" in said) == (out != "own/other")
    assert ("only a folder from an earlier conversion" in said) == (out == "own/other")
    assert weights.is_file() and (tmp_path / "own/other/notes.txt").is_file()


def test_module_of_a_file_must_be_unambiguous(tmp_path, config_file, capsys):
    config = config_of(config_file)
    folder = tmp_path / "students"
    folder.mkdir()
    for stage in range(3):
        torch_files.save(folder / f"s_{stage}.pth", make_state("vmoe_student", config, stage))
    flags = [f"--config={config_file}"]
    convert(folder, tmp_path / "run", *flags)
    assert sorted(checkpoint.load_shapes(tmp_path / "run")["student"]) == [
        "stage_0",
        "stage_1",
        "stage_2",
    ]
    assert freeze(Config, checkpoint.load_config(tmp_path / "run")).modules() == (0, 1, 2)
    said = refusal(capsys, folder / "s_1.pth", tmp_path / "one", *flags)
    assert "does not say which of the 3 modules it holds: give --config.module=K" in said
    said = refusal(capsys, folder / "s_2.pth", tmp_path / "one", *flags, "--config.module=1")
    assert "contradictory evidence of which module it holds" in said
    said = refusal(capsys, folder, tmp_path / "one", *flags, "--config.module=1")
    assert "'all' for a folder" in said
    (folder / "s_1.pth").rename(folder / "s_3.pth")
    (folder / "s_2.pth").rename(folder / "s_1.pth")
    said = refusal(capsys, folder, tmp_path / "one", *flags)
    assert "contradictory evidence of which module it holds" in said
    said = refusal(capsys, tmp_path / "run", tmp_path / "out.pth")
    assert "holds stage_0, stage_1, stage_2 of kind='vmoe_student'" in said


def test_mediator_without_a_number_may_be_any(tmp_path, config_file, capsys):
    config, path = config_of(config_file, "nac"), tmp_path / "MediatorStudent.pth"
    torch_files.save(path, make_state("nac_student", config, 2))
    flags = [f"--config={config_file}:nac", "--kind=nac_student"]
    said = refusal(capsys, path, tmp_path / "run", *flags)
    assert "does not say which of the 4 modules it holds: give --config.module=K" in said
    convert(path, tmp_path / "run", *flags, "--config.module=2")
    assert list(checkpoint.load_shapes(tmp_path / "run")["student"]) == ["stage_2"]


def hollow(kind, config):
    """Tensors of a kind that take no memory."""
    expected = expected_tensors(KINDS[kind].table(config, None), KINDS[kind].shapes(config, None))
    return {name: np.broadcast_to(np.float32(0), shape) for name, (_, shape) in expected.items()}


@pytest.mark.parametrize("name", [*vit.VARIANTS, *vit.PRETRAINED, *vmoe.VARIANTS])
def test_published_sizes_are_inferred_from_the_tensors(name):
    kind, variant = ("vmoe", vmoe.variant) if name in vmoe.VARIANTS else ("teacher", vit.variant)
    sizes, side = variant(name, (1,))
    config = convert_weights.read_config(convert_weights.parse(["a", "b"]), Config)
    data = dataclasses.replace(
        config.data, image_size=side, channels=3, labels=1000, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    section = {"vmoe": "model", "teacher": "teacher"}[kind]
    config = dataclasses.replace(config, data=data, **{section: sizes})
    inferred = pretrained.infer_config(
        Source(kind, (File(pathlib.Path("a"), hollow(kind, config), {}),), guessed=False)
    )
    want = dataclasses.replace(sizes, moe_blocks="0") if kind == "vmoe" else sizes
    assert getattr(inferred.config, section) == want
    assert inferred.config.interface == Interface(side, 3, 1000)
    assert inferred.read[f"config.{section}.width"] == sizes.width
    assert inferred.assumed[f"config.{section}.heads"] == sizes.heads


@pytest.mark.parametrize("by_stage", [False, True])
def test_expert_blocks_are_numbered_across_stages(config_file, by_stage):
    config = config_of(config_file)
    model = dataclasses.replace(config.model, moe_blocks="1,3", depths=(2, 1, 1))
    config = dataclasses.replace(config, model=model)
    tensors = hollow("vmoe", config)
    if by_stage:
        tensors = listed_by_stage(tensors, model.depths)
    file = File(pathlib.Path("a"), tensors, {})
    inferred = pretrained.infer_config(Source("vmoe", (file,), guessed=False), ["model.heads"])
    assert inferred.read["config.model.moe_blocks"] == "1,3"
    assert inferred.read["config.model.moe.experts"] == model.moe.experts


def test_soft_router_is_inferred_from_its_gate(config_file):
    config = config_of(config_file)
    moe = MoeConfig(experts=3, router="soft", slots_per_expert=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    tensors = hollow("vmoe", config)
    file = File(pathlib.Path("a"), tensors, {})
    assert guess(tensors, {}, "a") == "vmoe"
    inferred = pretrained.infer_config(Source("vmoe", (file,), guessed=False), ["model.heads"])
    assert inferred.config.model.moe == moe


def test_help_has_a_line_for_every_kind(capsys):
    with pytest.raises(SystemExit) as stop:
        convert_weights.parse(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for kind in (*KINDS, "cliptrans"):
        assert f"  {kind} " in shown
        assert convert_weights.EXAMPLES[kind] in shown
