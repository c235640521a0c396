"""What each kind of run reads from its config, according to the tables."""

import pytest

from cliptrans_jax import config as cliptrans
from common_jax.command_line import unread
from common_jax.command_line.fields import find_paths
from common_jax.config import unfreeze
from m2mkd_jax import config as m2mkd
from m2mkd_jax.phases.fields import reads

TABLES = {
    "m2mkd": (m2mkd, reads(), (*m2mkd.PHASE_NAMES, "pipeline")),
    "cliptrans": (cliptrans, cliptrans.READS, cliptrans.RUNS),
}


def test_unread_lists_paths_outside_the_fields_read():
    fields = ("optim", "distill.tau")
    paths = ["optim", "optim.lr", "distill", "distill.tau", "distill.alpha", "optimum", "opti"]
    assert unread(paths, fields) == ["distill.alpha", "optimum", "opti"]


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_run_reads_existing_fields(name):
    package, table, kinds = TABLES[name]
    config = unfreeze(package.Config())
    assert set(table) == set(kinds)
    for paths in table.values():
        assert len(set(paths)) == len(paths)
        assert all(path in find_paths(config, path) for path in paths)
    every = [path for paths in table.values() for path in paths]
    assert unread(config, every) == []  # some run reads every section


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("m2mkd", "end_to_end", "distill.alpha"),
        ("m2mkd", "distill", "baseline.alpha"),
        ("m2mkd", "train_module", "distill.tau"),
        ("m2mkd", "pretrain_meta", "model.width"),
        ("m2mkd", "few_shot", "ood.source"),
        ("m2mkd", "pipeline", "module"),
        ("cliptrans", "clip", "decode.beams"),
        ("cliptrans", "translate", "freeze"),
        ("cliptrans", "evaluate", "optim.lr"),
        ("cliptrans", "evaluate", "run.best"),
        ("cliptrans", "clip", "run.best"),
    ],
)
def test_fields_of_other_runs_are_not_read(name, kind, path):
    _, table, _ = TABLES[name]
    assert unread([path], table[kind]) == [path]
