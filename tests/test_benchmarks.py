"""Benchmarks still fit the code that they time: they are built at tiny sizes, and not timed.

`make bench` runs them all, but takes half an hour and PyTorch.
"""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from common_jax import checkpoint

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as its folder's other files import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_vmoe_block_equals_the_textbook_block():
    sizes = {"examples": 2, "tokens": 4, "width": 8, "heads": 1, "hidden": 8, "experts": 2}
    flags = [f"--{name}={size}" for name, size in (sizes | {"groups": 2, "chosen": 1}).items()]
    command = [sys.executable, BENCHMARKS / "vmoe_block.py", "--repeats=5", "--threads=1", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {claim["peer"] for claim in result["claims"]} == {"textbook block", "textbook layer"}


def test_a_training_step_of_mbart_has_a_loss(load):
    mbart_step, decode = load("mbart_step"), load("decode")
    sizes = argparse.Namespace(batch=2, vocab=50, width=8, layers=1, heads=2)
    translator, params = decode.make_model(sizes)
    batch = mbart_step.make_batch(sizes, translator.config.mbart)
    step = mbart_step.training_step(translator, params, batch, dropout=0.1)
    assert float(step()) > 0


def test_untrained_sources_of_a_distillation_are_found(load, tmp_path):
    all_pairs = load("all_pairs")
    config = all_pairs.load("configs/m2mkd/digits.py", {})
    all_pairs.save_helpers(config, tmp_path)
    for role in ("meta", "teacher"):
        params = checkpoint.load(tmp_path / role, subtree=role)
        assert sorted(params) == [f"stage_{stage}" for stage in range(len(config.meta.depths))]
