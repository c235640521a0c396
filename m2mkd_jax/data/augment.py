"""Augmentation of a batch on the device: geometry, normalisation, erasing and mixing.

All functions are pure, draw from the key passed to them and run under jit. Images are [B, I, J, X]:
integer pixels in [0, 255] until `normalise`, float32 after it.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from common_jax.config import Section
from common_jax.nn.beta import beta
from common_jax.ranges import BelowOne, Count, Fraction, NonNegative, Size, within

# Up to this side the original pads and crops instead of resizing; the device can do that.
SMALL_SIDE = 32


@dataclasses.dataclass(frozen=True)
class AugmentConfig(Section):
    """`config.augment`: augmentation of training images; the defaults change nothing.

    Attributes:
      repeats: repeated augmentation: copies of an image in an epoch, each augmented independently.
        Copies are consecutive, so nearly always in the same batch; the number of steps stays the
        same. 1 turns it off, DeiT uses 3.
      padding: black pixels around small images (side up to 32) before a random crop of their own
        size. Larger images are cropped and resized instead.
      flip: whether to mirror images left to right with probability 0.5.
      randaugment: whether to apply RandAugment, on the host (m2mkd_jax/data/randaugment.py).
      operations, magnitude, magnitude_std: RandAugment's operations per image, their mean magnitude
        in [0, 10], and its standard deviation.
      erasing: random erasing: probability of a rectangle of noise.
      mixup, cutmix: alpha of the Beta distribution of each; 0 turns it off.
      switch: probability of cutmix if both are on.
      mix_probability: probability that a batch is mixed.
      smoothing: label smoothing, in [0, 1).
      rotate: largest rotation of small images, in degrees; this and the next two are not combined
        with RandAugment.
      scale: largest relative change of the size of small images; 0.1 draws from [0.9, 1.1].
      shift: largest translation of small images, in pixels.
    """

    repeats: Size = 1
    padding: Count = 0
    flip: bool = False
    randaugment: bool = False
    operations: Count = 2
    magnitude: Annotated[float, within(0, 10)] = 9.0
    magnitude_std: NonNegative = 0.5
    erasing: Fraction = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    switch: Fraction = 0.5
    mix_probability: Fraction = 1.0
    smoothing: BelowOne = 0.0
    rotate: Annotated[float, within(0, 180)] = 0.0
    scale: BelowOne = 0.0
    shift: NonNegative = 0.0

    @property
    def mixes(self) -> bool:
        """True if batches are mixed; their size must then be even."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def moves(self) -> bool:
        """True if small images are rotated, scaled or shifted."""
        return bool(self.rotate or self.scale or self.shift)


def idle_fields(config: AugmentConfig, image_size: int) -> dict[str, str]:
    """The fields that are set but have no effect, and why."""
    idle = {}
    if not geometry_on_device(config, image_size):
        why, names = (
            "it is for images that RandAugment does not change",
            ("rotate", "scale", "shift"),
        )
        if image_size > SMALL_SIDE:
            why = f"it is for images of at most {SMALL_SIDE} pixels, and these have {image_size}"
            names = ("padding", *names)
        idle |= {name: why for name in names if getattr(config, name)}
    default, unused = AugmentConfig(), {}
    if not config.randaugment:
        names = ("operations", "magnitude", "magnitude_std")
        unused |= dict.fromkeys(names, "randaugment=False uses no operations")
    if not (config.mixup or config.cutmix):
        unused["mix_probability"] = "mixup and cutmix are 0"
    if not config.mix_probability:
        unused |= dict.fromkeys(("mixup", "cutmix", "switch"), "mix_probability=0 mixes no images")
    elif not (config.mixup and config.cutmix):
        unused["switch"] = "it is for mixup and cutmix together"
    return idle | {
        name: why for name, why in unused.items() if getattr(config, name) != getattr(default, name)
    }


def geometry_on_device(config: AugmentConfig, image_size: int) -> bool:
    """Returns True if the device, not the host's transform, crops and flips training images.

    The host crops large images, because it also resizes them, and all images if RandAugment is on,
    because that comes after crop and flip.
    """
    return image_size <= SMALL_SIDE and not config.randaugment


