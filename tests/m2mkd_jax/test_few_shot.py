"""Few-shot episodes and repeated augmentation: which examples are chosen, and runs with several
episodes."""

import dataclasses
import json
import random
import types

import numpy as np
import pytest
from meshes import one_device
from tiny import OPTIM, fill, tiny_config

from common_jax import checkpoint, inputs
from common_jax.optim import OptimConfig
from m2mkd_jax.commands.evaluate import load_test_images
from m2mkd_jax.config import Config, FewShotConfig, SourcesConfig
from m2mkd_jax.data import digits
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.few_shot import choose_episode, choose_task
from m2mkd_jax.data.samplers import repeated_indices
from m2mkd_jax.data.source import ArraySource
from m2mkd_jax.phases import few_shot
from m2mkd_jax.phases.few_shot import episode_feed, episodes_table, load_splits, summary
from m2mkd_jax.phases.networks import whole_student
from m2mkd_jax.phases.pipeline import run_phase

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 30))


def episode(**settings):
    settings = {"ways": 5, "shots": 4, "seed": 3, "labels_count": 20} | settings
    return choose_episode(LABELS, **settings)


def test_episode_has_shots_of_each_class_with_new_labels():
    chosen = episode()
    assert len(np.unique(chosen.indices)) == 20
    assert len(set(chosen.classes)) == 5
    ranks = {name: rank for rank, name in enumerate(sorted(chosen.classes))}
    np.testing.assert_array_equal(chosen.labels, [ranks[LABELS[i]] for i in chosen.indices])
    np.testing.assert_array_equal(np.bincount(chosen.labels), [4] * 5)
    assert chosen.labels.dtype == np.int32
    assert (np.diff(chosen.labels) != 0).sum() > 4  # shuffled, not grouped by class


def test_episode_depends_on_seed_including_zero():
    for seed in (0, 3):
        first, again = episode(seed=seed), episode(seed=seed)
        assert first.classes == again.classes
        np.testing.assert_array_equal(first.indices, again.indices)
    assert episode(seed=1).classes != episode(seed=2).classes


def test_known_choice():
    # random.Random(1).sample(range(100), 8), which has been stable since Python 3.2.
    labels = np.repeat(np.arange(100), 5)
    chosen = choose_episode(labels, ways=8, shots=5, seed=1, labels_count=100)
    assert chosen.classes == (17, 72, 97, 8, 32, 15, 63, 57)


@pytest.mark.parametrize("seed", [0, 1, 6])
def test_examples_match_numpy_permutations_in_drawn_class_order(seed):
    chosen, draw = episode(seed=seed), np.random.RandomState(seed)
    assert list(chosen.classes) == random.Random(seed).sample(range(20), 5)
    kept = [draw.permutation(np.flatnonzero(name == LABELS))[:4] for name in chosen.classes]
    np.testing.assert_array_equal(chosen.indices, draw.permutation(np.concatenate(kept)))


def test_known_examples_and_labels():
    """These generators' numbers are frozen in Python and numpy. The rows of each class are permuted
    in turn, three of each class are kept, and then all of them are permuted."""
    labels = np.array([2, 0, 1, 3] * 5)
    chosen = choose_episode(labels, ways=2, shots=3, seed=0, labels_count=4)
    assert chosen.classes == (3, 1)
    assert chosen.indices.tolist() == [3, 2, 10, 11, 7, 6]
    assert chosen.labels.tolist() == [1, 0, 0, 1, 1, 0]  # of classes 3 and 1, by rank


def test_classes_and_examples_both_depend_on_seed():
    whole = [episode(ways=20, seed=seed) for seed in (1, 2)]
    assert whole[0].classes != whole[1].classes
    first, second = (set(one.indices.tolist()) for one in whole)
    assert 0 < len(first & second) < 40  # of 80 each; about 11 if chosen independently


def test_more_shots_keep_classes_and_add_examples():
    few, more = episode(shots=4), episode(shots=9)
    assert few.classes == more.classes and set(few.indices) < set(more.indices)
    every = episode(shots=30)  # all there are
    np.testing.assert_array_equal(
        np.sort(every.indices), np.flatnonzero(np.isin(LABELS, every.classes))
    )


