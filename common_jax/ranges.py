"""Ranges of config fields, written beside the default: `alpha: Fraction = 0.5`.

A field's type is `Annotated[T, range]`, and `common_jax.config` checks the value against both. No
range includes NaN or infinity.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sized
from typing import Annotated, Any

LARGEST_INT = 2**31 - 1  # the largest int32, which JAX uses for steps and sizes
SEEDS = 2**32  # number of seeds of JAX's keys
# A number beyond these is a mistake, and its square or reciprocal may leave float32's range.
LARGEST = 1e9
SMALLEST = 1e-30
LONGEST = 200  # characters of a value shown in a message


@dataclasses.dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`."""

    text: str  # what a number must be, for messages
    low: float
    high: float
    open_high: bool = False  # whether `high` itself is excluded
    other: int | None = None  # a number outside the interval that is also allowed

    def refusal(self, value: float) -> str | None:
        # NaN is refused, since comparisons with it are false. Integers of any size can be compared.
        below = value < self.high if self.open_high else value <= self.high
        if value == self.other or (below and self.low <= value):
            return None
        # `text` does not mention these two upper limits, so name the one that was exceeded.
        if math.inf > value > self.high and self.high in (LARGEST, LARGEST_INT):
            return f"at most {self.high if isinstance(self.high, int) else format(self.high, 'g')}"
        return self.text


@dataclasses.dataclass(frozen=True)
class Choice:
    """The names of a table, or a function that returns them, for a table that is defined after the
    config that uses it."""

    names: tuple[Any, ...] | Callable[[], Iterable[str]]

    def list(self) -> list[Any]:
        return [*(self.names() if callable(self.names) else self.names)]

    def refusal(self, value: Any) -> str | None:
        names = self.list()
        return None if value in names else f"one of {names}{did_you_mean(value, names)}"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Regular expressions."""

    def refusal(self, value: str) -> str | None:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            return f"a regular expression: {error}"
        return None


@dataclasses.dataclass(frozen=True)
class Filled:
    """Strings and tuples that are not empty."""

    def refusal(self, value: Sized) -> str | None:
        kind = "string" if isinstance(value, str) else "tuple"
        return None if len(value) else f"a non-empty {kind}"


def at_least(low: int) -> Interval:
    """Integers from `low` up to the largest int32."""
    return Interval(f"at least {low}", low, LARGEST_INT)


def within(low: float, high: float) -> Interval:
    """Numbers from `low` to `high`, both included."""
    return Interval(f"in [{low:g}, {high:g}]", low, high)


def above(low: float, high: float) -> Interval:
    """Numbers greater than `low`, up to `high`."""
    return Interval(f"in ({low:g}, {high:g}]", math.nextafter(low, high), high)


def one_of(*names: str | int) -> Choice:
    """One of `names`."""
    return Choice(names)


def key_of(table: Callable[[], Iterable[str]]) -> Choice:
    """A key of the table that `table()` returns; the table may be defined after the config."""
    return Choice(table)


FINITE = Interval("a finite number", -LARGEST, LARGEST)

Size = Annotated[int, at_least(1)]
Count = Annotated[int, at_least(0)]
Seed = Annotated[int, Interval("from 0 to 2^32 - 1", 0, SEEDS - 1)]
Finite = Annotated[float, FINITE]
Positive = Annotated[float, Interval("positive", SMALLEST, LARGEST)]
NonNegative = Annotated[float, Interval("at least 0", 0, LARGEST)]
Fraction = Annotated[float, within(0, 1)]
BelowOne = Annotated[float, Interval("in [0, 1)", 0, 1, open_high=True)]
Name = Annotated[str, Filled()]
Regex = Annotated[str, Pattern()]
Sizes = Annotated[tuple[Size, ...], Filled()]


def shown(value: Any) -> str:
    """The value's repr for a message, truncated if long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def did_you_mean(key: Any, known: Iterable[Any]) -> str:
    """` (did you mean 'experts'?)` if one of the `known` keys is close to `key`, else ""."""
    names = [name for name in known if isinstance(name, str)]
    # A comparison's cost grows with both lengths, and a long text is not a misspelt key.
    short = isinstance(key, str) and len(key) <= LONGEST
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6) if short else []
    return f" (did you mean {close[0]!r}?)" if close else ""
