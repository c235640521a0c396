"""Fields that are set but have no effect given the others."""

import dataclasses
import logging

import pytest

from common_jax import app
from m2mkd_jax.config import Config
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.phases.fields import idle

MOVED = AugmentConfig(rotate=10.0, scale=0.1, shift=1.0, padding=2)
START = Config(phase="end_to_end", module="all")


def with_images(side, **augment):
    data = dataclasses.replace(START.data, image_size=side)
    return dataclasses.replace(START, data=data, augment=dataclasses.replace(MOVED, **augment))


@pytest.mark.parametrize(
    ("side", "randaugment", "names"),
    [
        (32, False, []),
        (32, True, ["rotate", "scale", "shift"]),
        (33, False, ["padding", "rotate", "scale", "shift"]),
    ],
)
def test_small_images_alone_are_moved(side, randaugment, names):
    config = with_images(side, randaugment=randaugment)
    assert sorted(idle(config)) == [f"augment.{name}" for name in names]


def test_fields_that_the_phase_does_not_read_are_not_listed():
    """A flag for one of these has its own warning."""
    moe = MoeConfig(capacity_factor=3.0)
    model = dataclasses.replace(START.model, moe=moe)
    assert list(idle(dataclasses.replace(START, model=model))) == ["model.moe.capacity_factor"]
    meta = dataclasses.replace(START, phase="pretrain_meta", model=model)
    assert idle(meta) == {}


def test_a_recipe_is_named_where_it_is_of_a_pipeline():
    optim = dataclasses.replace(START.optim, warmup_steps=5)
    assert list(idle(dataclasses.replace(START, optim=optim))) == ["optim.warmup_steps"]


def test_they_are_warned_of_with_the_reason(caplog):
    with caplog.at_level(logging.WARNING):
        app.warn_of_idle(idle(with_images(64, rotate=0.0, scale=0.0, shift=0.0)))
    (record,) = caplog.records
    assert record.message == (
        "config.augment.padding changes nothing: it is for images of at most 32 pixels, and these "
        "have 64"
    )
