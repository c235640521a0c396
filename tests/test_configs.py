"""Every shipped config can run: all phases freeze, build and fit together, without taking a
step."""

import dataclasses
import functools
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from meshes import one_device

from common_jax.config import freeze
from common_jax.mesh import MeshConfig, make_mesh, match_rules
from m2mkd_jax.config import PHASE_NAMES, Config
from m2mkd_jax.families import family_of
from m2mkd_jax.hybrid import Pair, pair_logits
from m2mkd_jax.main import check_run
from m2mkd_jax.nac.graphs import make_graph
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.phases import networks
from m2mkd_jax.phases.networks import student_modules, whole_student
from m2mkd_jax.phases.pipeline import plan
from m2mkd_jax.regularizers import make_regularizer

FILES = {
    path.stem: path
    for path in sorted((pathlib.Path(__file__).parents[1] / "configs" / "m2mkd").glob("*.py"))
    if "def get_config(" in path.read_text()
}
# Files that have only some phases.
SOME = {"nac_tinyimagenet": ("end_to_end", "few_shot")}
RUNS = [(name, phase) for name in FILES for phase in SOME.get(name, (*PHASE_NAMES, "pipeline"))]
WHOLE = [name for name in FILES if name not in SOME]


@functools.cache
def read(name):
    return runpy.run_path(str(FILES[name]))


def load(name, arg) -> Config:
    return freeze(Config, read(name)["get_config"](arg))


def swept():
    return [(name, item) for name in FILES for item in read(name).get("sweep", list)()]


@pytest.mark.parametrize(("name", "phase"), RUNS)
def test_every_phase_has_a_config(name, phase, tmp_path):
    config = load(name, f"phase={phase}")
    assert config.phase == phase
    mesh = one_device()
    runs = [run for _, run in plan(config, tmp_path)] if phase == "pipeline" else [config]
    for run in runs:
        check_run(run, mesh)
        run.optim.total_steps(steps_per_epoch=10)


@pytest.mark.parametrize(("name", "phase"), RUNS)
def test_every_phase_can_be_scaled_to_a_tenth(name, phase):
    whole, short = (load(name, f"phase={phase},scale={scale}") for scale in (1, 0.1))
    pairs = [(whole.optim, short.optim)]
    if phase == "pipeline":
        pairs = [(whole.recipes[key].optim, short.recipes[key].optim) for key in whole.recipes]
    for before, after in pairs:
        assert 0.05 < after.total_steps(10) / before.total_steps(10) < 0.15
        after.check_warmup(10)


@pytest.mark.parametrize("name", WHOLE)
def test_networks_fit_together(name):
    config = load(name, "phase=distill")
    pair = Pair(
        networks.meta_network(config), networks.teacher_network(config), student_modules(config)
    )
    params = {
        part: jax.eval_shape(network.init, jax.random.key(0))
        for part, network in vars(pair).items()
    }
    images, count = pair.meta.stages[0].example(2), len(pair.meta)
    stages = sorted({0, 1, count - 2, count - 1})
    teachers, students, _ = jax.eval_shape(
        lambda p, x: pair_logits(pair, p, x, stages=stages, train=False), params, images
    )
    for stage in stages:
        assert teachers[stage].shape == students[stage].shape == (2, config.data.labels)


@pytest.mark.parametrize("name", FILES)
def test_whole_student_is_built_and_sharded(name):
    config = load(name, "phase=end_to_end")
    network = whole_student(config, drop_path=config.drop_path)
    params = jax.eval_shape(network.init, jax.random.key(0))
    side, channels = config.data.image_size, config.data.channels
    images = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
    logits, _ = jax.eval_shape(network.apply, params, images)
    assert logits.shape == (2, config.data.labels)
    mesh = make_mesh(MeshConfig(fsdp=2))
    shardings = match_rules(family_of(config.model).rules, {"student": params}, mesh)
    assert any(leaf.spec for leaf in jax.tree.leaves(shardings))


