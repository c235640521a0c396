"""The ranges of config fields, at their ends and beyond."""

import math
import typing

import pytest

from common_jax import ranges

BAD = (math.nan, math.inf, -math.inf, 1e39, -1e39)


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (ranges.Size, (1, 2**31 - 1), (0, -1, 2**31, 10**400)),
        (ranges.Count, (0, 2**31 - 1), (-1, 2**31)),
        (ranges.Seed, (0, 2**32 - 1), (-1, 2**32)),
        (ranges.Finite, (-1e9, 0.0, 1e9), (-1.1e9, 1.1e9, 1e20)),
        (ranges.Positive, (1e-30, 1e9), (0.0, -1e-30, 1e-31, 5e-324, 1e20)),
        (ranges.NonNegative, (0.0, 1e-320, 1e9), (-1e-320, 1e20)),
        (ranges.Fraction, (0.0, 1.0), (-1e-9, 1.0000001)),
        (ranges.BelowOne, (0.0, 0.999999), (1.0, -1e-9)),
        (ranges.Name, ("a", " "), ("",)),
        (ranges.Regex, ("", "a|b", ".*/(x)"), ("(", "*", "[a", "x{99999999999}", "(?P<a")),
        (ranges.Sizes, ((1,), (3, 3)), ((),)),
    ],
)
def test_ranges_accept_values_inside_and_refuse_those_outside(range_, inside, outside):
    (allowed,) = typing.get_args(range_)[1:]
    assert [value for value in inside if allowed.refusal(value) is not None] == []
    numbers = BAD if isinstance(allowed, ranges.Interval) else ()
    assert [value for value in (*outside, *numbers) if allowed.refusal(value) is None] == []


@pytest.mark.parametrize(
    ("allowed", "value", "said"),
    [
        (ranges.within(-10, 10), 11, "in [-10, 10]"),
        (ranges.above(0, 2), 0.0, "in (0, 2]"),
        (ranges.at_least(2), 1, "at least 2"),
        (ranges.at_least(2), 2**31, "at most 2147483647"),
        (ranges.FINITE, 1e20, "at most 1e+09"),
        (ranges.FINITE, math.inf, "a finite number"),
        (ranges.one_of("on", "off"), "of", "one of ['on', 'off'] (did you mean 'off'?)"),
        (ranges.one_of(1, 3), 2, "one of [1, 3]"),
        (ranges.key_of(lambda: {"a": 1}), "b" * 10_000, "one of ['a']"),
    ],
)
def test_refusal_states_what_is_allowed(allowed, value, said):
    assert allowed.refusal(value) == said


def test_long_values_are_truncated():
    assert ranges.shown("x" * 10_000) == f"'{'x' * 199}..."
    assert ranges.shown(10**5000) == "a number of 16610 bits"
    assert ranges.shown("\x1b[31m\n") == r"'\x1b[31m\n'"
