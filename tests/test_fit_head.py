"""Fitting a classifier of digits to a ViT that has none, at the digits' image size."""

import dataclasses
import json
import re

import fit_head
import jax
import numpy as np
import pytest
from PIL import Image
from weight_files import deit

from common_jax.config import freeze
from common_jax.weights import read_tensors, write_tensors
from m2mkd_jax import pretrained
from m2mkd_jax.config import Config
from m2mkd_jax.data import digits
from m2mkd_jax.data.augment import normalise
from m2mkd_jax.data.sources import DataConfig, load_source
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.phases.networks import whole_network

CONFIG = "configs/m2mkd/digits.py"
IMAGES = {"mean": [0.4], "std": [0.3]}


@pytest.fixture
def folder(tmp_path):
    """A DeiT-Tiny with two blocks and random weights, for grey images of 32 pixels."""
    tensors = {name: 0.05 * x for name, x in deit().items() if not name.startswith("head")}
    tensors[fit_head.KERNEL] = tensors[fit_head.KERNEL][:, :1]
    about = {"architecture": "deit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": IMAGES}
    fit_head.write(tmp_path / "vit", tensors, about)
    return tmp_path / "vit"


def test_vit_with_a_fitted_head_is_read_as_a_teacher(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit_head, "STRENGTHS", (1e-2,))  # quick to fit
    out, few = tmp_path / "out", "--config.data.per_class=30"
    fit_head.main([str(folder), str(out), "--patch=4", f"--config={CONFIG}", few])
    said = float(re.search(r"test images: ([\d.]+)%", capsys.readouterr().out)[1])
    assert json.loads((out / "config.json").read_text())["num_classes"] == 10
    source = fit_head.read(out)
    config = pretrained.infer_config(source).config
    assert (config.data.image_size, config.data.labels, config.teacher.patch) == (8, 10, 4)
    images = freeze(Config, fit_head.read_config_file(CONFIG)).data
    assert (config.data.mean, config.data.std) == (images.mean, images.std) != ((0.4,), (0.3,))
    params = pretrained.load(source, config).params["teacher"]
    images, labels = digits.load_split("test")
    images = normalise(images, mean=config.data.mean, std=config.data.std)
    logits, _ = jax.jit(whole_network(config, "teacher").apply)(params, images)
    right = 100 * np.mean(np.argmax(logits, axis=1) == labels)
    assert right == pytest.approx(said, abs=0.06) and right > 50  # chance is 10


def test_resized_kernel_matches_the_old_one_on_enlarged_patches():
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(5, 3, 14, 14)), rng.normal(size=(3, 8, 8))
    table = np.concatenate([np.full((1, 1, 5), 7.0), np.full((1, 37**2, 5), 2.0)], axis=1)
    tensors = {fit_head.KERNEL: kernel, fit_head.POSITIONS: table, "other": table}
    small = fit_head.resize(tensors, ViTConfig(patch=14), 8, 32)
    enlarged = np.asarray(jax.image.resize(patch, (3, 14, 14), "cubic"))
    seen = np.einsum("dxij,xij->d", small[fit_head.KERNEL], patch)
    np.testing.assert_allclose(seen, np.einsum("dxij,xij->d", kernel, enlarged), rtol=1e-4)
    assert small[fit_head.POSITIONS].shape == (1, 17, 5)
    np.testing.assert_allclose(small[fit_head.POSITIONS][0, :, 0], [7, *[2] * 16], rtol=1e-5)
    assert small["other"] is table
    same = fit_head.resize(tensors, ViTConfig(patch=14), 14, 14 * 37)
    np.testing.assert_allclose(same[fit_head.KERNEL], kernel, rtol=1e-5)
    np.testing.assert_allclose(same[fit_head.POSITIONS], table, rtol=1e-5)


