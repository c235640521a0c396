"""Partition rules for part of a network."""

from common_jax.mesh import Rules


def rules_below(subtree: str, rules: Rules) -> Rules:
    """A network's rules, for its parameters in `subtree` of a larger tree.

    Without this prefix, a rule of one network could match a parameter of another.
    """
    # `(.*/)?`: a rule may match at any depth below the subtree, as it may on its own.
    return tuple((rf"/{subtree}/(.*/)?{regex.removeprefix('/')}", spec) for regex, spec in rules)
