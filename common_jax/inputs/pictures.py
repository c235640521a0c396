"""Finds image files and decodes them to 8-bit pixels.

All pictures of all data sets are decoded here, so that a file is the same picture, or the same bad
example, in every system.
"""

import io
import os
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from common_jax.untrusted import refuse_pointer

# Pillow would try all of its formats. EPS starts Ghostscript, and others are rarely tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}

# Guards against decompression bombs, since a header can declare any size. Any file may unpack to
# SMALL pixels; beyond that, it needs a byte for every PIXELS_PER_BYTE pixels, and photographs have
# ten times as many bytes. LARGEST is the limit at which Pillow itself warns.
SMALL = 2**24
PIXELS_PER_BYTE = 20
LARGEST = 89_478_485
LARGEST_FILE = 2**28  # bytes
# Resizing the short side of a thin strip to 256 pixels would blow up its long side.
LONGEST = 100  # largest ratio of long side to short side

WIDE_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
# Tags of TIFF, and values of them.
BITS_PER_SAMPLE, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 262, 284, 339
BLACK_IS_ZERO, SEPARATE, SIGNED = 1, 2, 2
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes


def is_image(name: str) -> bool:
    """Returns True for a path with an image suffix, in any case, and no hidden part.

    Hidden parts are, for example, macOS's `._cat.jpg` and `.ipynb_checkpoints`.
    """
    return name.lower().endswith(SUFFIXES) and not any(map(is_hidden, name.split("/")))


def is_hidden(part: str) -> bool:
    """Returns True if a file or folder of this name is hidden."""
    return part.startswith(".")


def find_images(top: str | os.PathLike) -> list[str]:
    """Returns the paths of all images anywhere below a folder, sorted; leaves out hidden files and
    folders."""
    found = []
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [os.path.join(folder, name) for name in names if is_image(name)]
    return sorted(found)


def read_file(path: str | os.PathLike) -> bytes:
    """Returns the bytes of an image file. Raises OSError if it cannot be read, is not a regular
    file, or is larger than 256 MiB."""
    # Opening a pipe without O_NONBLOCK would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        require_small(status.st_size)
        return file.read()


def require_small(size: int) -> None:
    """Raises OSError for more bytes than an image file may have."""
    if size > LARGEST_FILE:
        raise OSError(f"{size} bytes are more than the {LARGEST_FILE} that an image file may have")


def decode_picture(content: bytes, channels: int) -> Image.Image:
    """Decodes an image file's bytes to an 8-bit picture, grey or RGB according to `channels`.

    For 16 bits per channel, keeps the upper 8, in grey and RGB alike. Like PIL's
    `convert("RGB")`, drops transparency, takes the first frame of an animation, and does not apply
    the EXIF orientation, except in TIFF, where Pillow always applies it.

    Raises:
      OSError: if there are no bytes, they are in none of FORMATS, or Pillow cannot read them.
      ValueError: for more pixels than so few bytes can hold, or a thin strip; for grey values of
        unknown range (32-bit or signed integers, floats); for 16 bits in separate planes, which
        Pillow misreads; for any other failure of Pillow.
    """
    if not content:
        raise OSError("the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _require_pixels(image.size, len(content))
            image.load()
            image = _of_8_bits(image)
            return image if image.mode == MODES[channels] else image.convert(MODES[channels])
    except UnidentifiedImageError:  # its message would contain the address of the buffer
        refuse_pointer("it", content)
        if content.startswith(TIFF):
            kind = "a damaged TIFF, or one that Pillow cannot read; save it as 8-bit grey or RGB"
        else:
            kind = f"none of {', '.join(FORMATS)}"
        raise UnidentifiedImageError(f"it is {kind}") from None
    except (OSError, ValueError):
        raise
    # On damaged bytes Pillow raises almost any built-in exception: SyntaxError, struct.error,
    # IndexError, TypeError, OverflowError, MemoryError and more.
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def pixels_of(picture: Image.Image) -> np.ndarray:
    """Returns the pixels of a grey or RGB picture, uint8 (I, J, X)."""
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _require_pixels(size: tuple[int, int], content: int) -> None:
    width, height = size
    limit = min(LARGEST, max(SMALL, PIXELS_PER_BYTE * content))
    if width < 1 or height < 1:
        raise ValueError(f"{height} x {width} pixels are not a picture")
    if width * height > limit:
        raise ValueError(
            f"{height} x {width} pixels are more than the {limit} allowed for {content} bytes"
        )
    if max(size) > LONGEST * min(size):
        raise ValueError(
            f"{height} x {width} pixels: one side is more than {LONGEST} times the other"
        )


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Returns the picture with 8 bits per channel; `convert` would clip wider values to white."""
    tags = getattr(image, "tag_v2", {})  # only TIFF has tags
    bits = tuple(tags.get(BITS_PER_SAMPLE, ()))
    if tags.get(PLANES) == SEPARATE and max(bits, default=0) > 8:
        raise ValueError(
            f"TIFF with {max(bits)} bits in separate planes, which Pillow misreads; save it with 8 "
            "bits, or with the channels of a pixel together"
        )
    # The mode of 16-bit grey PNG and PPM is one of WIDE_GREY or I, depending on Pillow's version.
    wide = image.mode in WIDE_GREY or (image.mode == "I" and image.format in ("PNG", "PPM"))
    signed = SIGNED in tuple(tags.get(SAMPLE_FORMAT, ()))
    if not wide and not signed and image.mode not in ("I", "F"):
        return image
    # Pillow does not scale 12-bit or inverted values, so they are refused.
    plain = tags.get(PHOTOMETRIC, BLACK_IS_ZERO) == BLACK_IS_ZERO
    if not wide or signed or not plain or (bits or (16,)) != (16,):
        raise ValueError(
            f"{image.format} with grey values of unknown range (mode {image.mode}); save it with 8 "
            "or 16 unsigned bits per channel, black as 0"
        )
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
