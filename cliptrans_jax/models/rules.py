"""Partition rules of a part of a network."""

from common_jax.mesh import Rules


def rules_below(subtree: str, rules: Rules) -> Rules:
    """The rules of a network for its parameters in `subtree` of a larger tree.

    Without the subtree as a prefix, a rule of one network could match a parameter of another.
    """
    return tuple((rf"/{subtree}/(.*/)?{regex.removeprefix('/')}", spec) for regex, spec in rules)
