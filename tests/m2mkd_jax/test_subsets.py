"""Sets made from others: which examples they hold, and under which labels."""

import numpy as np
import pytest

from m2mkd_jax.data.source import ArraySource
from m2mkd_jax.data.subsets import Subset, first_of_each_class, with_labels_of


def numbers(labels, names):
    """Image i is the number i."""
    labels = np.array(labels, np.int32)
    return ArraySource({"image": np.arange(len(labels)), "label": labels}, tuple(names))


def test_first_of_each_class_keeps_their_order():
    source = numbers([2, 0, 2, 1, 0, 2, 1, 0], "abc")
    few = first_of_each_class(source, 2)
    assert few.indices.tolist() == [0, 1, 2, 3, 4, 6]
    assert few.labels.tolist() == [2, 0, 2, 1, 0, 1] and few.label_names == ("a", "b", "c")
    assert few.arrays["image"].tolist() == few.indices.tolist()
    with pytest.raises(ValueError, match=r"=3 asks for more .*: b has 2; lower it"):
        first_of_each_class(source, 3)


def test_labels_are_matched_to_training_set_by_name():
    """The order differs from its own inverse."""
    source = numbers([0, 1, 2, 1], ("bee", "cat", "ant"))
    found = with_labels_of(source, ("ant", "bee", "cat"), at="the test set")
    assert found.labels.tolist() == [1, 2, 0, 2] and found.label_names == ("ant", "bee", "cat")
    assert [int(found[i]["image"]) for i in range(4)] == [0, 1, 2, 3]
    assert [int(found[i]["label"]) for i in range(4)] == [1, 2, 0, 2]
    assert with_labels_of(source, source.label_names, at="") is source


def test_subset_of_a_subset_indexes_the_original_examples():
    source = numbers([0, 1, 2, 1, 0], "abc")
    half = Subset(source, np.array([4, 2, 3]), np.array([7, 8, 9], np.int32), tuple("abcdefghij"))
    again = Subset(half, np.array([2, 0]), np.array([1, 0], np.int32), ("x", "y"))
    assert again.arrays["image"].tolist() == [3, 4] and again.arrays["label"].tolist() == [1, 0]
    assert len(again) == 2 and again[0] == {"image": 3, "label": 1}