def test_renormalise_compensates_for_new_mean_and_std():
    rng = np.random.default_rng(0)
    kernel, bias, pixels = (rng.uniform(size=shape) for shape in ((5, 3, 4, 4), (5,), (1, 4, 4, 3)))
    tensors = {fit_head.KERNEL: kernel, fit_head.BIAS: bias}
    old = DataConfig(channels=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    new = DataConfig(channels=3, mean=(0.6, 0.5, 0.4), std=(0.3, 0.2, 0.1))

    def embed(tensors, data):
        images = normalise(255 * pixels, mean=data.mean, std=data.std)
        return np.einsum("dxij,bijx->bd", tensors[fit_head.KERNEL], images) + tensors[fit_head.BIAS]

    changed = fit_head.renormalise(tensors, old, new)
    np.testing.assert_allclose(embed(changed, new), embed(tensors, old), rtol=1e-5)
    assert not np.allclose(embed(tensors, new), embed(tensors, old), rtol=0.1)


def test_unreadable_images_are_left_out_up_to_bad_share(folder, tmp_path):
    for number in range(10):
        path = tmp_path / "set/train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), number).save(path)
    path.write_bytes(b"")
    settings = {"source": "folder", "path": str(tmp_path / "set"), "image_size": 32, "labels": 2}
    data = DataConfig(**settings, bad_share=0.1, mean=(0.4,), std=(0.3,))
    head = {"head.weight": np.zeros((2, 192), np.float32), "head.bias": np.zeros(2, np.float32)}
    weights = folder / "model.safetensors"
    write_tensors(weights, read_tensors(weights) | head, replace=True)
    assert len(fit_head.run(folder, data, load_source(data, "train"))[1]) == 9
    data = dataclasses.replace(data, bad_share=0.0)
    with pytest.raises(ValueError, match=r"1 bad examples of 10.* raise config\.data\.bad_share"):
        fit_head.run(folder, data, load_source(data, "train"))


def test_fit_holds_out_both_views_and_gives_two_classes_two_logits(monkeypatch):
    sizes = []
    train = fit_head.LogisticRegression.fit

    def fit(model, features, labels):
        sizes.append(len({tuple(row) for row in features.round(6)}))
        return train(model, features, labels)

    monkeypatch.setattr(fit_head.LogisticRegression, "fit", fit)
    labels = np.arange(20) % 2
    images = np.random.default_rng(0).normal(size=(20, 3)) + 9 * labels[:, None]
    views = np.stack([images, images])
    kernel, bias = fit_head.fit(views, labels)
    assert sizes == [16] * len(fit_head.STRENGTHS) + [20]
    assert (kernel.shape, bias.shape) == ((2, 3), (2,))
    assert fit_head.accuracy((kernel, bias), views, labels) == 1


def test_invalid_requests_are_refused(folder, tmp_path, capsys):
    flags = [str(folder), str(tmp_path / "out"), f"--config={CONFIG}"]
    for change, error in (
        (["--patch=0"], r"argument --patch: '0' must be a whole number from 1"),
        (["--patch=3"], r"--patch=3 must divide config.data.image_size=8"),
        (["--config.data.image=8"], "image"),
        (["--config.seed"], "--config.seed lacks a value; write --config.seed=VALUE"),
    ):
        with pytest.raises(SystemExit):
            fit_head.main([*flags, *change])
        assert error in capsys.readouterr().err
    config = freeze(Config, fit_head.read_config_file(CONFIG)).data
    with pytest.raises(FileExistsError, match="give another OUT"):
        fit_head.add_head(folder, folder, config, 4)
    with pytest.raises(NotADirectoryError, match=r"^OUT='.*' cannot be made a folder"):
        fit_head.add_head(folder, folder / "config.json" / "out", config, 4)
    tensors = read_tensors(folder / "model.safetensors")
    bias = tensors.pop(fit_head.BIAS)
    write_tensors(folder / "model.safetensors", tensors, replace=True)
    with pytest.raises(ValueError, match=r"has no patch_embed\.proj\.bias"):
        fit_head.add_head(folder, tmp_path / "out", config, 4)
    tensors |= {fit_head.BIAS: bias, "head.weight": np.zeros((10, 192), np.float32)}
    write_tensors(folder / "model.safetensors", tensors, replace=True)
    with pytest.raises(ValueError, match=r"already has head\.weight"):
        fit_head.add_head(folder, tmp_path / "out", config, 4)
    assert not (tmp_path / "out").exists()
