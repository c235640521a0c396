"""Fixtures shared by several test files."""

import dataclasses

import pytest
from etils import epath
from tiny_cliptrans import tiny_config, write_corpus, write_run

from cliptrans_jax import loading
from cliptrans_jax.commands import COMMANDS
from cliptrans_jax.runs.finished import find
from common_jax.command_line import dispatch
from common_jax.config import unfreeze
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.workdir import write_json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


@pytest.fixture(scope="module")
def pipeline(corpus, tmp_path_factory):
    """The workdir of a pipeline of two runs, with untrained parameters."""
    folder = epath.Path(tmp_path_factory.mktemp("pipeline"))
    config = tiny_config("translate", corpus)
    sources = dataclasses.replace(config.sources, clip=str(folder / "clip"))
    write_run(folder / "clip", tiny_config("clip", corpus))
    write_run(folder / "translate", dataclasses.replace(config, sources=sources))
    write_json(folder / "config.json", unfreeze(tiny_config("pipeline", corpus)).to_dict())
    return folder


@pytest.fixture(scope="module")
def model(pipeline):
    """The pipeline's model, which translates 8 sentences at a time."""
    mesh = make_mesh(MeshConfig())
    return loading.load_finished(find(pipeline).with_batch(8, mesh), mesh=mesh)


@pytest.fixture
def call(capsys):
    """call(command, *arguments): returns its standard output."""

    def run(*arguments):
        assert dispatch("cliptrans", COMMANDS, [str(x) for x in arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys):
    """refusal(command, *arguments): the message of a command that refuses."""

    def run(*arguments):
        assert dispatch("cliptrans", COMMANDS, [str(x) for x in arguments]) == 2
        return capsys.readouterr().err

    return run