def test_eligible_rows_keep_splits_apart():
    split = np.arange(len(LABELS)) % 2 == 0
    train, test = episode(eligible=split), episode(eligible=~split, shots=6)
    assert train.classes == test.classes
    assert split[train.indices].all() and not split[test.indices].any()
    with pytest.raises(ValueError, match=r"shots=25, .* has 9 images in the training split; low"):
        episode(eligible=split, shots=25)


def test_task_validates_on_test_split_by_default():
    settings = {"ways": 5, "shots": 4, "validation_shots": 6, "seed": 3, "labels_count": 20}
    test_labels = LABELS[::-1].copy()
    train, validation = choose_task(LABELS, test_labels, **settings)
    assert train.classes == validation.classes
    assert (len(train.indices), len(validation.indices)) == (20, 30)
    classes = np.sort(validation.classes)
    np.testing.assert_array_equal(classes[train.labels], LABELS[train.indices])
    np.testing.assert_array_equal(classes[validation.labels], test_labels[validation.indices])
    assert np.bincount(train.labels).tolist() == [4] * 5
    assert np.bincount(validation.labels).tolist() == [6] * 5
    train, validation = choose_task(LABELS, test_labels, validate_on_train=True, **settings)
    np.testing.assert_array_equal(classes[validation.labels], LABELS[validation.indices])
    assert set(train.indices) < set(validation.indices) and len(validation.indices) == 30


@pytest.mark.parametrize("test_on_train", [False, True])
def test_episode_feed_has_requested_number_of_images(tmp_path, test_on_train):
    asked = FewShotConfig(ways=3, shots=2, test_shots=5, seed=4, test_on_train=test_on_train)
    config = Config(phase="few_shot", few_shot=asked, optim=OptimConfig(batch=6))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=10))
    sources = load_splits(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=3))
    feed = episode_feed(config, sources, workdir=tmp_path)
    assert feed.steps_per_epoch == 1 and len(feed.label_names) == 3
    assert feed.label_names == tuple(sorted(feed.label_names))
    batch = next(feed.batches(0))
    held_out = [
        (image, label)
        for one in feed.evaluation()
        for image, label, real in zip(one["image"], one["label"], one["_mask"], strict=True)
        if real
    ]
    assert np.bincount(batch["label"]).tolist() == [2] * 3
    assert np.bincount([label for _, label in held_out]).tolist() == [5] * 3
    trained = list(zip(batch["image"], batch["label"], strict=True))
    splits = ((trained, "train"), (held_out, "train" if test_on_train else "test"))
    for examples, split in splits:
        images, labels = digits.load_split(split)
        known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        for image, label in examples:
            assert digits.NAMES[known[image.tobytes()]] == feed.label_names[label]
    shared = {image.tobytes() for image, _ in trained} & {image.tobytes() for image, _ in held_out}
    assert len(shared) == (6 if test_on_train else 0)


def test_impossible_episodes_name_the_key():
    with pytest.raises(ValueError, match=r"config\.few_shot\.ways=21 .* 20"):
        episode(ways=21)
    with pytest.raises(
        ValueError, match=r"^config\.few_shot\.shots=31, .* has 30 images in the train"
    ):
        episode(shots=31)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 3}, r"\.shots=3, but class cat, .*seed=5 draws, has 2 images in the training s"),
        (
            {"validation_shots": 2},
            r"\.test_shots=2, but class ant, .* has 1 images in the test spl",
        ),
        (
            {"validation_shots": 3, "validate_on_train": True},
            r"\.test_shots=3, but class cat, .* has 2 images in the training split; lower config\."
            r"few_shot\.test_shots",
        ),
    ],
)
def test_class_and_split_with_too_few_images_are_named(settings, message):
    train, test = np.array([0, 0, 0, 1, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 2, 2])
    task = {"ways": 3, "shots": 2, "validation_shots": 1, "seed": 5, "labels_count": 3}
    choose_task(train, test, **task, names=("ant", "bee", "cat"))
    with pytest.raises(ValueError, match=message):
        choose_task(train, test, **task | settings, names=("ant", "bee", "cat"))


