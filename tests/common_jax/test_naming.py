"""Which tensors of a training checkpoint are a network's, and the prefixes that frameworks add."""

import numpy as np
import pytest
import torch_files
from same import assert_same
from torch_files import Call, Global, New, state_dict

from common_jax.weights import Account, format_account, list_problems, read_plain, read_weights

RAW = {"cls_token": np.zeros(3, np.float32), "head.weight": np.ones((2, 3), np.float32)}
AVERAGE = {name: x + 5 for name, x in RAW.items()}
EPOCH = {"epoch": 7}


def save(path, value, **dictionaries):
    """A training checkpoint with plain values, next to dictionaries of tensors."""
    storages = {}
    named = {key: state_dict(tensors, storages) for key, tensors in dictionaries.items()}
    torch_files.write_archive(path, value | named, storages)
    return path


@pytest.mark.parametrize(
    ("raw", "average"),
    [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model", "ema")],
)
def test_weights_or_average_must_be_chosen(tmp_path, raw, average):
    file = save(tmp_path / "checkpoint.pth", EPOCH, **{raw: RAW, average: AVERAGE})
    with pytest.raises(ValueError, match=rf"checkpoint\.pth holds weights under '{raw}' and ") as e:
        read_weights(file)
    assert f"'{average}'" in str(e.value) and "--weights=KEY of a command" in str(e.value)
    for key, want in ((raw, RAW), (average, AVERAGE)):
        found = read_weights(file, weights=key)
        assert_same(found.tensors, want)
        assert found.notes == (f"the weights are those under '{key}'",)
    with pytest.raises(
        ValueError, match=f"no tensors .* under weights='emma'; keys that do: '{raw}'"
    ):
        read_weights(file, weights="emma")


def test_student_or_teacher_must_be_chosen(tmp_path):
    file = save(tmp_path / "dino.pth", EPOCH, student=RAW, teacher=AVERAGE)
    with pytest.raises(ValueError, match=r"choose with weights=KEY, KEY one of student, teacher"):
        read_weights(file)
    assert_same(read_weights(file, weights="teacher").tensors, AVERAGE)


def test_other_networks_are_skipped_and_noted(tmp_path):
    file = save(tmp_path / "a.pt", {}, model=RAW, criterion={"center": np.ones(2, np.float32)})
    found = read_weights(file)
    assert_same(found.tensors, RAW)
    assert found.notes == ("the weights are those under 'model'; not read: 'criterion'",)


def test_tensor_beside_the_network_is_noted(tmp_path):
    storages = {}
    beside = state_dict({"scale": np.ones(2, np.float32)}, storages)
    torch_files.write_archive(
        tmp_path / "a.pt", {"model": state_dict(RAW, storages)} | beside, storages
    )
    assert read_weights(tmp_path / "a.pt").notes == (
        "the weights are those under 'model'; not read: 'scale'",
    )


def test_count_of_an_averaged_model_is_left_out_and_noted(tmp_path):
    wrapped = {f"module.{name}": x for name, x in RAW.items()}
    torch_files.save(tmp_path / "a.pth", {"n_averaged": np.array(7)} | wrapped)
    found = read_weights(tmp_path / "a.pth")
    assert_same(found.tensors, RAW)
    assert found.notes[0].startswith("'n_averaged' was left out")
    torch_files.save(tmp_path / "b.pth", {"n_averaged": np.array(7)} | RAW)
    assert "n_averaged" in read_weights(tmp_path / "b.pth").tensors


def test_lone_average_is_read_and_noted(tmp_path):
    found = read_weights(save(tmp_path / "a.pt", {}, model_ema=AVERAGE))
    assert_same(found.tensors, AVERAGE)
    assert found.notes == ("the weights are those under 'model_ema'",)


def test_deit_and_lightning_training_files_are_read(tmp_path):
    """DeiT stores argparse's Namespace next to the weights, Lightning its hyperparameters."""
    namespace = New(Global("argparse", "Namespace"), {"lr": 0.1, "model": "deit_tiny"})
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"params": [0]}]}
    deit = {"optimizer": optimizer, "lr_scheduler": {}, "args": namespace, "epoch": 299}
    found = read_weights(save(tmp_path / "checkpoint.pth", deit, model=RAW), weights="model")
    assert_same(found.tensors, RAW)
    lightning = {
        "pytorch-lightning_version": "2.2.0",
        "hyper_parameters": Call(Global("omegaconf", "DictConfig"), ({"lr": 0.1},)),
        "callbacks": {},
    }
    file = save(tmp_path / "last.ckpt", lightning | EPOCH, state_dict=RAW)
    assert_same(read_weights(file).tensors, RAW)
    assert read_plain(file) == {"pytorch-lightning_version": "2.2.0", "epoch": 7}
    for name in ("model_best.pth.tar", "weights.tar"):
        assert_same(read_weights(save(tmp_path / name, EPOCH, state_dict=RAW)).tensors, RAW)


