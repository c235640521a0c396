"""Device-side augmentation: what moves, what mixes, and what stays exactly as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.data import augment
from m2mkd_jax.data.augment import AugmentConfig

KEY = jax.random.key(0)
PIXELS = jnp.asarray(np.random.default_rng(0).integers(1, 256, (8, 12, 10, 3)), jnp.uint8)
IMAGES = PIXELS.astype(jnp.float32) / 128 - 1
LABELS = jnp.arange(8) % 5
GREY = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def same(left, right):
    np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, r"^repeats=0"),
        ({"padding": -1}, r"^padding=-1"),
        ({"switch": 1.5}, r"^switch=1.5"),
        ({"smoothing": 1.0}, r"^smoothing=1.0"),
        ({"magnitude": 11.0}, r"^magnitude=11.0"),
    ],
)
def test_a_wrong_config_names_its_key(settings, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**settings)


def test_defaults_only_normalise():
    got = augment.augment(PIXELS, KEY, config=AugmentConfig(), **GREY)
    np.testing.assert_allclose(got, (np.asarray(PIXELS) / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)


def test_everything_together_runs_under_jit_and_follows_its_key():
    config = AugmentConfig(padding=2, flip=True, erasing=0.5, rotate=10.0, scale=0.1, shift=1.0)
    step = jax.jit(lambda images, key: augment.augment(images, key, config=config, **GREY))
    first = step(PIXELS, KEY)
    assert first.shape == PIXELS.shape and first.dtype == jnp.float32
    same(first, step(PIXELS, KEY))
    assert (np.asarray(first) != np.asarray(step(PIXELS, jax.random.key(1)))).any()


def test_large_images_and_randaugment_leave_the_geometry_to_the_host():
    assert augment.geometry_on_device(AugmentConfig(), 32)
    assert not augment.geometry_on_device(AugmentConfig(), 33)
    config = AugmentConfig(padding=2, flip=True, randaugment=True, shift=2.0)
    got = augment.augment(PIXELS, KEY, config=config, **GREY)
    same(got, augment.normalise(PIXELS, **GREY))


def test_padded_crops_are_windows_of_the_padded_image():
    crops = np.asarray(augment.pad_and_crop(PIXELS, KEY, padding=2))
    padded = np.pad(np.asarray(PIXELS), ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = []
    for crop, image in zip(crops, padded, strict=True):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (image[top : top + 12, left : left + 10] == crop).all()
        ]
        assert len(found) == 1
        corners += found
    assert len(set(corners)) > 3 and crops.dtype == np.uint8


def test_flip_mirrors_about_half():
    images = jnp.tile(PIXELS, (64, 1, 1, 1))
    flipped = np.asarray(augment.flip(images, KEY))
    kept = (flipped == np.asarray(images)).all(axis=(1, 2, 3))
    mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all() and 0.4 < mirrored.mean() < 0.6


@pytest.mark.parametrize("images", [PIXELS, IMAGES])
def test_no_movement_is_the_identity(images):
    still = augment.random_affine(images, KEY, degrees=0.0, scale=0.0, shift=0.0)
    same(still, images)
    assert still.dtype == images.dtype


def test_affine_moves_the_way_it_says():
    def move(images, *, angle=0.0, size=1.0, shift=(0.0, 0.0)):
        count = len(images)
        return np.asarray(
            augment.affine(
                images,
                angle=jnp.full(count, angle),
                size=jnp.full(count, size),
                shift=jnp.tile(jnp.asarray(shift), (count, 1)),
            )
        )

    square = PIXELS[:, :9, :9]
    pixels = np.asarray(square)
    shifted = move(square, shift=(2.0, -1.0))  # two rows down, one column left
    same(shifted[:, 2:, :-1], pixels[:, :-2, 1:])
    assert (shifted[:, :2] == 0).all() and (shifted[:, :, -1] == 0).all()
    same(move(square, angle=np.pi / 2), np.rot90(pixels, axes=(1, 2)))
    twice = move(square, size=2.0)
    same(twice[:, ::2, ::2], pixels[:, 2:7, 2:7])
    half = move(IMAGES, shift=(0.5, 0.0))
    middle = np.asarray(IMAGES[:, :-1] + IMAGES[:, 1:]) / 2
    np.testing.assert_allclose(half[:, 1:], middle, atol=1e-5)


def test_random_affine_differs_from_image_to_image():
    one = jnp.tile(PIXELS[:1], (16, 1, 1, 1))
    moved = np.asarray(augment.random_affine(one, KEY, degrees=15.0, scale=0.1, shift=1.0))
    assert len({image.tobytes() for image in moved}) == 16


def test_erasing_leaves_one_rectangle_of_noise():
    images = jnp.full((400, 24, 20, 3), 100.0)
    erased = np.asarray(augment.random_erasing(images, KEY, probability=0.25))
    touched = (erased != 100).any(axis=-1)
    hit = touched.any(axis=(1, 2))
    assert 0.18 < hit.mean() < 0.32
    for mask in touched[hit]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        tall, wide = len(rows), len(columns)
        assert mask.sum() == tall * wide  # a full rectangle,
        assert rows[-1] - rows[0] + 1 == tall < 24 and columns[-1] - columns[0] + 1 == wide < 20
        assert 0.01 < tall * wide / 480 < 0.38
    noise = erased[touched]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    same(augment.random_erasing(images, KEY, probability=0.0), images)


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
def test_cutmix_lambda_is_the_share_that_stays(lam, centre):
    mixed, effective = augment.cutmix(IMAGES, lam, centre)
    taken = np.asarray(mixed) != np.asarray(IMAGES)
    area = taken.any(axis=(0, 3)).sum()
    assert effective == pytest.approx(1 - area / 120, abs=1e-6)
    same(np.asarray(mixed)[taken], np.asarray(IMAGES)[::-1][taken])
    traced, again = jax.jit(augment.cutmix)(IMAGES, jnp.float32(lam), centre)
    same(traced, mixed)
    assert float(again) == pytest.approx(effective, abs=1e-6)


def mix(config, key=KEY, images=IMAGES, labels=LABELS):
    return jax.jit(
        lambda images, labels, key: augment.mix(images, labels, key, config=config, labels_count=5)
    )(images, labels, key)


def test_no_mixing_smooths_the_labels_only():
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
def test_targets_follow_the_pixels(config):
    # Image i is i + 1 everywhere, so its pixels say how much of which partner it holds.
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


def test_both_kinds_of_mixing_happen():
    config = AugmentConfig(mixup=0.8, cutmix=1.0)
    run = jax.jit(lambda key: augment.mix(IMAGES, LABELS, key, config=config, labels_count=5)[0])
    sources = np.stack([np.asarray(IMAGES), np.asarray(IMAGES)[::-1]])
    copied = [
        (np.asarray(run(jax.random.key(seed))) == sources).any(axis=0).all() for seed in range(40)
    ]
    assert 10 < sum(copied) < 30  # cutmix copies pixels, mixup blends them


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(ValueError, match=r"batch of 7 .* even; change config\.optim\.batch"):
        mix(AugmentConfig(mixup=0.8), images=IMAGES[:7], labels=LABELS[:7])
    mix(AugmentConfig(), images=IMAGES[:7], labels=LABELS[:7])


def test_draws_from_the_legacy_generator_take_only_what_they_need():
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
