"""Groups of things that share something."""

from common_jax.inputs.grouping import Groups


def test_joined_nodes_take_the_smallest_name():
    groups = Groups()
    groups.join("c", "b")
    groups.join("d", "e")
    groups.join("b", "a")
    assert [groups.name(node) for node in "abcdef"] == ["a", "a", "a", "d", "d", "f"]
    groups.join("c", "e")
    assert {groups.name(node) for node in "abcde"} == {"a"}
