"""Every shipped config can be run: all phases freeze, build and fit together, without a step."""

import dataclasses
import pathlib
import runpy

import jax
import pytest

from common_jax.config import freeze
from m2mkd_jax.config import PHASES, Config
from m2mkd_jax.hybrid import Pair
from m2mkd_jax.models.moe import check_moe
from m2mkd_jax.phases import networks
from m2mkd_jax.phases.pipeline import plan

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs" / "m2mkd").glob("*.py"))


def load(path, arg) -> Config:
    return freeze(Config, runpy.run_path(str(path))["get_config"](arg))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("phase", [*PHASES, "pipeline"])
def test_every_phase_has_a_config(path, phase):
    config = load(path, f"phase={phase}")
    assert config.phase == phase
    check_moe(config.model.moe, {}, config.optim.batch)
    if phase != "pipeline":
        config.optim.total_steps(steps_per_epoch=10)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_networks_fit_together(path):
    config = load(path, "phase=pipeline")
    pair = Pair(
        networks.meta_network(config),
        networks.teacher_network(config),
        networks.student_modules(config),
    )
    key = jax.random.key(0)
    example = pair.meta.stages[0].example(2)
    for stage in range(len(pair.meta)):
        params = {n: jax.eval_shape(getattr(pair, n).init, key) for n in ("meta", "student")}
        tokens = jax.eval_shape(
            lambda p, x, stage=stage: pair.meta.apply(p, x, stop=stage)[0], params["meta"], example
        )
        out = jax.eval_shape(
            lambda p, x, stage=stage: pair.student.apply(p, x, start=stage, stop=stage + 1)[0],
            params["student"],
            tokens,
        )
        last = stage == len(pair.meta) - 1
        assert out.shape == (
            (2, config.data.labels) if last else pair.meta.stages[1].example(2).shape
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_pipeline_is_planned_in_order(path, tmp_path):
    config = load(path, "phase=pipeline")
    count = len(config.meta.depths)
    folders = [folder for folder, _ in plan(config, tmp_path)]
    modules = [f"module_{i}" for i in range(count)]
    students = [f"student_{i}" for i in range(count)]
    assert folders[: 2 * count + 3] == ["meta", *modules, "teacher", *students, "end_to_end"]


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
def test_the_published_recipe(phase, epochs, batch, peak, warmup, clip, drop_path):
    config = load(FILES[[path.stem for path in FILES].index("vmoe_base")], f"phase={phase}")
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
    augment = dataclasses.asdict(config.augment)
    expected = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "smoothing": 0.1, "erasing": 0.25}
    assert {key: augment[key] for key in expected} == expected


def test_unknown_phases_and_sizes_are_refused():
    digits, base = FILES[[p.stem for p in FILES].index("digits")], FILES[-1]
    with pytest.raises(ValueError, match=r"config\.phase='distil'"):
        load(digits, "phase=distil")
    with pytest.raises(ValueError, match="size='small' must be one of"):
        load(base, "size=small")
