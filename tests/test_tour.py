"""The notebook docs/tour.ipynb runs from first to last cell, on untrained runs."""

import dataclasses
import json
import pathlib

import matplotlib
import numpy as np
import pytest
import tiny_cliptrans
from etils import epath
from matplotlib import pyplot as plt
from meshes import one_device
from tiny import NAC, fill, tiny_config

from common_jax import checkpoint
from common_jax.config import unfreeze
from m2mkd_jax.phases import PHASES

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb"


@pytest.fixture
def runs(tmp_path):
    """Untrained runs in the place where `make demo` leaves its trained ones."""
    vmoe = tiny_config("end_to_end")
    for name, config in {"vmoe": vmoe, "nac": dataclasses.replace(vmoe, model=NAC)}.items():
        params = fill(PHASES["end_to_end"].describe(config, one_device()).init)
        workdir = tmp_path / "m2mkd" / f"{name}_m2mkd_0" / "end_to_end"
        checkpoint.write_params(workdir, params, unfreeze(config).to_dict())
        plt.imsave(workdir / "connectivity.png", np.zeros((4, 4)))
    corpus = tiny_cliptrans.write_corpus(tmp_path / "shapes")
    config, folder = tiny_cliptrans.tiny_config("translate", corpus), tmp_path / "cliptrans"
    sources = dataclasses.replace(config.sources, clip=str(folder / "clip"))
    config = dataclasses.replace(config, sources=sources)
    tiny_cliptrans.write_run(
        epath.Path(folder / "clip"), tiny_cliptrans.tiny_config("clip", corpus)
    )
    tiny_cliptrans.write_run(epath.Path(folder / "cliptrans_0" / "translate"), config)
    return tmp_path


def test_notebook_runs(runs, monkeypatch, capsys):
    monkeypatch.setenv("RUNS", str(runs))
    monkeypatch.setattr(plt, "show", lambda: None)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    with matplotlib.rc_context({"backend": "agg"}):
        names = {}
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "of 360 test images are right" in printed and "stage_0: " in printed
    assert "0 True" in printed  # restored by orbax alone
    assert names["choices"] and all(x.ndim == 2 for x in names["choices"].values())
    assert plt.get_fignums()
    plt.close("all")
