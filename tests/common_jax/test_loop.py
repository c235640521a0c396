"""Small promises of the loop that whole runs do not show."""

import json

import pytest

from common_jax import loop
from common_jax.loop import RunConfig
from common_jax.workdir import refuse_other_config


@pytest.mark.parametrize(
    ("start", "total", "steps"),
    [(0, 100, range(5, 9)), (6, 100, range(7, 9)), (8, 100, range(9, 9)), (0, 6, range(5, 7))],
)
def test_a_trace_is_of_the_steps_that_are_done(start, total, steps):
    traced = loop._traced_steps(RunConfig(profile=(5, 8)), start, total)
    assert list(traced) == list(steps)
    assert list(loop._traced_steps(RunConfig(), start, total)) == []


def test_only_passing_fields_may_change(tmp_path):
    config = {
        "optim": {"lr": 1e-3},
        "mesh": {"data": 1, "fsdp": 1},
        "run": {"profile": []},
        "meta": {"remat": False},
        "model": {"mbart": {"remat": False}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "result.json").write_text("{}")
    passing = config | {"mesh": {"data": 4, "fsdp": 2}, "run": {"profile": [1, 2]}}
    passing |= {"meta": {"remat": True}, "model": {"mbart": {"remat": True}}}
    refuse_other_config(tmp_path, passing)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 -> 0\.01") as error:
        refuse_other_config(tmp_path, config | {"optim": {"lr": 1e-2}})
    assert "--workdir" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_every": 0}, r"^log_every=0 must be at least 1"),
        (
            {"profile": (3,)},
            r"^profile=\(3,\) must be \(\) or \(first step, last step\)",
        ),
        ({"profile": (4, 3)}, r"^profile=\(4, 3\)"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**change)