@pytest.mark.parametrize("name", WHOLE)
def test_pipeline_is_planned_in_order(name, tmp_path):
    config = load(name, "phase=pipeline")
    folders = [folder for folder, _ in plan(config, tmp_path)]
    assert folders[:5] == ["meta", "modules", "teacher", "students", "end_to_end"]
    few = dataclasses.replace(config.distill, pairs_at_once=2)
    folders = [folder for folder, _ in plan(dataclasses.replace(config, distill=few), tmp_path)]
    assert folders[1:3] == ["module_0+1", "module_2+3"]
    count = len(config.meta.depths)
    assert f"student_{count - 2}+{count - 1}" in folders


@pytest.mark.parametrize(("name", "item"), swept(), ids=str)
def test_every_sweep_item_is_a_valid_config(name, item):
    pairs = [f"{key[1:]}={value}" for key, value in item.items() if key.startswith(":")]
    flags = {key: value for key, value in item.items() if not key.startswith(":")}
    config = read(name)["get_config"](",".join(pairs))
    config.update_from_flattened_dict(flags)
    config = freeze(Config, config)
    for key, value in flags.items():
        assert functools.reduce(getattr, key.split("."), config) == value
    if ":prior" in item:
        assert config.model.prior == read(name)["PRIORS"][item[":prior"]]


@pytest.mark.parametrize(
    ("name", "prior"),
    [(n, prior) for n in FILES for prior in read(n).get("PRIORS", ()) if prior != "none"],
)
def test_priors_and_regularizers_fit_the_latents(name, prior):
    config = load(name, f"phase=end_to_end,prior={prior}")
    model = config.model
    adjacency = make_graph(model.prior, nodes=model.mediators, seed=0)
    assert adjacency.any()
    counts = {"input": model.inputs, "mediator": model.mediators, "output": model.outputs}
    signatures = {n: np.ones((count, model.signature_width)) for n, count in counts.items()}
    make_regularizer(config.regularizers, signatures, kernels=[model.kernel] * model.iterations)
    terms = dataclasses.asdict(config.regularizers).values()
    assert sum(term["weight"] > 0 for term in terms) == 1


def test_imagenet_students_fit_the_tiny_imagenet_nac():
    teaching = load("nac_imagenet", "phase=distill,size=tinyimagenet")
    config = load("nac_tinyimagenet", "phase=end_to_end")
    taught, wanted = (
        traverse_util.flatten_dict(
            {"student": jax.eval_shape(network.init, jax.random.key(0))}, sep="/"
        )
        for network in (student_modules(teaching), whole_student(config))
    )

    def allowed(path, allowances):
        return any(re.fullmatch(allowance.regex, path) for allowance in allowances)

    family = family_of(config.model)
    fresh, left = family.fresh(config.model), family.left(config.model)
    taken = {path: leaf.shape for path, leaf in taught.items() if not allowed(path, fresh)}
    taken = {path: shape for path, shape in taken.items() if not allowed(path, left)}
    assert taken == {p: leaf.shape for p, leaf in wanted.items() if not allowed(p, fresh)}
    grid = "student/stage_0/tokenizer/grid"
    assert (taught[grid].shape, wanted[grid].shape) == ((28, 28, 64), (8, 8, 64))


@pytest.mark.parametrize(
    ("phase", "epochs", "batch", "peak", "warmup", "clip", "drop_path"),
    [
        ("pretrain_meta", 300, 2048, 2e-3, 20, None, 0.0),
        ("train_module", 100, 2048, 2e-3, 20, None, 0.1),
        ("assemble", 100, 1024, 1e-3, 0, 1.0, 0.1),
        ("distill", 100, 2048, 2e-3, 20, None, 0.1),
        ("end_to_end", 100, 1024, 1e-3, 0, 1.0, 0.1),
        ("few_shot", 100, 40, 2e-3, 20, None, 0.1),
    ],
)
def test_vmoe_configs_match_the_published_recipe(
    phase, epochs, batch, peak, warmup, clip, drop_path
):
    config = load("vmoe_base", f"phase={phase}")
    optim = config.optim
    assert (optim.epochs, optim.batch, optim.warmup_epochs) == (epochs, batch, warmup)
    assert optim.peak_lr == pytest.approx(peak)
    assert (optim.clip, config.drop_path) == (clip, drop_path)
    assert (optim.weight_decay, optim.eps, optim.min_lr, optim.warmup_lr) == (
        0.05,
        1e-8,
        1e-5,
        1e-6,
    )
    assert optim.schedule == "epoch_cosine"
    check_augmentation(config)


