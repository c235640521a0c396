"""The sources of a stage's initial weights, and the account of them."""

import contextlib
import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import SingleDeviceSharding
from same import assert_same
from tiny import random_like, write_averaged
from tiny_cliptrans import MBART, OPTIM, tiny_config

from cliptrans_jax import pretrained
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.runs.initial_weights import (
    check_start,
    compare_models,
    is_run,
    make_warm_start,
)
from common_jax import checkpoint
from common_jax.config import unfreeze
from common_jax.state import TrainState

MODEL = tiny_config("translate", None).model


def wanted(tree):
    one = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


def config_of(network=None, **sources):
    """A config of stage "translate"; sources may be path objects."""
    config = tiny_config("translate", None)
    given = dataclasses.replace(
        config.sources, **{name: str(value) for name, value in sources.items()}
    )
    return dataclasses.replace(config, model=network or config.model, sources=given)


OURS = random_like(jax.eval_shape(Translator(MODEL).init, jax.random.key(0)), seed=3)
OWN_TOWER = {"words": np.arange(6, dtype=np.float32).reshape(2, 3)}
ANOTHER = {"words": -OWN_TOWER["words"] - 1}


@dataclasses.dataclass
class Trained:
    """A text tower, with only what a start looks at."""

    params: dict


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Workdirs of a run with and without its own text tower, and a published mBART."""
    folder = tmp_path_factory.mktemp("sources")
    settings = unfreeze(tiny_config("translate", None)).to_dict()
    checkpoint.write_params(folder / "plain", OURS, settings)
    checkpoint.write_params(folder / "unfrozen", OURS | {"clip": ANOTHER}, settings)
    pretrained.save(folder / "mbart", OURS["mbart"], MBART)
    pretrained.save_cliptrans(folder / "released.safetensors", OURS, MODEL)
    return folder


def start(config, tower=None, tree=None):
    return make_warm_start(config, tower)(wanted(OURS if tree is None else tree))


def test_everything_is_fresh_without_sources():
    assert make_warm_start(config_of(), None) is None


@pytest.mark.parametrize("source", ["plain", "plain/checkpoints/0", "released.safetensors"])
def test_model_source_provides_all_weights(sources, source):
    config = config_of(model=sources / source)
    assert is_run(config.sources.model) is not source.endswith("safetensors")
    check_start(config, None, wanted(OURS))
    found = start(config)
    assert_same(jax.tree.map(np.asarray, found.params), OURS)
    assert found.account["fresh"] == found.account["left"] == []


def test_published_mbart_leaves_the_mapper_fresh(sources):
    found = start(config_of(mbart=sources / "mbart"))
    assert_same(jax.tree.map(np.asarray, found.params), {"mbart": OURS["mbart"]})
    sizes = [leaf.size for leaf in jax.tree.leaves(OURS["mbart"])]
    (taken,) = found.account["taken"]
    assert (taken["as"], taken["arrays"], taken["parameters"]) == ("mbart", len(sizes), sum(sizes))
    mapper = traverse_util.flatten_dict(OURS["mapper"], sep="/")
    assert {entry["name"] for entry in found.account["fresh"]} == {f"mapper/{x}" for x in mapper}


def changed(network, section, **change):
    return dataclasses.replace(
        network, **{section: dataclasses.replace(getattr(network, section), **change)}
    )


@pytest.mark.parametrize(
    ("section", "change", "frozen", "said"),
    [
        ("mbart", {"dropout": 0.3, "remat": True}, False, None),  # which does not affect weights
        ("mbart", {"scale_embedding": False}, True, "scale_embedding=True (here False)"),
        ("mbart", {"encoder_heads": 4}, True, "encoder_heads=2 (here 4)"),
        ("mbart", {"decoder_heads": 4}, False, "decoder_heads=2 (here 4)"),
        ("mbart", {"start": 7}, False, "start=2 (here 7)"),
        ("prefix", {"layout": "original"}, False, "prefix.layout='training' (here 'original')"),
        ("prefix", {"mask": "original"}, False, "prefix.mask='prefix' (here 'original')"),
    ],
)
def test_run_whose_model_computes_something_else(tmp_path, caplog, section, change, frozen, said):
    """A warning, since the network adapts; but a frozen encoder, and a model to score, cannot."""
    settings = unfreeze(tiny_config("translate", None)).to_dict()
    state = TrainState(np.int32(3), OURS, {}, None, {}, np.int32(0), np.int32(0))
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep=1, best=None)
    checkpoints.save(state, step=3, config=settings, metrics=None)
    checkpoints.close()
    config = config_of(changed(MODEL, section, **change), model=tmp_path / "run")
    start(config)
    assert ("was trained with" in caplog.text) == (said is not None) and (said or "") in caplog.text
    refused = rf"config\.sources\.model='.*{re.escape(said or '')}.*--config\.model\.{section}\."
    caption = dataclasses.replace(config, stage="caption")
    for check, refuses in (
        (lambda: check_start(caption, None, wanted(OURS)), frozen),
        (
            lambda: check_start(dataclasses.replace(caption, freeze="nothing"), None, wanted(OURS)),
            0,
        ),
        (
            lambda: compare_models(config, tmp_path / "run", fixed=lambda name: True),
            said is not None and section == "mbart",
        ),
    ):
        with pytest.raises(ValueError, match=refused) if refuses else contextlib.nullcontext():
            check()


def test_published_mbart_of_other_sizes_is_refused(sources):
    for change, said in (
        ({"dropout": 0.3, "remat": True}, None),  # which does not affect weights
        ({"pad": 3}, "config.model.mbart.pad=3, and the file has 1"),
        ({"scale_embedding": False}, "scale_embedding=False, and the file has True"),
        ({"decoder_heads": 4}, "decoder_heads=4, and the file has 2"),
    ):
        network = dataclasses.replace(MODEL, mbart=dataclasses.replace(MBART, **change))
        config = config_of(network, mbart=sources / "mbart")
        if said is None:
            assert set(start(config).params) == {"mbart"}
            continue
        with pytest.raises(ValueError, match=r"is not the config's model") as error:
            start(config)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("model", {"kind": "cliptrans", "config": MODEL, "weights": "ema"}),
        ("mbart", {"kind": "mbart", "fetch": True, "weights": "ema"}),
    ],
)
def test_published_weights_are_read_with_the_config_settings(field, wanted, monkeypatch):
    class Asked(Exception):
        pass

    def load(source, **settings):
        raise Asked(source, settings)

    monkeypatch.setattr(pretrained, "load", load)
    sources = dataclasses.replace(
        config_of().sources, fetch=True, weights="ema", **{field: "somewhere"}
    )
    with pytest.raises(Asked) as asked:
        start(dataclasses.replace(config_of(), sources=sources))
    assert asked.value.args == ("somewhere", wanted)


@pytest.mark.parametrize(
    ("source", "from_run"), [("plain", False), ("unfrozen", True), ("", False), ("mbart", False)]
)
def test_trained_tower_continues_from_its_run(sources, source, from_run):
    field = "mbart" if source == "mbart" else "model"
    config = config_of(**({field: sources / source} if source else {}))
    found = start(config, Trained(OWN_TOWER), OURS | {"clip": OWN_TOWER})
    np.testing.assert_array_equal(
        found.params["clip"]["words"], (ANOTHER if from_run else OWN_TOWER)["words"]
    )
    names = {"": set(), "mbart": {"mbart"}}.get(source, {"mbart", "mapper"})
    assert set(found.params) == names | {"clip"}
    for name in names:
        assert_same(jax.tree.map(np.asarray, found.params[name]), OURS[name])
    if field == "model" and source:
        check_start(config, Trained(OWN_TOWER), wanted(OURS | {"clip": OWN_TOWER}))


def test_run_with_a_trained_tower_needs_a_place_for_it(sources):
    config = config_of(model=sources / "unfrozen")
    for begin in (start, lambda given: check_start(given, None, wanted(OURS))):
        with pytest.raises(ValueError, match=r"clip/words of shape \(2, 3\) has no place"):
            begin(config)
    found = start(config_of(model=sources / "unfrozen", leave="clip/.*"))
    assert [entry["name"] for entry in found.account["left"]] == ["clip/words"]


@pytest.mark.parametrize(
    "source", [{"model": "plain"}, {"model": "released.safetensors"}, {"mbart": "mbart"}]
)
def test_fresh_parameters_are_not_loaded(sources, source, caplog):
    regex = "mapper/.*|mbart/decoder/positions.*"
    given = {name: sources / folder for name, folder in source.items()}
    found = start(config_of(**given, fresh=regex))
    paths = set(traverse_util.flatten_dict(dict(found.params), sep="/"))
    every = set(traverse_util.flatten_dict(OURS, sep="/"))
    fresh = {path for path in every if path.startswith(("mapper/", "mbart/decoder/positions"))}
    assert fresh and paths == every - fresh
    assert {entry["name"] for entry in found.account["fresh"]} == fresh
    assert "matches no parameter" not in caplog.text
    start(config_of(**given, fresh="maper/.*"))
    assert "config.sources.fresh='maper/.*' matches no parameter" in caplog.text


def test_fresh_must_not_match_what_a_stage_freezes(sources):
    config = config_of(model=sources / "plain", fresh="mbart/encoder/.*")
    check_start(config, None, wanted(OURS))
    config = dataclasses.replace(config, stage="caption", freeze="encoder")
    said = r"fresh='mbart/encoder/\.\*' matches mbart/encoder/.* config\.freeze='encoder' does not"
    with pytest.raises(ValueError, match=said):
        check_start(config, None, wanted(OURS))
    trained = dataclasses.replace(config.sources, fresh="mapper/.*|mbart/decoder/.*")
    check_start(dataclasses.replace(config, sources=trained), None, wanted(OURS))
    check_start(dataclasses.replace(config, freeze="nothing"), None, wanted(OURS))


def test_run_with_an_ema_passes_on_its_raw_parameters(tmp_path):
    """A stage continues from the run's parameters, not from their average."""
    config = dataclasses.replace(config_of(), optim=dataclasses.replace(OPTIM, ema=0.9))
    average = write_averaged(tmp_path / "run", OURS, config, more=1)
    found = start(config_of(model=tmp_path / "run"))
    assert_same(jax.tree.map(np.asarray, found.params), OURS)
    averaged = checkpoint.load(tmp_path / "run", average=True)
    assert_same(jax.tree.map(np.asarray, averaged), average)
