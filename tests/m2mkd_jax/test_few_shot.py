"""Few-shot episodes and repeated augmentation: which examples are chosen, and runs of several
episodes."""

import dataclasses
import json

import numpy as np
import pytest
from meshes import one_device
from tiny import OPTIM, fill, tiny_config, unoptimised

from common_jax import checkpoint, inputs
from m2mkd_jax.config import FewShotConfig, SourcesConfig
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.few_shot import choose_episode, choose_task
from m2mkd_jax.data.samplers import repeated_indices
from m2mkd_jax.data.sources import ArraySource
from m2mkd_jax.phases import few_shot
from m2mkd_jax.phases.families import whole_student
from m2mkd_jax.phases.few_shot import episodes_table, summary
from m2mkd_jax.phases.pipeline import run_phase

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 30))


def episode(**settings):
    settings = {"ways": 5, "shots": 4, "seed": 3, "labels_count": 20} | settings
    return choose_episode(LABELS, **settings)


def test_an_episode_holds_shots_of_each_class_under_new_labels():
    chosen = episode()
    assert len(np.unique(chosen.indices)) == 20
    assert len(set(chosen.classes)) == 5
    ranks = {name: rank for rank, name in enumerate(sorted(chosen.classes))}
    np.testing.assert_array_equal(chosen.labels, [ranks[LABELS[i]] for i in chosen.indices])
    np.testing.assert_array_equal(np.bincount(chosen.labels), [4] * 5)
    assert chosen.labels.dtype == np.int32
    assert (np.diff(chosen.labels) != 0).sum() > 4  # shuffled, not class by class


def test_seeds_choose_and_zero_is_a_seed():
    for seed in (0, 3):
        first, again = episode(seed=seed), episode(seed=seed)
        assert first.classes == again.classes
        np.testing.assert_array_equal(first.indices, again.indices)
    assert episode(seed=1).classes != episode(seed=2).classes


def test_known_choice():
    # random.Random(1).sample(range(100), 8), which python has kept since 3.2.
    labels = np.repeat(np.arange(100), 5)
    chosen = choose_episode(labels, ways=8, shots=5, seed=1, labels_count=100)
    assert chosen.classes == (17, 72, 97, 8, 32, 15, 63, 57)


def test_eligible_rows_keep_splits_apart():
    split = np.arange(len(LABELS)) % 2 == 0
    train, test = episode(eligible=split), episode(eligible=~split, shots=6)
    assert train.classes == test.classes
    assert split[train.indices].all() and not split[test.indices].any()


def test_a_task_validates_on_the_test_split_unless_told():
    settings = {"ways": 5, "shots": 4, "validation_shots": 6, "seed": 3, "labels_count": 20}
    test_labels = LABELS[::-1].copy()
    train, validation = choose_task(LABELS, test_labels, **settings)
    assert train.classes == validation.classes
    classes = np.sort(validation.classes)
    np.testing.assert_array_equal(classes[validation.labels], test_labels[validation.indices])
    train, validation = choose_task(LABELS, test_labels, validate_on_train=True, **settings)
    assert set(train.indices) <= set(validation.indices)


def test_impossible_episodes_name_the_key():
    with pytest.raises(ValueError, match=r"config\.few_shot\.ways=21 .* 20"):
        episode(ways=21)
    with pytest.raises(ValueError, match=r"has 30 examples, but 31.*config\.few_shot\.shots"):
        episode(shots=31)


@pytest.mark.parametrize(("count", "world"), [(600, 4), (513, 3), (256, 1)])
def test_copies_of_an_image_land_on_neighbours(count, world):
    permutation = np.random.default_rng(1).permutation(count)
    ranks = [repeated_indices(permutation, rank=rank, world=world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {count // 256 * 256 // world}
    order = np.stack(ranks, axis=1).ravel()
    np.testing.assert_array_equal(order, np.repeat(permutation, 3)[: len(order)])


def test_small_sets_are_empty_and_ranks_are_checked():
    assert len(repeated_indices(np.arange(255), rank=0, world=1)) == 0
    with pytest.raises(ValueError, match="rank=2"):
        repeated_indices(np.arange(300), rank=2, world=2)


@pytest.mark.parametrize("world", [1, 4, 8])
def test_batches_are_what_the_original_s_processes_see_together(world):
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
def test_a_wrong_number_names_its_key(key):
    with pytest.raises(ValueError, match=rf"^{key}=0 must be at least 1"):
        FewShotConfig(**{key: 0})


def test_the_summary_is_a_mean_with_the_interval_of_student_s_distribution():
    found = [
        {"phase": "few_shot", "steps": 5, "skipped": 1, "test/accuracy": accuracy}
        for accuracy in (0.5, 0.6, 0.7, 0.4)
    ]
    merged = summary(found)
    assert (merged["steps"], merged["skipped"], merged["episodes"]) == (5, 4, 4)
    assert merged["test/accuracy"] == pytest.approx(0.55)
    # t of 3 degrees of freedom, from a printed table; s = sqrt(0.05 / 3).
    half = 3.182446 * np.sqrt(0.05 / 3) / 2
    assert merged["test/accuracy_ci95"] == pytest.approx(half, rel=1e-6)


def test_episodes_compile_once_and_are_not_run_again(tmp_path, monkeypatch):
    config = tiny_config("few_shot", optim=dataclasses.replace(OPTIM, batch=8, steps=2))
    episodes = FewShotConfig(ways=4, shots=2, test_shots=3, seed=5, episodes=2)
    config = dataclasses.replace(
        config,
        augment=AugmentConfig(),  # mixing takes long to compile
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
    with unoptimised():
        result = run_phase(config, tmp_path / "run", mesh)
    assert len(given) == 2 and given[0] is given[1]
    compiled = {name: program._cache_size() for name, program in given[0].items()}
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
    with unoptimised():
        assert run_phase(config, tmp_path / "run", mesh) == result
    assert [(folder / "metrics.jsonl").read_bytes() for folder in folders] == before
    assert given[-1]["step"]._cache_size() == 0
    with pytest.raises(ValueError, match=r"(?s)another config.*few_shot\.episodes: 2 -> 4"):
        other = dataclasses.replace(episodes, episodes=4)
        run_phase(dataclasses.replace(config, few_shot=other), tmp_path / "run", mesh)