@pytest.mark.parametrize(
    ("name", "phase", "epochs", "batch", "peak", "last", "warmup", "decay"),
    [
        ("nac_imagenet", "distill", 100, 2048, 2e-3, 1e-5, 20, 0.05),
        ("nac_imagenet", "end_to_end", 110, 256, 6e-4, 2e-5, 25, 0.05),
        ("nac_tinyimagenet", "end_to_end", 400, 1024, 2.4e-3, 8e-5, 25, 0.075),
    ],
)
def test_nac_configs_match_the_published_recipe(
    name, phase, epochs, batch, peak, last, warmup, decay
):
    config = load(name, f"phase={phase}")
    optim, whole = config.optim, phase == "end_to_end"
    assert (optim.epochs, optim.batch, optim.warmup_epochs) == (epochs, batch, warmup)
    assert optim.peak_lr == pytest.approx(peak)
    assert (optim.optimizer, optim.weight_decay, optim.decay_all) == ("adamw", decay, whole)
    assert (optim.min_lr, optim.warmup_lr, optim.clip) == (last, 1e-6, None)
    assert optim.schedule == ("epoch_cosine_unlagged" if whole else "epoch_cosine")
    assert (config.drop_path, config.evaluation.noise) == (0.1, "sampled")
    check_augmentation(config)


@pytest.mark.parametrize("name", ["nac_imagenet", "nac_tinyimagenet"])
def test_nac_few_shot_configs_match_the_published_recipe(name):
    config = load(name, "phase=few_shot")
    optim, episode = config.optim, config.few_shot
    assert (optim.optimizer, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 0.0)
    assert (optim.schedule, optim.peak_lr, optim.epochs) == ("constant", 3e-4, 500)
    assert optim.batch == episode.ways * episode.shots == 8
    check_augmentation(config)


@pytest.mark.parametrize(
    ("size", "width", "heads", "factor"), [("imagenet", 512, 8, 1.0), ("tinyimagenet", 384, 6, 2.0)]
)
def test_nac_students_have_the_published_sizes(size, width, heads, factor):
    config = load("nac_imagenet", f"phase=distill,size={size}")
    model = config.model
    assert isinstance(model, NacConfig)
    assert (model.width, model.heads, model.ffn_factor) == (width, heads, factor)
    assert (model.tokenizer.width, config.data.image_size, config.data.labels) == (width, 224, 1000)
    assert len(config.meta.depths) == len(config.teacher.depths) == len(model.depths) == 10
    assert (sum(config.teacher.depths), config.teacher.width) == (32, 1280)


def check_augmentation(config):
    augment = dataclasses.asdict(config.augment)
    assert augment["repeats"] == (1 if config.phase == "few_shot" else 3)
    expected = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "smoothing": 0.1, "erasing": 0.25}
    assert {key: augment[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "arg", "said"),
    [
        ("digits", "phase=distil", r"^phase='distil'"),
        ("vmoe_base", "size=small", "size='small' must be one of"),
        ("vmoe_base", "chips=0", "chips=0 must be at least 1"),
        ("digits_nac", "prior=star", "prior='star' must be one of"),
        ("nac_imagenet", "prior=star", "prior='star' must be one of"),
        ("nac_imagenet", "size=small", "size='small' must be one of"),
        ("nac_imagenet", "phase=end_to_end,size=tinyimagenet", "has no recipe here"),
        ("nac_tinyimagenet", "phase=distill", r"nac_imagenet\.py:phase=distill,size=tinyimagenet"),
    ],
)
def test_unknown_arguments_are_refused(name, arg, said):
    with pytest.raises(ValueError, match=said):
        load(name, arg)