@pytest.mark.parametrize(("count", "world"), [(600, 4), (513, 3), (256, 1)])
def test_repeated_images_go_to_neighbouring_ranks(count, world):
    permutation = np.random.default_rng(1).permutation(count)
    ranks = [repeated_indices(permutation, rank=rank, world=world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {count // 256 * 256 // world}
    order = np.stack(ranks, axis=1).ravel()
    np.testing.assert_array_equal(order, np.repeat(permutation, 3)[: len(order)])


def test_repeated_indices_by_hand():
    settings = {"repeats": 2, "rounding": 4, "world": 2}
    order = np.array([5, 3, 8, 0, 9, 1, 2, 4, 6, 7, 10])  # 8 of these samples are kept: 4 for each
    for rank in range(2):
        assert repeated_indices(order, rank=rank, **settings).tolist() == [5, 3, 8, 0]
    settings["world"] = 3  # 8 // 3 for each; ranks 0 to 2 take turns at 5 5 3 3 8 8
    found = [repeated_indices(order, rank=rank, **settings).tolist() for rank in range(3)]
    assert found == [[5, 3], [5, 8], [3, 8]]


def test_repeated_indices_of_small_sets_and_invalid_ranks():
    assert len(repeated_indices(np.arange(255), rank=0, world=1)) == 0
    with pytest.raises(ValueError, match="rank=2"):
        repeated_indices(np.arange(300), rank=2, world=2)


@pytest.mark.parametrize("world", [1, 4, 8])
def test_repeated_batches_combine_those_of_original_processes(world):
    places = np.arange(600)
    source = ArraySource({"image": places, "label": places}, ())
    batches = inputs.train_batches(source, transform=None, seed=2, batch=64, repeats=3)
    order = inputs.epoch_permutation(2, 0, 600)
    ranks = [repeated_indices(order, rank=rank, world=world) for rank in range(world)]
    for step in range(512 // 64):
        share = slice(step * 64 // world, (step + 1) * 64 // world)
        together = np.stack([rank[share] for rank in ranks], axis=1).ravel()
        np.testing.assert_array_equal(next(batches)["image"], together)


@pytest.mark.parametrize("key", ["ways", "shots", "test_shots", "episodes"])
def test_zero_is_refused_for_counts(key):
    with pytest.raises(ValueError, match=rf"^{key}=0 must be at least 1"):
        FewShotConfig(**{key: 0})


def test_summary_has_mean_and_student_t_interval():
    found = [
        {"phase": "few_shot", "steps": 5, "skipped": 1, "test/accuracy": accuracy}
        for accuracy in (0.5, 0.6, 0.7, 0.4)
    ]
    merged = summary(found)
    assert (merged["steps"], merged["skipped"], merged["episodes"]) == (5, 4, 4)
    assert merged["phase"] == "few_shot"
    assert merged["test/accuracy"] == pytest.approx(0.55)
    # t with 3 degrees of freedom, from a table; s = sqrt(0.05 / 3).
    half = 3.182446 * np.sqrt(0.05 / 3) / 2
    assert merged["test/accuracy_ci95"] == pytest.approx(half, rel=1e-6)


def test_summary_averages_every_test_metric():
    found = [
        {
            "phase": "few_shot",
            "steps": 5,
            "skipped": n,
            "test/accuracy": 0.5 + n / 10,
            "test/loss": n,
        }
        for n in (1, 2)
    ]
    merged = summary(found)
    assert list(merged) == [
        *("phase", "steps", "skipped", "episodes"),
        *("test/accuracy", "test/accuracy_ci95", "test/loss", "test/loss_ci95"),
    ]
    assert merged["skipped"] == 3
    # t with 1 degree of freedom is 12.7062, and s = 1 / sqrt(2).
    assert merged["test/loss"] == 1.5
    assert merged["test/loss_ci95"] == pytest.approx(12.7062 / 2, rel=1e-5)
    assert merged["test/accuracy_ci95"] == pytest.approx(1.27062 / 2, rel=1e-5)


def test_episodes_table_by_hand(tmp_path):
    merged = {"episodes": 2, "test/accuracy": 0.5, "test/accuracy_ci95": 0.1234}
    merged |= {"test/loss": 1.25, "test/loss_ci95": 0.0456}
    (tmp_path / "result.json").write_text(json.dumps(merged))
    for number, (accuracy, loss) in enumerate(((0.4567, 1.2345), (0.5433, 1.2655))):
        folder = tmp_path / f"episode_{number}"
        folder.mkdir()
        one = {"test/accuracy": accuracy, "test/loss": loss}
        (folder / "result.json").write_text(json.dumps(one))
        (folder / "config.json").write_text(json.dumps({"few_shot": {"seed": 7 + number}}))
    table = episodes_table(tmp_path)
    assert table.header == ("episode", "seed", "test accuracy", "test loss")
    assert table.rows == (
        ("0", "7", "45.7 %", "1.234"),
        ("1", "8", "54.3 %", "1.266"),
        ("mean, 95 % interval", "", "50.0 ± 12.3 %", "1.250 ± 0.046"),
    )
    assert episodes_table(tmp_path / "nowhere") is None


def config_of(**episode):
    settings = {"ways": 4, "shots": 2, "test_shots": 3, "seed": 5} | episode
    return dataclasses.replace(
        tiny_config("few_shot", optim=dataclasses.replace(OPTIM, batch=8)),
        augment=AugmentConfig(),
        few_shot=FewShotConfig(**settings),
    )


def examples(feed):
    """Training and test examples in an episode's feed: (image bytes, label) each."""
    (batch,) = [next(feed.batches(0))]
    train = zip(batch["image"], batch["label"], strict=True)
    test = [
        pair
        for batch in feed.evaluation()
        for pair in zip(batch["image"], batch["label"], batch["_mask"], strict=True)
    ]
    return (
        [(image.tobytes(), int(label)) for image, label in train],
        [(image.tobytes(), int(label)) for image, label, mask in test if mask],
    )


def digits_of(split):
    """The class of every image in a split, by its bytes."""
    images, labels = digits.load_split(split)
    return {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize("on_train", [False, True])
def test_episode_trains_on_shots_and_tests_on_test_shots(on_train, tmp_path):
    config = config_of(test_on_train=on_train)
    training = few_shot.describe(config, one_device())
    feed = few_shot.episode_feed(training.config, few_shot.load_splits(config), workdir=tmp_path)
    classes = sorted(random.Random(5).sample(range(10), 4))
    assert feed.label_names == tuple(str(name) for name in classes)
    train, test = examples(feed)
    of_train, of_test = digits_of("train"), digits_of("train" if on_train else "test")
    for found, known, shots in ((train, of_train, 2), (test, of_test, 3)):
        np.testing.assert_array_equal(np.bincount([label for _, label in found]), [shots] * 4)
        assert len({image for image, _ in found}) == len(found) == 4 * shots
        assert all(known[image] == classes[label] for image, label in found)
    assert (set(train) <= set(test)) == on_train


@pytest.mark.parametrize("on_train", [False, True])
def test_evaluate_scores_the_images_that_the_episode_drew(on_train, tmp_path):
    config = few_shot.describe(config_of(test_on_train=on_train), one_device()).config
    splits = few_shot.load_splits(config_of())
    _, drawn = examples(few_shot.episode_feed(config, splits, workdir=tmp_path))
    names = tuple(str(name) for name in sorted(random.Random(5).sample(range(10), 4)))
    trained = types.SimpleNamespace(config=config, classes=names)
    found = load_test_images(trained, own=True)
    assert found.data.test_split == ("train" if on_train else "test")
    rows = [found.source[i] for i in range(len(found.source))]
    assert sorted((row["image"].tobytes(), int(row["label"])) for row in rows) == sorted(drawn)
    # Of another set: every image of these classes.
    whole = load_test_images(trained, own=False).source
    counts = [[*digits_of("test").values()].count(int(name)) for name in names]
    np.testing.assert_array_equal(np.bincount(whole.labels), counts)
    trained.classes = names[::-1]
    with pytest.raises(ValueError, match="no longer has the classes that the episode was drawn"):
        load_test_images(trained, own=True)


def test_episode_seed_sets_examples_and_run_seed_their_order(tmp_path):
    def draw(seed, draw_seed):
        config = dataclasses.replace(config_of(seed=draw_seed), seed=seed)
        one = few_shot.describe(config, one_device()).config
        feed = few_shot.episode_feed(one, few_shot.load_splits(config), workdir=tmp_path)
        return examples(feed)[0]

    first, again, other, drawn = draw(0, 5), draw(0, 5), draw(1, 5), draw(0, 6)
    assert first == again
    assert first != other and sorted(first) == sorted(other)
    assert {image for image, _ in first} != {image for image, _ in drawn}


def test_first_feed_draws_every_episode_and_returns_the_first(monkeypatch, tmp_path):
    config = config_of(episodes=3)
    drawn, choose = [], few_shot.choose_task

    def spy(*arguments, seed, **settings):
        drawn.append(seed)
        return choose(*arguments, seed=seed, **settings)

    monkeypatch.setattr(few_shot, "choose_task", spy)
    training = few_shot.describe(config, one_device())
    feed = few_shot.first_feed(training, tmp_path, few_shot.load_splits(config))
    assert sorted(drawn) == [5, 6, 7]
    classes = sorted(random.Random(5).sample(range(10), 4))
    assert feed.label_names == tuple(str(name) for name in classes)
    assert training.config.data.labels == 4 and not list(tmp_path.iterdir())


def test_episodes_compile_once_and_are_not_rerun(tmp_path, monkeypatch):
    config = tiny_config("few_shot", optim=dataclasses.replace(OPTIM, batch=8, steps=2))
    episodes = FewShotConfig(ways=4, shots=2, test_shots=3, seed=5, episodes=2)
    config = dataclasses.replace(
        config,
        augment=AugmentConfig(),  # mixing is slow to compile
        few_shot=episodes,
        sources=SourcesConfig(network=str(tmp_path / "network")),
    )
    params = {"student": fill(whole_student(config).init)}
    checkpoint.write_params(tmp_path / "network", params, config={})
    mesh = one_device()
    given, train_phase = [], few_shot.train_phase

    def spy(*args, programs, **settings):
        given.append(programs)
        return train_phase(*args, programs=programs, **settings)

    monkeypatch.setattr(few_shot, "train_phase", spy)
    result = run_phase(config, tmp_path / "run", mesh)
    assert len(given) == 2 and given[0] is given[1]
    compiled = {name: program._cache_size() for name, program in given[0].kept.items()}
    assert compiled == {"step": 1, "create": 1, "evaluate": 1}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    folders = [tmp_path / "run" / f"episode_{number}" for number in range(2)]
    singles = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert result == summary(singles) and result["episodes"] == 2
    seeds = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert [one["few_shot"]["seed"] for one in seeds] == [5, 6]
    table = episodes_table(tmp_path / "run")
    assert [row[:2] for row in table.rows[:2]] == [("0", "5"), ("1", "6")]
    assert "±" in table.rows[2][2] and episodes_table(folders[0]) is None

    (folders[1] / "result.json").unlink()  # as if it had been killed at the very end
    before = [(folder / "metrics.jsonl").read_bytes() for folder in folders]
    assert run_phase(config, tmp_path / "run", mesh) == result
    assert [(folder / "metrics.jsonl").read_bytes() for folder in folders] == before
    assert given[-1].kept["step"]._cache_size() == 0
    with pytest.raises(ValueError, match=r"(?s)another config.*few_shot\.episodes: 2 -> 4"):
        other = dataclasses.replace(episodes, episodes=4)
        run_phase(dataclasses.replace(config, few_shot=other), tmp_path / "run", mesh)