def test_pickled_module_error_says_how_to_export_it(tmp_path):
    module = New(Global("timm.models.vision_transformer", "VisionTransformer"), {"training": False})
    with pytest.raises(
        ValueError, match=r"whole\.pt holds 'model', a timm\..* with PyTorch: torch\.s"
    ):
        read_weights(save(tmp_path / "whole.pt", {"model": module}))


def test_framework_wrappers_are_removed_from_names(tmp_path):
    names = (
        "module._orig_mod.cls_token",
        "module._orig_mod.blocks.0._fsdp_wrapped_module.norm.bias",
    )
    tensors = {name: np.full(2, i, np.float32) for i, name in enumerate(names)}
    torch_files.save(tmp_path / "a.pth", tensors)
    found = read_weights(tmp_path / "a.pth")
    assert sorted(found.tensors) == ["blocks.0.norm.bias", "cls_token"]
    np.testing.assert_array_equal(found.tensors["blocks.0.norm.bias"], [1, 1])
    assert found.notes == (
        "'_orig_mod.' was removed from 2 names",
        "'_fsdp_wrapped_module.' was removed from 1 names",
        "'module.' was removed from 2 names",
    )
    torch_files.save(tmp_path / "b.pth", {"_orig_mod.a": np.ones(2), "a": np.ones(2)})
    with pytest.raises(ValueError, match=r"b\.pth holds tensors both with and without .*_orig_mod"):
        read_weights(tmp_path / "b.pth")

    # Nor do they hide that two dictionaries belong to one network.
    wrapped = {f"module._fsdp_wrapped_module.{name}": x for name, x in RAW.items()}
    file = save(tmp_path / "c.pth", EPOCH, model=wrapped, teacher=RAW)
    with pytest.raises(ValueError, match=r"c\.pth holds weights under 'model' and 'teacher'"):
        read_weights(file)


def test_repeatedly_referenced_dictionary_takes_no_time(tmp_path):
    """Three levels of 2,000 references to one dictionary make 8e9 paths."""
    level = state_dict({"a": np.ones(2, np.float32)}, {})
    memo = torch_files.encode(level) + b"q\x00"
    for number in range(3):
        keys = b"".join(torch_files.encode(f"k{i}") + b"h" + bytes([number]) for i in range(2000))
        memo += b"0}(" + keys + b"uq" + bytes([number + 1])
    path = tmp_path / "many.pth"
    torch_files.write_archive(path, torch_files.Raw(memo), {"0": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"many\.pth holds 'k0', a dict"):
        read_weights(path)


def test_messages_about_many_tensors_stay_short():
    problems = [f"blocks.{i}.norm1.weight (768,) has no place" for i in range(210)]
    problems += [f"odd{'x' * 500}.{i}" for i in range(40)]
    shown = list_problems(problems)
    assert "blocks.*.norm1.weight (768,) has no place (210 times)" in shown
    assert len(shown) < 1500
    few = [f"blocks.{i}.norm1.bias (3,) is missing" for i in range(5)]
    assert list_problems(few) == "".join(f"\n  {line}" for line in few)
    many = [f"{chr(97 + i) * 30} {'y' * 80}" for i in range(26)]
    assert list_problems(many).splitlines()[-1].endswith("more kinds of problem, 26 in all")


def test_account_shows_notes_and_assumptions():
    account = Account(
        (("a", "x/kernel", (2, 3)),),
        notes=("the weights are those under 'model_ema'",),
        assumed=(("heads", "16"), ("eps", "1e-05")),
    )
    lines = format_account(account).splitlines()
    assert lines[-2:] == [
        "note: the weights are those under 'model_ema'",
        "assumed: heads=16, eps=1e-05",
    ]
