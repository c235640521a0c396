"""Configs and code of the processes of a run are compared before it starts."""

import math
import types
from functools import partial

import jax
import ml_collections
import pytest
from together import together

import cliptrans_jax.config
import m2mkd_jax.config
from common_jax.config import unfreeze
from common_jax.hosts import Disagreement
from common_jax.workdir import agreement, require_same_start

CONFIGS = {"m2mkd": m2mkd_jax.config.Config(), "cliptrans": cliptrans_jax.config.Config()}
compare = partial(require_same_start, packages=("common_jax",))


@pytest.mark.parametrize(
    ("system", "path", "value", "line"),
    [
        ("m2mkd", "optim.lr", 0.5, "config.optim.lr: 0.0005 -> 0.5"),
        ("m2mkd", "seed", 5, "config.seed: 0 -> 5"),
        ("m2mkd", "phase", "few_shot", "config.phase: 'end_to_end' -> 'few_shot'"),
        ("m2mkd", "sources.students", ("a",), "config.sources.students: [] -> ['a']"),
        ("cliptrans", "stage", "caption", "config.stage: 'translate' -> 'caption'"),
        ("cliptrans", "run.compilation_cache", "/fast", None),
        ("cliptrans", "run.wandb", "project", None),
        ("cliptrans", "features", "/fast", None),
        ("cliptrans", "data.path", "/disk1", None),
        ("m2mkd", "data.workers", 3, None),
        ("m2mkd", "ood.path", "/disk1", None),
    ],
)
def test_fields_that_must_be_the_same_are_compared(system, path, value, line, monkeypatch):
    configs = [unfreeze(CONFIGS[system]) for _ in range(3)]
    configs[2].update_from_flattened_dict({path: value})
    found = together(monkeypatch, *(partial(compare, one) for one in configs))
    if line is None:
        assert found == [None] * 3
        return
    assert [type(error) for error in found] == [Disagreement] * 3
    (text,) = {str(error) for error in found}
    assert f"(process 0 -> process 2):\n  {line}\ngive all processes" in text


def test_processes_need_the_same_number_of_devices(monkeypatch):
    devices = [types.SimpleNamespace(process_index=process) for process in (0, 1, 1, 1)]
    monkeypatch.setattr(agreement.hosts.jax, "devices", lambda: devices)
    monkeypatch.setattr(agreement.hosts, "send", None)  # could not be exchanged
    with pytest.raises(Disagreement, match="0 has 1 of all 4 devices, and process 1 has 3;"):
        compare(ml_collections.ConfigDict())


def test_field_of_one_process_only_is_named(monkeypatch):
    configs = [ml_collections.ConfigDict(x) for x in ({"a": {"b": (1, 2)}}, {"a": {"c": 3}})]
    errors = together(monkeypatch, *(partial(compare, one) for one in configs))
    assert "config.a.b: [1, 2] -> '(absent)'\n  config.a.c: '(absent)' -> 3" in str(errors[1])


def test_values_that_a_config_refuses_later_are_no_difference(monkeypatch):
    config = ml_collections.ConfigDict({"lr": math.nan, "kind": complex(1, 2)})
    assert together(monkeypatch, *[partial(compare, config)] * 2) == [None] * 2


@pytest.mark.parametrize("name", ["common_jax", "jax"])
def test_versions_are_compared(name, monkeypatch):
    class Other:
        __name__ = name

        @property
        def __version__(self):
            return ("1.0", "1.1")[jax.process_index()]

    monkeypatch.setattr(agreement, name, Other())
    errors = together(monkeypatch, *[partial(compare, {})] * 2)
    assert all(f"version of {name}: '1.0' -> '1.1'" in str(error) for error in errors)


def test_versions_of_jaxlib_are_compared(monkeypatch):
    def version(name):
        return ("1.0", "1.1")[jax.process_index()]

    monkeypatch.setattr(agreement.importlib.metadata, "version", version)
    errors = together(monkeypatch, *[partial(compare, {})] * 2)
    assert all("version of jaxlib: '1.0' -> '1.1'" in str(error) for error in errors)


def test_code_is_compared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "some_package"
    (folder / "below").mkdir(parents=True)
    (folder / "__init__.py").touch()
    file = folder / "below" / "file.py"
    file.write_text("a = 1\n")
    before = agreement._checksum("some_package")
    (folder / "note.txt").touch()
    assert agreement._checksum("some_package") == before
    file.write_text("a = 2\n")
    changed_line = agreement._checksum("some_package")
    file.rename(folder / "file.py")
    assert len({before, changed_line, agreement._checksum("some_package")}) == 3
    sums = iter(("first", "second"))
    monkeypatch.setattr(agreement, "_checksum", lambda package: next(sums))
    errors = together(monkeypatch, *[partial(compare, {})] * 2)
    assert all("code of common_jax: '" in str(error) for error in errors)
