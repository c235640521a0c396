"""Golden cases, and comparisons with their expected results."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

# (name, got, want, atol, rtol); tolerances of 0, 0 mean exact.
Comparison = tuple[str, Any, Any, float, float]
EXPECTED = ("outputs/", "grads/", "grads_")  # keys of arrays that a runner must compare


class Arrays(Mapping):
    """The arrays of a case by key; keeps track of which were read."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = dict(arrays)
        self._read = set()

    def __getitem__(self, key: str) -> np.ndarray:
        self._read.add(key)
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, key: object) -> bool:
        return key in self._arrays

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose key starts with `prefix`, by the rest of the key."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}

    def forgotten(self) -> list[str]:
        """Keys of expected results that were not read."""
        return sorted(k for k in self if k.startswith(EXPECTED) and k not in self._read)


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes:
      name: folder/case, such as "m2mkd/vit_full".
      config: the content of its json.
      arrays: the content of its npz.
    """

    name: str
    config: Mapping[str, Any]
    arrays: Arrays

    def tolerance(self, *names: str) -> tuple[float, float]:
        """(atol, rtol) of the first of `names` that has its own tolerance in the json; else the
        case's general tolerance."""
        general = self.config["tolerance"]
        tolerance = next((general[name] for name in names if name in general), general)
        return (0.0, 0.0) if tolerance == "exact" else (tolerance["atol"], tolerance["rtol"])


Runner = Callable[[Case], Iterable[Comparison]]


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of a comparison: the largest error, absolute and relative to the largest expected
    value, and `used`, the largest error as a fraction of its tolerance."""

    name: str
    absolute: float
    relative: float
    atol: float
    rtol: float
    used: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """True if |got - want| <= atol + rtol |want| everywhere."""
        return self.used <= 1


def read_case(path: pathlib.Path) -> Case:
    """The case at `path` (.json), with its npz; raises FileNotFoundError if that is missing."""
    arrays = path.with_suffix(".npz")
    if not arrays.exists():
        raise FileNotFoundError(f"{path} has no {arrays.name} next to it")
    with np.load(arrays) as loaded:
        values = Arrays(loaded)
    return Case(f"{path.parent.name}/{path.stem}", json.loads(path.read_text()), values)


def check(comparison: Comparison) -> Check:
    """Compares a result with its expected value; shapes must match, and NaN equals nothing."""
    name, got, want, atol, rtol = comparison
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        problem = f"shape {got.shape}, not {want.shape}"
        return Check(name, np.inf, np.inf, atol, rtol, np.inf, problem)
    if want.size == 0:
        return Check(name, 0.0, 0.0, atol, rtol, 0.0)
    got, want = got.astype(np.float64), want.astype(np.float64)
    error = np.where(np.isfinite(got) & np.isfinite(want), np.abs(got - want), np.inf)
    allowed = atol + rtol * np.abs(want)
    used = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
    scale = np.max(np.abs(want))
    worst = float(np.max(error))
    relative = worst / float(scale) if scale > 0 else worst
    return Check(name, worst, relative, atol, rtol, float(np.max(used)))


def run_case(case: Case, runner: Runner) -> list[Check]:
    """All checks of a case, plus a failed one for every expected array that was not read."""
    checks = [check(comparison) for comparison in runner(case)]
    for key in case.arrays.forgotten():
        checks.append(Check(key, np.inf, np.inf, 0, 0, np.inf, "was not compared"))
    return checks


def compare_trees(
    prefix: str,
    got: Mapping[str, np.ndarray],
    want: Mapping[str, np.ndarray],
    tolerance: tuple[float, float],
) -> Iterator[Comparison]:
    """Compares two states: their names, and the values under each name."""
    yield f"{prefix}names", set(got) == set(want), True, 0, 0
    for name in want:
        if name in got:
            yield f"{prefix}{name}", got[name], want[name], *tolerance


def compare_lists(name: str, got: Iterable[Any], want: Iterable[Any]) -> Comparison:
    """Compares lists of anything but numbers, including their order."""
    return name, list(got) == list(want), True, 0, 0
