"""Mixup and CutMix: which pixels and labels are mixed, how much, and what is drawn for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import Scripted, correlation, keys_drawn_from

from m2mkd_jax.data import augment
from m2mkd_jax.data.augment import AugmentConfig

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 12, 10, 3)), jnp.float32)
LABELS = jnp.arange(8) % 5


def same(left, right):
    np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_soft_targets_sum_to_one():
    targets = np.asarray(augment.soft_targets(LABELS, 5, 0.1))
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets[np.arange(8), LABELS], 0.92, rtol=1e-6)
    np.testing.assert_allclose(np.sort(targets)[:, :-1], 0.02, rtol=1e-6)


def test_mixup_pairs_with_the_reversed_batch():
    images, pixels = augment.mixup(IMAGES, 0.3), np.asarray(IMAGES)
    for place in range(8):
        want = 0.3 * pixels[place] + 0.7 * pixels[7 - place]
        np.testing.assert_allclose(images[place], want, rtol=1e-5, atol=1e-6)
    same(augment.mixup(IMAGES, 1.0), IMAGES)
    targets = np.asarray(augment.mix_targets(augment.soft_targets(LABELS, 5, 0.0), 0.3))
    for place in range(8):
        want = np.zeros(5)
        want[int(LABELS[place])] += 0.3
        want[int(LABELS[7 - place])] += 0.7
        np.testing.assert_allclose(targets[place], want, rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.37, 0.8, 1.0])
@pytest.mark.parametrize("centre", [(6, 5), (0, 9), (11, 0)])
def test_cutmix_lambda_is_the_fraction_kept(lam, centre):
    mixed, effective = augment.cutmix(IMAGES, lam, centre)
    taken = np.asarray(mixed) != np.asarray(IMAGES)
    area = taken.any(axis=(0, 3)).sum()
    assert effective == pytest.approx(1 - area / 120, abs=1e-6)
    same(np.asarray(mixed)[taken], np.asarray(IMAGES)[::-1][taken])
    traced, again = jax.jit(augment.cutmix)(IMAGES, jnp.float32(lam), centre)
    same(traced, mixed)
    assert float(again) == pytest.approx(effective, abs=1e-6)


@pytest.mark.parametrize("kind", [float, jnp.float32])
@pytest.mark.parametrize(
    ("lam", "centre", "box"),
    [
        (0.75, (6, 5), (3, 9, 3, 7)),  # sides of 6 and 5; the odd one loses a pixel
        (0.75, (0, 9), (0, 3, 7, 10)),
        (0.75, (11, 0), (8, 12, 0, 2)),
        (0.0, (6, 5), (0, 12, 0, 10)),
        (0.9996, (6, 5), (6, 6, 5, 5)),
    ],
)
def test_boxes_by_hand(lam, centre, box, kind):
    found = augment.cutmix_box(kind(lam), centre, height=12, width=10)
    assert tuple(map(int, found)) == box


def mix(config, key=KEY, images=IMAGES, labels=LABELS):
    return jax.jit(
        lambda images, labels, key: augment.mix(images, labels, key, config=config, labels_count=5)
    )(images, labels, key)


def test_without_mixing_labels_are_only_smoothed():
    images, targets = mix(AugmentConfig(smoothing=0.1))
    same(images, IMAGES)
    same(targets, augment.soft_targets(LABELS, 5, 0.1))
    same(mix(AugmentConfig(mixup=0.8, cutmix=1.0, mix_probability=0.0))[0], IMAGES)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(mixup=0.8, smoothing=0.1),
        AugmentConfig(cutmix=1.0),
        AugmentConfig(mixup=0.8, cutmix=1.0, smoothing=0.1, mix_probability=0.7),
    ],
)
def test_targets_match_the_mixed_pixels(config):
    # Image i is i + 1 everywhere, so its pixels tell how much of which partner it has.
    values = jnp.arange(1.0, 9.0)
    images = jnp.broadcast_to(values[:, None, None, None], (8, 12, 10, 1))
    labels = jnp.arange(8) % 2  # partners differ in label
    run = jax.jit(lambda key: augment.mix(images, labels, key, config=config, labels_count=2))
    shares = []
    for seed in range(24):
        mixed, targets = run(jax.random.key(seed))
        mean = np.asarray(mixed).mean(axis=(1, 2, 3))
        lam = (mean - values[::-1]) / (values - values[::-1])
        assert np.ptp(lam) < 1e-4
        own = (np.asarray(targets)[np.arange(8), labels] - config.smoothing / 2) / (
            1 - config.smoothing
        )
        np.testing.assert_allclose(own, lam, atol=1e-4)
        shares.append(float(lam[0]))
    assert len({round(share, 3) for share in shares}) > 8
    assert (1.0 in shares) or config.mix_probability == 1


def test_mix_uses_both_mixup_and_cutmix():
    config = AugmentConfig(mixup=0.8, cutmix=1.0)
    run = jax.jit(lambda key: augment.mix(IMAGES, LABELS, key, config=config, labels_count=5)[0])
    sources = np.stack([np.asarray(IMAGES), np.asarray(IMAGES)[::-1]])
    copied = [
        (np.asarray(run(jax.random.key(seed))) == sources).any(axis=0).all() for seed in range(40)
    ]
    assert 10 < sum(copied) < 30  # CutMix copies pixels, mixup blends them


def test_images_keep_their_dtype_in_double_precision():
    config = AugmentConfig(mixup=0.8, cutmix=1.0)
    with jax.enable_x64(True):
        images, _ = augment.mix(IMAGES, LABELS, KEY, config=config, labels_count=5)
    assert images.dtype == IMAGES.dtype


def drawn(monkeypatch, config, count=4000):
    """Whether CutMix, row, column and lambda, as drawn by `mix` for each of `count` keys."""
    monkeypatch.setattr(augment, "mixup", lambda images, lam: jnp.zeros(3))
    monkeypatch.setattr(
        augment, "cutmix", lambda images, lam, centre: (jnp.array([1.0, *centre]), lam)
    )

    def draw(key):
        said, targets = augment.mix(IMAGES[:2], jnp.arange(2), key, config=config, labels_count=2)
        return said, targets[0, 0]

    said, lam = jax.jit(jax.vmap(draw))(jax.random.split(KEY, count))
    return *np.asarray(said).T, np.asarray(lam)


def test_mix_draws_follow_the_config(monkeypatch):
    config = AugmentConfig(mixup=0.4, cutmix=2.0, switch=0.3, mix_probability=0.6)
    cut, row, column, lam = drawn(monkeypatch, config)
    cut, mixed = cut == 1, lam < 1
    assert abs(mixed.mean() - 0.6) < 0.03 and abs(cut.mean() - 0.3) < 0.03
    assert correlation(mixed, cut) < 0.06
    for chosen, alpha in ((cut & mixed, 2.0), (~cut & mixed, 0.4)):
        assert abs(lam[chosen].mean() - 0.5) < 0.03
        assert lam[chosen].var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    for places, side in ((row[cut], 12), (column[cut], 10)):
        counts = np.bincount(places.astype(int), minlength=side)
        assert len(counts) == side and counts.min() > 0.6 * counts.mean()
    both = cut & mixed
    assert correlation(lam[both], row[both], column[both]) < 0.12


def test_no_two_draws_share_a_key(monkeypatch):
    config = AugmentConfig(mixup=0.8, cutmix=1.0)
    run = functools.partial(augment.mix, IMAGES[:2], LABELS[:2], config=config, labels_count=5)
    keys = keys_drawn_from(monkeypatch, run)
    assert len(keys) == 6 == len(set(keys))


@pytest.mark.parametrize(
    ("settings", "mixes"),
    [
        ({}, False),
        ({"mixup": 0.1}, True),
        ({"cutmix": 0.1}, True),
        ({"mixup": 0.1, "cutmix": 0.1, "mix_probability": 0.0}, False),
    ],
)
def test_mixes_depends_on_settings(settings, mixes):
    assert AugmentConfig(**settings).mixes is mixes


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(ValueError, match=r"batch of 7 .* even; change config\.optim\.batch"):
        mix(AugmentConfig(mixup=0.8), images=IMAGES[:7], labels=LABELS[:7])
    mix(AugmentConfig(), images=IMAGES[:7], labels=LABELS[:7])


def test_legacy_draws_consume_only_what_they_need():
    def left_over(config, seed=0):
        rng = np.random.RandomState(seed)
        drawn = augment.draw_mix(rng, config, height=12, width=10)
        return drawn, rng.rand()

    nothing = np.random.RandomState(0).rand()
    assert left_over(AugmentConfig()) == ((False, 1.0, None), nothing)
    (use_cutmix, lam, centre), _ = left_over(AugmentConfig(cutmix=1.0))
    assert use_cutmix and 0 < lam < 1 and 0 <= centre[0] < 12 and 0 <= centre[1] < 10
    (use_cutmix, lam, centre), _ = left_over(AugmentConfig(mixup=0.8))
    assert not use_cutmix and 0 < lam < 1 and centre is None


APPLY = SWITCH = ("rand",)
ROW, COLUMN = ("randint", 0, 12), ("randint", 0, 10)


@pytest.mark.parametrize(
    ("values", "found", "asked"),
    [
        ((0.8,), (False, 1.0, None), [APPLY]),
        ((0.79, 0.4, 0.2), (False, 0.2, None), [APPLY, SWITCH, ("beta", 0.3, 0.3)]),
        (
            (0.79, 0.39, 0.2, 11, 9),
            (True, 0.2, (11, 9)),
            [APPLY, SWITCH, ("beta", 0.7, 0.7), ROW, COLUMN],
        ),
        ((0.0, 0.0, 1.0), (True, 1.0, None), [APPLY, SWITCH, ("beta", 0.7, 0.7)]),
    ],
)
def test_legacy_draws_are_in_the_order_of_timm(values, found, asked):
    config = AugmentConfig(mixup=0.3, cutmix=0.7, switch=0.4, mix_probability=0.8)
    rng = Scripted(*values)
    assert augment.draw_mix(rng, config, height=12, width=10) == found
    assert rng.asked == asked and not rng.values
