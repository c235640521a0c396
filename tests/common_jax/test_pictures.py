"""Image files as 8-bit pixels, against values worked out by hand; files of excessive size."""

import io
import os
import pathlib
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common_jax.inputs import pictures
from common_jax.inputs.pictures import decode_picture, pixels_of, read_file

ROOT = pathlib.Path(__file__).parents[2]
WIDE = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], np.uint16)
UPPER = [[0, 0, 1, 0x12, 0x80, 0xFF]]


def encoded(image, form, **settings):
    content = io.BytesIO()
    image.save(content, form, **settings)
    return content.getvalue()


def decoded(content, channels=3):
    return pixels_of(decode_picture(content, channels))


def png(width, height, *, depth, colour, rows):
    """A PNG written by hand, since Pillow writes no 16-bit RGB."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_upper_8_bits(form):
    content = encoded(Image.fromarray(WIDE), form)
    np.testing.assert_array_equal(decoded(content, 1)[..., 0], UPPER)
    np.testing.assert_array_equal(decoded(content, 3), np.stack([UPPER] * 3, axis=-1))


def test_big_endian_16_bit_grey_is_read_the_same():
    content = encoded(Image.frombytes("I;16B", (6, 1), WIDE.astype(">u2").tobytes()), "TIFF")
    np.testing.assert_array_equal(decoded(content, 1)[..., 0], UPPER)


def test_16_bit_rgb_matches_16_bit_grey():
    rows = b"\0" + np.stack([WIDE[0]] * 3, axis=-1).astype(">u2").tobytes()
    content = png(6, 1, depth=16, colour=2, rows=rows)
    np.testing.assert_array_equal(decoded(content), np.stack([UPPER] * 3, axis=-1))


@pytest.mark.parametrize(
    ("values", "mode"),
    [(np.array([[0, 70000]], np.int32), "I"), (np.array([[0.0, 1.0]], "f4"), "F")],
)
def test_grey_values_without_a_known_range_are_refused(values, mode):
    with pytest.raises(ValueError, match=rf"TIFF .*unknown range \(mode {mode}\); save it with 8"):
        decoded(encoded(Image.fromarray(values), "TIFF"))


def test_signed_grey_values_are_refused():
    content = encoded(Image.new("L", (2, 1), 200), "TIFF", tiffinfo={pictures.SAMPLE_FORMAT: 2})
    with pytest.raises(ValueError, match=r"unknown range \(mode L\); .* 8 or 16 unsigned"):
        decoded(content)


@pytest.mark.parametrize("bits", [8, 16])
def test_channels_in_separate_planes_need_8_bits(bits):
    planes = np.arange(12).reshape(3, 2, 2).astype(f"<u{bits // 8}")
    size, end = planes[0].nbytes, 8 + 2 + 12 * 10 + 4  # of a plane; of the fields
    lists = {258: [bits] * 3, 273: [end + 36 + size * plane for plane in range(3)], 279: [size] * 3}
    fields = {256: 2, 257: 2, 259: 1, 262: 2, 277: 3, 278: 2, 284: 2}
    fields |= {tag: end + 12 * place for place, tag in enumerate(lists)}
    entries = (
        struct.pack("<HHII", tag, 4, 3 if tag in lists else 1, fields[tag])
        for tag in sorted(fields)
    )
    header = struct.pack("<2sHIH", b"II", 42, 8, len(fields))
    tail = struct.pack("<9I", *lists[258], *lists[273], *lists[279])
    content = header + b"".join(entries) + bytes(4) + tail + planes.tobytes()
    if bits == 8:
        np.testing.assert_array_equal(decoded(content), planes.transpose(1, 2, 0))
    else:
        with pytest.raises(ValueError, match="16 bits in separate planes, which Pillow misreads"):
            decoded(content)


def test_reason_for_an_unreadable_file_fits_its_kind():
    floats = encoded(Image.new("F", (1, 1)), "TIFF", tiffinfo={pictures.PHOTOMETRIC: 2})
    with pytest.raises(OSError, match="one that Pillow cannot read; save it as 8-bit"):
        decoded(floats)
    with pytest.raises(ValueError, match=r"it is a git-lfs pointer .*; run `git lfs pull`"):
        decoded(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def test_other_modes_match_pillow_convert():
    one_bit = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(decoded(encoded(one_bit, "PNG"), 1)[..., 0], [[255, 0]])
    transparent = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert decoded(encoded(transparent, "PNG")).tolist() == [[[10, 20, 30]]]  # alpha is dropped
    assert decoded(encoded(Image.new("LA", (1, 1), (40, 0)), "PNG")).tolist() == [[[40] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for settings in ({}, {"transparency": 0}, {"transparency": b"\0\x80"}):
        pixels = decoded(encoded(palette, "PNG", **settings))
        assert pixels.tolist() == [[[1, 2, 3], [200, 100, 50]]]
    # Without ink, it is white. Pillow writes CMYK inverted with Adobe's marker, like Photoshop.
    blank = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    np.testing.assert_array_equal(decoded(encoded(blank, "JPEG")), 255)
    np.testing.assert_array_equal(decoded(encoded(blank, "TIFF")), 255)


def test_exif_orientation_is_ignored():
    """The originals call PIL's `convert`, which ignores it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image = Image.fromarray(np.zeros((2, 5, 3), np.uint8))
    assert decoded(encoded(image, "PNG", exif=exif)).shape == (2, 5, 3)


