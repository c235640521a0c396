"""Stage "clip": its loss by hand, its random draws, and the initial weights of its towers."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from changed import changed
from etils import epath
from flax import linen as nn
from jax import numpy as jnp
from meshes import one_device
from tiny import fill
from tiny_cliptrans import TEST, read_split, tiny_config

from cliptrans_jax.contrastive.objective import at_most
from cliptrans_jax.contrastive.table import CONTRASTIVE
from cliptrans_jax.data.pictures import prepare_picture
from cliptrans_jax.evaluators import retrieval
from cliptrans_jax.runs import contrastive, text_side
from cliptrans_jax.runs.run_tokenizer import train_tokenizer
from cliptrans_jax.towers.table import tower_of
from common_jax import hosts
from common_jax.commands.plan.steps import lower_step
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.optim import OptimConfig, decay_mask

PAD, LENGTH = 1, 8
MASK = np.array([1, 1, 1, 0], np.float32)


def config_of(*, root=None, dropout=0.5, **changes):
    config = tiny_config("clip", root)
    text = dataclasses.replace(config.clip.text, dropout=dropout)
    clip = dataclasses.replace(config.clip, text=text, scale=3.0)
    return dataclasses.replace(config, clip=clip, **changes)


class Keyed(nn.Module):
    """A tower whose parameter is the key that it is initialised with."""

    config: object
    dtype: object

    @nn.compact
    def __call__(self, *arrays):
        self.param("key", jax.random.key_data)


@pytest.mark.parametrize("loss", CONTRASTIVE)
def test_learned_scalars_do_not_decay(loss):
    learned = CONTRASTIVE[loss].init(3.0)
    decays = decay_mask({"clip": learned}, OptimConfig.no_decay)["clip"]
    assert decays == dict.fromkeys(learned, False)


def test_initial_scale_is_configured_and_towers_have_separate_keys(monkeypatch):
    def keyed(config):
        return dataclasses.replace(tower_of(config), network=Keyed)

    for module in (contrastive, text_side):
        monkeypatch.setattr(module, "tower_of", keyed)
    drawn = [contrastive.init(config_of(), jax.random.key(seed))["clip"] for seed in (0, 1)]
    for towers in drawn:
        assert set(towers) == {"text", "image", "log_scale"}
        assert float(towers["log_scale"]) == pytest.approx(math.log(3.0), rel=1e-6)
    keys = {tuple(towers[name]["key"].tolist()) for towers in drawn for name in ("text", "image")}
    assert len(keys) == 4


def cross_entropy(scores):
    return np.mean(np.log(np.exp(scores).sum(axis=1)) - np.diag(scores))


@pytest.mark.parametrize(("log_scale", "scale"), [(1.5, math.exp(1.5)), (9.0, 100.0)])
def test_loss_covers_both_directions_and_bounds_the_scale(monkeypatch, log_scale, scale):
    texts, images = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    asked = []

    def embed(config, params, batch, dropout):
        asked.append(dropout)
        return jnp.asarray(texts), jnp.asarray(images)

    monkeypatch.setattr(contrastive, "_embed", embed)
    params, rngs = {"clip": {"log_scale": jnp.float32(log_scale)}}, {"dropout": "the key"}
    found, metrics = contrastive._loss(config_of(), params, {}, {}, rngs, 0)
    texts, images = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, images))
    scores = scale * (texts @ images.T).astype(np.float64)
    wanted = (cross_entropy(scores) + cross_entropy(scores.T)) / 2
    assert float(found) == pytest.approx(wanted, rel=1e-4)
    assert float(metrics["scale"]) == pytest.approx(scale, rel=1e-5)
    assert asked == ["the key"]


def test_scale_beyond_its_bound_can_only_decrease():
    slope = jax.grad(lambda x, weight: weight * at_most(x, 4.6))
    for x, weight, expected in (
        *((4.5, weight, weight) for weight in (-2.0, 2.0)),
        (4.7, 2.0, 2.0),  # a step lowers it
        (4.7, -2.0, 0.0),  # a step would raise it further
    ):
        x = jnp.float32(x)
        assert float(at_most(x, 4.6)) == pytest.approx(min(float(x), 4.6))
        assert float(slope(x, weight)) == expected


def test_contrastive_batch_cannot_be_accumulated(corpus, tmp_path):
    config = config_of(root=corpus)
    optim = dataclasses.replace(config.optim, accumulate=2)
    config = dataclasses.replace(config, optim=optim)
    with pytest.raises(ValueError, match=r"^config\.optim\.accumulate=2: stage 'clip' contrasts"):
        contrastive.run(config, epath.Path(tmp_path), one_device())
    with pytest.raises(ValueError, match=r"^config\.recipes\.clip\.optim\.accumulate=2: "):
        contrastive.check(config, epath.Path(tmp_path), one_device(), key="config.recipes.clip")


def test_batch_of_one_pair_is_refused_where_nothing_would_be_learned(corpus, tmp_path):
    config = changed("optim.batch", 1, tiny_config("clip", corpus))
    said = r"^config\.recipes\.clip\.optim\.batch=1: config\.clip\.loss='softmax' contrasts"
    with pytest.raises(ValueError, match=said):
        contrastive.check(config, epath.Path(tmp_path), one_device(), key="config.recipes.clip")
    sigmoid = changed("clip.loss", "sigmoid", config)
    contrastive.check(sigmoid, epath.Path(tmp_path), one_device(), key="config")


def test_no_device_gathers_the_whole_batch_of_embeddings(capfd):
    config = config_of()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch=16))
    task = contrastive.describe(config, steps=3, length=LENGTH)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    lower_step(task, config.optim, mesh, log_every=1)[0].compile()
    # XLA warns of "involuntary full rematerialization".
    assert "rematerialization" not in capfd.readouterr().err


def test_hosts_must_have_the_same_pairs(corpus, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(hosts, "require_same", lambda name, *parts: compared.append((name, parts)))
    contrastive._load(config_of(root=corpus), epath.Path(tmp_path), one_device())
    assert [name for name, _ in compared] == ["multi30k train", "multi30k val"]
    assert all(len(parts) > 2 for _, parts in compared)


def test_text_tower_ignores_pads_and_needs_a_key_for_dropout():
    config = config_of()
    params = fill(functools.partial(contrastive.init, config))
    ids = np.full((2, LENGTH), PAD, np.int32)
    ids[0, :3], ids[1, :5] = [0, 7, 2], [0, 9, 8, 7, 2]
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)

    @jax.jit
    def embed(ids, key):
        return contrastive._embed(config, params, {"ids": ids, "image": images}, key)[0]

    plain, longer = (embed(x, None) for x in (ids[:, :5], ids))
    np.testing.assert_allclose(plain, longer, rtol=1e-4, atol=1e-6)
    first, same, other = (embed(ids, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    for one in (other, longer):
        assert np.abs(np.asarray(first - one)).max() > 1e-4


def example(languages=3):
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    ids = [np.array([0, 40 + code, 2], np.int32) for code in range(languages)]
    return {"image": picture, "names": ids}


def test_training_samples_a_language_and_augments_the_image():
    config = config_of()
    found = [
        contrastive._augment(config, LENGTH, example(), np.random.default_rng(seed))
        for seed in range(90)
    ]
    codes = [int(one["ids"][1]) - 40 for one in found]
    assert all(codes.count(code) > 15 for code in range(3)) and set(codes) == {0, 1, 2}
    assert len({one["image"].tobytes() for one in found}) == 90
    assert {one["ids"].shape for one in found} == {(LENGTH,)}
    # The picture does not show which language was drawn.
    bright = np.array([one["image"].mean() for one in found])
    assert abs(np.corrcoef(bright, codes)[0, 1]) < 0.4


def test_validation_uses_the_first_language_and_the_plain_image():
    one, config = example(), config_of()
    found = contrastive._prepare(config, LENGTH, one)
    assert found["ids"].tolist() == [0, 40, 2, *[PAD] * (LENGTH - 3)]
    np.testing.assert_array_equal(found["image"], prepare_picture(one["image"], 16))


def test_pairs_are_images_with_names_in_known_languages(corpus, tmp_path):
    config = config_of(root=corpus, languages=("de", "en"))
    tokenizer, _ = train_tokenizer(config, epath.Path(tmp_path))
    pairs = contrastive._Pairs.of(config, "val", tokenizer)
    english, german, pictures = read_split(corpus, "val")
    assert len(pairs) == 6
    for index in range(6):
        one = pairs[index]
        assert [tokenizer.decode(ids) for ids in one["names"]] == [german[index], english[index]]
        assert {int(ids[0]) for ids in one["names"]} == {0}  # no language code
        np.testing.assert_array_equal(one["image"], pictures[index])
    assert pairs.longest == max(len(ids) for names in pairs.names.values() for ids in names)


def test_run_trains_on_one_split_and_validates_on_another(corpus, tmp_path, monkeypatch):
    seen = {"evaluated": []}

    def reader(name):
        def read(source, **settings):
            seen[name] = (source.corpus.name, settings)
            if name == "valid":
                seen["evaluated"].append((source.corpus.name, settings["batch"]))

        return read

    def train(task, run, optim, **settings):
        seen.update(task=task, run=run, **settings)
        return {"steps": 6}

    def embed(config, params, batch, dropout):
        seen["dropout"] = dropout
        return jnp.eye(4), jnp.eye(4)

    def evaluator(sums, batches, **more):
        batches()
        seen["more"] = more
        seen.setdefault("programs", []).append(more["programs"])
        batch, key = {"_mask": jnp.asarray(MASK)}, jax.random.key(0)
        return lambda params, helpers, step: {
            "count": float(sums(params, helpers, batch, key)["count"])
        }

    monkeypatch.setattr(contrastive, "_embed", embed)
    monkeypatch.setattr(contrastive.loop, "train", train)
    monkeypatch.setattr(contrastive, "train_batches", reader("train"))
    monkeypatch.setattr(contrastive, "eval_batches", reader("valid"))
    monkeypatch.setattr(retrieval, "make_evaluator", evaluator)
    config = config_of(root=corpus, seed=7)
    data = dataclasses.replace(config.data, further_tests=(TEST,))
    config = dataclasses.replace(config, data=data)
    assert contrastive.run(config, epath.Path(tmp_path / "run"), one_device()) == {"steps": 6}
    task = seen["task"]
    task.batches(5)
    name, settings = seen["train"]
    assert name == "multi30k train"
    assert (settings["seed"], settings["batch"], settings["start_step"]) == (7, 8, 5)
    assert task.evaluators["val"]({}, {}, 3) == {"count": 3}
    assert seen["evaluated"] == [("multi30k val", 6), (f"multi30k {TEST}", 5)]
    assert seen["more"]["seed"] == 7
    assert seen["dropout"] is None  # no dropout in evaluation
    assert task.evaluators[f"test_{TEST}"]({}, {}, 3) == {"count": 3}
    assert seen["programs"][0] is seen["programs"][1]  # compiled once for both sets
    assert f"test_{TEST}/accuracy" in task.shown
    assert (task.steps_per_epoch, seen["seed"], seen["run"].best) == (3, 7, None)
    assert task.batch["image"].shape == (8, 16, 16, 3)
    transform = seen["valid"][1]["transform"]
    assert transform(example())["ids"][1] == 40  # the first language