def augment(
    images: UInt8[Array, "B I J X"],
    key: Array,
    *,
    config: AugmentConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "B I J X"]:
    """Applies all of config.augment except mixing to the uint8 images that the host sends.

    Order: small affine transform, padded crop, flip (these three for small images), normalisation,
    random erasing.
    """
    # Always four keys, so that turning one augmentation off does not change the others' draws.
    affine_key, crop_key, flip_key, erase_key = jax.random.split(key, 4)
    if geometry_on_device(config, images.shape[1]):
        if config.moves:
            images = random_affine(
                images, affine_key, degrees=config.rotate, scale=config.scale, shift=config.shift
            )
        if config.padding:
            images = pad_and_crop(images, crop_key, padding=config.padding)
        if config.flip:
            images = flip(images, flip_key)
    # Geometry comes first, on integers, where padding is black (0). Erasing comes after the
    # normalisation, since its noise is standard normal in the model's units.
    images = normalise(images, mean=mean, std=std)
    if config.erasing:
        images = random_erasing(images, erase_key, probability=config.erasing)
    return images


def normalise(
    images: Shaped[Array, "B I J X"], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B I J X"]:
    """Returns (pixel / 255 - mean) / std per channel, for pixels in [0, 255]."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def pad_and_crop(
    images: Shaped[Array, "B I J X"], key: Array, *, padding: int
) -> Shaped[Array, "B I J X"]:
    """Pads each image with black (0) on all sides and takes a random crop of the original size."""
    count, height, width, channels = images.shape
    sides = (padding, padding)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
    # The upper bound of randint is exclusive: offsets are 0 to 2 * padding.
    corners = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)

    def crop(image, corner):
        # The corner is traced, so the slice must be dynamic; its size is static.
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def flip(images: Shaped[Array, "B I J X"], key: Array) -> Shaped[Array, "B I J X"]:
    """Mirrors each image left to right with probability 0.5."""
    mirror = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)


def random_affine(
    images: Shaped[Array, "B I J X"], key: Array, *, degrees: float, scale: float, shift: float
) -> Shaped[Array, "B I J X"]:
    """Rotates, scales and shifts each image a little about its centre; uncovered pixels are black.

    Uniform draws: angle in [-degrees, degrees], size in [1 - scale, 1 + scale], translation in
    [-shift, shift] pixels per direction. Interpolation is bilinear; integer images are rounded and
    keep their dtype. If all three are 0, the images stay exactly the same.
    """
    draws = jax.random.uniform(key, (4, len(images)), minval=-1.0, maxval=1.0)
    return affine(
        images,
        angle=draws[0] * math.radians(degrees),
        size=1 + draws[1] * scale,
        shift=draws[2:].T * shift,
    )


def affine(
    images: Shaped[Array, "B I J X"],
    *,
    angle: Float[Array, " B"],
    size: Float[Array, " B"],
    shift: Float[Array, "B 2"],
) -> Shaped[Array, "B I J X"]:
    """Rotates, scales and shifts images about their centre, with bilinear interpolation.

    Args:
      images: images of any numeric dtype, which the result keeps.
      angle: rotation in radians, counter-clockwise.
      size: factor by which to enlarge.
      shift: pixels down, pixels right.
    """
    count, height, width, channels = images.shape
    row, column = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    centre_row, centre_column = (height - 1) / 2, (width - 1) / 2
    # Every output pixel looks up its source, so the map is the inverse: shift back, rotate by
    # -angle, divide by the size.
    down = row - centre_row - shift[:, 0, None, None]
    right = column - centre_column - shift[:, 1, None, None]
    cosine = (jnp.cos(angle) / size)[:, None, None]
    sine = (jnp.sin(angle) / size)[:, None, None]
    source_row = cosine * down + sine * right + centre_row
    source_column = cosine * right - sine * down + centre_column

    top, left = jnp.floor(source_row), jnp.floor(source_column)
    flat = images.reshape(count, height * width, channels).astype(jnp.float32)
    result = jnp.zeros(images.shape, jnp.float32)
    for row_offset in (0, 1):  # the four pixels around each source point
        for column_offset in (0, 1):
            row, column = top + row_offset, left + column_offset
            weight = (1 - jnp.abs(source_row - row)) * (1 - jnp.abs(source_column - column))
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = (row * width + column).astype(jnp.int32)
            # Pixels outside read place 0 and get weight 0: a gather cannot skip them.
            place = jnp.where(inside, place, 0).reshape(count, height * width, 1)
            pixels = jnp.take_along_axis(flat, place, axis=1).reshape(images.shape)
            result += jnp.where(inside, weight, 0.0)[..., None] * pixels
    if jnp.issubdtype(images.dtype, jnp.integer):
        result = jnp.round(result)  # a cast alone would truncate
    return result.astype(images.dtype)


def random_erasing(
    images: Float[Array, "B I J X"], key: Array, *, probability: float
) -> Float[Array, "B I J X"]:
    """Fills one rectangle of each normalised image with standard normal noise, with `probability`.

    Like timm's RandomErasing in mode pixel: of 10 draws (relative area uniform in [0.02, 1/3],
    aspect ratio log-uniform in [0.3, 1/0.3]), the first that is smaller than the image in both
    directions is used; if there is none, the image stays as it is.
    """
    count, height, width, _ = images.shape
    keys = jax.random.split(key, 5)
    # All ten draws at once instead of timm's loop, whose length depends on the draws.
    draws = (count, 10)
    area = height * width * jax.random.uniform(keys[0], draws, minval=0.02, maxval=1 / 3)
    log_aspect = jax.random.uniform(keys[1], draws, minval=math.log(0.3), maxval=math.log(1 / 0.3))
    tall = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect)))
    wide = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect)))
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)  # 0 if none fits, which is masked below
    tall = jnp.take_along_axis(tall, first, axis=1)[:, 0]
    wide = jnp.take_along_axis(wide, first, axis=1)[:, 0]
    corner = jax.random.uniform(keys[2], (2, count))
    top = jnp.floor(corner[0] * (height - tall + 1))
    left = jnp.floor(corner[1] * (width - wide + 1))
    erase = fits.any(axis=1) & jax.random.bernoulli(keys[3], probability, (count,))
    box = (top, top + tall, left, left + wide)
    inside = jax.vmap(lambda *edges: box_mask(edges, height, width))(*box)
    # Noise for every pixel, since a box of traced size has no static shape to draw.
    noise = jax.random.normal(keys[4], images.shape, images.dtype)
    return jnp.where((inside & erase[:, None, None])[..., None], noise, images)


def box_mask(box: tuple, height: int, width: int) -> Shaped[Array, "I J"]:
    """Returns True inside the half-open box (top, bottom, left, right); edges may be traced."""
    top, bottom, left, right = box
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    return inside_rows[:, None] & inside_columns


def soft_targets(labels: Int[Array, " B"], count: int, smoothing: float) -> Float[Array, "B L"]:
    """Returns 1 - smoothing + smoothing / L at the label, smoothing / L elsewhere; L = count."""
    return jax.nn.one_hot(labels, count) * (1 - smoothing) + smoothing / count


def mix_targets(targets: Float[Array, "B L"], lam: float | Float[Array, ""]) -> Float[Array, "B L"]:
    """Returns lam * y_b + (1 - lam) * y_{B-1-b}."""
    return lam * targets + (1 - lam) * targets[::-1]


def mixup(
    images: Float[Array, "B I J X"], lam: float | Float[Array, ""]
) -> Float[Array, "B I J X"]:
    """Returns lam * x_b + (1 - lam) * x_{B-1-b}: the partners are the batch in reverse order."""
    return lam * images + (1 - lam) * images[::-1]


def cutmix_box(lam: float | Float[Array, ""], centre: tuple, *, height: int, width: int) -> tuple:
    """Returns the half-open box (top, bottom, left, right) that cutmix pastes around `centre`.

    Before clipping to the image, its sides are cut = int(side * sqrt(1 - lam)). It spans centre -
    cut // 2 to centre + cut // 2, so an odd cut loses one pixel. `centre` is (row, column).
    """
    # A Python float stays in double precision, as in the original; float32 may round differently.
    xp = jnp if isinstance(lam, jax.Array) else np
    ratio = xp.sqrt(1.0 - lam)
    edges = []
    for middle, side in zip(centre, (height, width), strict=True):
        half = xp.floor(side * ratio).astype(xp.int32) // 2
        edges += [xp.clip(middle - half, 0, side), xp.clip(middle + half, 0, side)]
    return tuple(edges)


def cutmix(
    images: Float[Array, "B I J X"], lam: float | Float[Array, ""], centre: tuple
) -> tuple[Float[Array, "B I J X"], float | Float[Array, ""]]:
    """Pastes a box of x_{B-1-b} into x_b; returns the images and lambda = 1 - box area / (I J)."""
    height, width = images.shape[1:3]
    box = cutmix_box(lam, centre, height=height, width=width)
    inside = box_mask(box, height, width)[:, :, None]
    # The box was rounded and clipped, so lambda is recomputed from its actual area.
    area = (box[1] - box[0]) * (box[3] - box[2])
    return jnp.where(inside, images[::-1], images), 1.0 - area / (height * width)


def mix(
    images: Float[Array, "B I J X"],
    labels: Int[Array, " B"],
    key: Array,
    *,
    config: AugmentConfig,
    labels_count: int,
) -> tuple[Float[Array, "B I J X"], Float[Array, "B L"]]:
    """Applies mixup or cutmix to a whole batch and returns it with its soft targets (timm's Mixup,
    mode batch).

    All images share one draw of: mixing or not, mixup or cutmix, lambda ~ Beta(alpha, alpha), and
    the centre of the box. If both alphas are 0, the images stay as they are and the targets are the
    smoothed one-hot labels.

    Raises:
      ValueError: an odd batch, if mixing is on.
    """
    targets = soft_targets(labels, labels_count, config.smoothing)
    if not config.mixes:
        return images, targets
    if len(images) % 2:
        raise ValueError(
            f"a batch of {len(images)} cannot be mixed: mixup and cutmix pair each image with one "
            "of the reversed batch, so it must be even; change config.optim.batch or set "
            "config.augment.mixup and config.augment.cutmix to 0"
        )
    height, width = images.shape[1:3]
    apply_key, switch_key, mixup_key, cutmix_key, row_key, column_key = jax.random.split(key, 6)
    # A batch that is not mixed has lambda 1, which leaves it exactly as it is; for cutmix this
    # means an empty box.
    apply = jax.random.bernoulli(apply_key, config.mix_probability)

    def apply_mixup(images):
        lam = jnp.where(apply, beta(mixup_key, config.mixup), 1.0).astype(images.dtype)
        return mixup(images, lam), lam

    def apply_cutmix(images):
        lam = beta(cutmix_key, config.cutmix)
        row = jax.random.randint(row_key, (), 0, height)
        column = jax.random.randint(column_key, (), 0, width)
        images, lam = cutmix(images, jnp.where(apply, lam, 1.0), (row, column))
        return images, lam.astype(images.dtype)

    if config.mixup > 0 and config.cutmix > 0:
        use_cutmix = jax.random.bernoulli(switch_key, config.switch)
        # cond, not where: only one of the two is computed.
        images, lam = jax.lax.cond(use_cutmix, apply_cutmix, apply_mixup, images)
    else:
        images, lam = apply_cutmix(images) if config.cutmix > 0 else apply_mixup(images)
    return images, mix_targets(targets, lam)


def draw_mix(
    rng: np.random.RandomState, config: AugmentConfig, *, height: int, width: int
) -> tuple[bool, float, tuple[int, int] | None]:
    """Draws (use cutmix, lambda, centre or None) from numpy's generator like the original.

    The draws are in the order of timm's Mixup._params_per_batch and rand_bbox: mixing or not, mixup
    or cutmix, lambda, then for cutmix the centre's row and column. Draws that are not needed are
    skipped, as they are there.
    """
    use_cutmix, lam = False, 1.0
    if (config.mixup > 0 or config.cutmix > 0) and rng.rand() < config.mix_probability:
        use_cutmix = config.cutmix > 0
        if config.mixup > 0 and config.cutmix > 0:
            use_cutmix = bool(rng.rand() < config.switch)
        alpha = config.cutmix if use_cutmix else config.mixup
        lam = float(rng.beta(alpha, alpha))
    if not use_cutmix or lam == 1.0:
        return use_cutmix, lam, None
    return use_cutmix, lam, (int(rng.randint(0, height)), int(rng.randint(0, width)))