def test_tiff_is_rotated_by_pillow_itself():
    image = Image.fromarray(np.zeros((2, 5, 3), np.uint8))
    assert decoded(encoded(image, "TIFF", tiffinfo={0x0112: 6})).shape == (5, 2, 3)


def test_formats_that_start_a_program_are_not_opened(monkeypatch):
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF"
    with pytest.raises(OSError, match="none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"):
        decoded(eps)
    assert not started and "EPS" not in pictures.FORMATS


def test_every_image_open_restricts_formats():
    for folder in ("common_jax", "m2mkd_jax", "cliptrans_jax", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = re.findall(r"Image\.open\([^\n]*", path.read_text())
            assert all("formats=" in call for call in calls), f"{path}: {calls}"


def test_header_promising_too_many_pixels_is_refused():
    # 5,000 x 5,000 one-bit pixels: 3 MB unpacked from 3 kB
    rows = (b"\0" + bytes(625)) * 5000
    content = png(5000, 5000, depth=1, colour=0, rows=rows)
    assert len(content) < 10_000
    with pytest.raises(ValueError, match=r"5000 x 5000 pixels are more than the 16777216 allowed"):
        decoded(content, 1)
    rows = (b"\0" + bytes(500)) * 4000
    assert decoded(png(4000, 4000, depth=1, colour=0, rows=rows), 1).shape == (4000, 4000, 1)
    with pytest.raises(ValueError, match=r"1 x 101 pixels: one side is more than 100 times"):
        decoded(encoded(Image.new("L", (101, 1)), "PNG"))
    assert decoded(encoded(Image.new("L", (1, 100)), "PNG"), 1).shape == (100, 1, 1)
    with pytest.raises(ValueError, match="bomb"):
        decoded(png(60_000, 60_000, depth=8, colour=0, rows=b""))


def test_pixel_limit_grows_with_the_file_size(monkeypatch):
    content = encoded(Image.new("L", (100, 100)), "PNG")
    assert len(content) < 400 and decoded(content, 1).shape == (100, 100, 1)
    monkeypatch.setattr(pictures, "SMALL", 9_999)
    assert decoded(content.ljust(500, b"\0"), 1).shape == (100, 100, 1)
    with pytest.raises(ValueError, match=r"100 x 100 pixels are more than the 9999 allowed for"):
        decoded(content.ljust(499, b"\0"), 1)
    monkeypatch.setattr(pictures, "LARGEST", 9_998)
    with pytest.raises(ValueError, match=r"more than the 9998 allowed for 600 bytes"):
        decoded(content.ljust(600, b"\0"), 1)


def test_animation_yields_its_first_frame():
    frames = [Image.new("L", (4, 3), value) for value in (10, 200)]
    for form in ("GIF", "TIFF"):
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decoded(content, 1), np.full((3, 4, 1), 10))


def test_colours_become_grey_by_itu_r_601():
    colour = Image.new("RGB", (1, 1), (200, 100, 0))
    assert decoded(encoded(colour, "PNG"), 1).tolist() == [[[118]]]  # 0.299 * 200 + 0.587 * 100


def test_truncated_or_invalid_images_raise_a_printable_error():
    whole = encoded(Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), "PNG")
    cases = [b"", b"x", whole[:20], whole[:-30], b"GIF89a", b"II*\0" + b"\xff" * 40]
    for content in cases:
        with pytest.raises((OSError, ValueError)) as error:
            decoded(content)
        assert str(error.value).isprintable() and "0x" not in str(error.value)


def test_decoder_exceptions_become_value_errors(monkeypatch):
    def fail(*_, **__):
        raise IndexError("bytearray index out of range")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match="IndexError: bytearray"):
        decoded(b"x")


def test_only_regular_files_of_limited_size_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read_file(tmp_path / "a") == b"abc"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)  # sparse, so it takes no space
    with pytest.raises(OSError, match=r"1099511627776 bytes are more than the 268435456"):
        read_file(tmp_path / "large")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_file(tmp_path / "nowhere")
