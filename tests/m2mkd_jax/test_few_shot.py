"""Few-shot episodes and repeated augmentation: which examples are chosen."""

import numpy as np
import pytest

from m2mkd_jax.data.few_shot import choose_episode, choose_task
from m2mkd_jax.data.samplers import repeated_indices

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
