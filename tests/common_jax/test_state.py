"""Random keys by name, and parts of nested parameters."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from common_jax.state import (
    evaluation_key,
    fold_name,
    merge,
    partition,
    step_rngs,
    subtrees,
)


def words(key) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def fold(seed: int, *numbers: int) -> tuple[int, ...]:
    """A seed's key, with the numbers folded in one by one."""
    key = jax.random.key(np.uint32(seed))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return words(key)


def test_fold_name_uses_crc32():
    """It is the same in every process; for these digits, it is the standard's check value."""
    assert words(fold_name(jax.random.key(3), "123456789")) == fold(3, 0xCBF43926)


def test_step_keys_fold_in_the_step_then_the_name():
    """Any other way would change the draws of a resumed run."""
    keys = step_rngs(np.uint32(3), np.int32(7), ("drop_path", "gate"))
    assert tuple(keys) == ("drop_path", "gate")
    assert words(keys["gate"]) == fold(3, 7, 0xB82B9894)
    assert words(step_rngs(0, 0, ("gate",))["gate"]) == fold(0, 0, 0xB82B9894)


def test_evaluation_keys_fold_in_their_name_the_batch_then_the_step():
    assert words(evaluation_key(np.uint32(3), np.int32(7))) == fold(3, 0x1323A575, 7)
    assert words(evaluation_key(3, 7, step=np.int32(2))) == fold(3, 0x1323A575, 7, 2)
    assert words(evaluation_key(3, 7, step=0)) == fold(3, 0x1323A575, 7, 0)


def test_training_and_evaluation_keys_are_all_distinct():
    numbers = (0, 1, 2, 5, 7)
    trained = [
        words(key)
        for seed, step in itertools.product(numbers, numbers)
        for key in step_rngs(np.uint32(seed), np.int32(step), ("augment", "gate")).values()
    ]
    drawn = [
        words(evaluation_key(np.uint32(seed), batch, step=step))
        for seed, batch, step in itertools.product(numbers, numbers, (None, *numbers))
    ]
    assert len(set(trained + drawn)) == len(trained) + len(drawn)


def test_keys_depend_on_seed_step_and_name_only():
    keys = step_rngs(np.uint32(3), np.int32(7), ("drop_path", "gate"))
    more = step_rngs(np.uint32(3), np.int32(7), ("new", "gate", "drop_path"))
    for name, key in keys.items():
        assert jnp.all(jax.random.key_data(key) == jax.random.key_data(more[name]))
    others = [
        step_rngs(np.uint32(4), np.int32(7), ("gate",))["gate"],
        step_rngs(np.uint32(3), np.int32(8), ("gate",))["gate"],
        keys["drop_path"],
        fold_name(keys["gate"], "stage_0"),
    ]
    for other in others:
        assert jnp.any(jax.random.key_data(other) != jax.random.key_data(keys["gate"]))


PARAMS = {
    "net": {"kernel": np.ones((3, 2)), "kernel_scale": np.ones(2)},
    "other": {"net": {"kernel": np.zeros(3)}},
}


def test_partition_and_merge_are_inverse():
    chosen, rest = partition(PARAMS, r"net/kernel")
    assert list(chosen["net"]) == ["kernel"]
    assert jax.tree.structure(merge(rest, chosen)) == jax.tree.structure(PARAMS)
    with pytest.raises(ValueError, match=r"no parameter matches 'gone/.*'"):
        partition(PARAMS, "gone/.*")


def test_partition_regex_must_match_the_whole_path():
    chosen, rest = partition(PARAMS, "net/kernel")
    assert jax.tree.map(np.shape, chosen) == {"net": {"kernel": (3, 2)}}
    assert jax.tree.map(np.shape, rest) == {
        "net": {"kernel_scale": (2,)},
        "other": {"net": {"kernel": (3,)}},
    }
    everything, nothing = partition(PARAMS, ".*")
    assert (list(everything), nothing) == (["net", "other"], {})


def test_merge_keeps_the_later_leaf():
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}}, {"b": 4}) == {
        "a": {"x": 3, "y": 2},
        "b": 4,
    }


def test_subtrees_are_cut_at_the_given_depth():
    assert subtrees(PARAMS, 0) == {(): PARAMS}
    assert subtrees(PARAMS, 1) == {("net",): PARAMS["net"], ("other",): PARAMS["other"]}
    assert list(subtrees(PARAMS, 2)) == [
        ("net", "kernel"),
        ("net", "kernel_scale"),
        ("other", "net"),
    ]
