"""Sizes, pixel order and the many ways in which an image can be wrong."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from api.media.geometry import num_image_tokens, num_video_tokens, smart_resize
from api.media.images import read_image
from api.media.options import MediaOptions
from api.media.patches import ContentHash, write_patches
from api.media.protocol import Decoded, Refused
from api.media.refusal import MediaRefusal
from tests.api.media_builders import decode, encode_image, make_image
from tests.checks import assert_same_bits
from tests.conftest import Rand

DEFAULTS = MediaOptions()


@pytest.mark.parametrize(
    "size, resized, patches, tokens",
    [
        ((480, 640), (476, 644), (34, 46), 391),
        ((1080, 1920), (1092, 1932), (78, 138), 2691),
        ((2160, 3840), (1624, 2912), (116, 208), 6032),
        ((3000, 4000), (1904, 2520), (136, 180), 6120),
        ((10, 10), (56, 56), (4, 4), 4),
        ((42, 70), (56, 56), (4, 4), 4),
        ((1, 1), (56, 56), (4, 4), 4),
        ((98, 126), (112, 112), (8, 8), 16),
        ((28, 6000), (28, 5600), (2, 400), 200),
        ((5, 3000), (28, 5600), (2, 400), 200),
        ((6000, 28), (5600, 28), (400, 2), 200),
    ],
)
def test_image_sizes_follow_the_published_table(
    size: tuple[int, int], resized: tuple[int, int], patches: tuple[int, int], tokens: int
) -> None:
    assert smart_resize(*size, DEFAULTS.image_min_pixels, DEFAULTS.image_max_pixels) == resized
    assert (resized[0] // 14, resized[1] // 14) == patches
    assert num_image_tokens(*patches) == tokens


@pytest.mark.parametrize(
    "size, resized, tokens",
    [
        ((240, 320), (420, 560), 300),
        ((360, 640), (364, 644), 299),
        ((480, 640), (476, 644), 391),
        ((720, 1280), (728, 1288), 1196),
        ((1080, 1920), (700, 1288), 1150),
    ],
)
def test_frame_sizes_follow_the_published_table(
    size: tuple[int, int], resized: tuple[int, int], tokens: int
) -> None:
    assert smart_resize(*size, DEFAULTS.video_min_pixels, DEFAULTS.video_max_pixels) == resized
    assert num_video_tokens(2, resized[0] // 14, resized[1] // 14) == tokens


def test_a_size_that_fits_no_bounds_is_refused() -> None:
    with pytest.raises(MediaRefusal, match="cannot be resized"):
        smart_resize(1000, 1000, 3500, 3600)


def test_patches_are_windows_of_four_with_channels_outermost() -> None:
    # Every pixel encodes where it comes from: channel, row, column.
    height, width = 56, 84
    channel, y, x = np.meshgrid(np.arange(3), np.arange(height), np.arange(width), indexing="ij")
    code = (channel * 10_000 + y * 100 + x).transpose(1, 2, 0)
    rows = height // 14 * (width // 14)
    low, high = np.empty((rows, 588), np.uint8), np.empty((rows, 588), np.uint8)
    write_patches((code % 256).astype(np.uint8), low)
    write_patches((code // 256).astype(np.uint8), high)
    found = low.astype(int) + 256 * high.astype(int)
    for row in range(rows):
        window, in_window = divmod(row, 4)
        top = (window // (width // 28)) * 28 + in_window // 2 * 14
        left = (window % (width // 28)) * 28 + in_window % 2 * 14
        expected = [
            c * 10_000 + (top + dy) * 100 + left + dx
            for c in range(3)
            for dy in range(14)
            for dx in range(14)
        ]
        worst = next((i for i in range(588) if found[row, i] != expected[i]), None)
        assert worst is None, f"row {row}, feature {worst}: {found[row, worst]}, expected {expected[worst]}"


def test_an_image_becomes_its_bicubic_resize_in_patches(tmp_path: Path) -> None:
    image = make_image(100, 70)
    reply, patches = decode(encode_image(image), tmp_path)
    assert isinstance(reply, Decoded) and patches is not None
    assert (reply.grid, reply.num_tokens) == ((1, 4, 8), 8)
    expected = np.empty((32, 588), np.uint8)
    write_patches(np.asarray(image.resize((112, 56), Image.Resampling.BICUBIC)), expected)
    assert_same_bits(patches, expected, "patches")


def test_equal_bytes_in_another_shape_have_another_hash() -> None:
    patches = np.zeros((16, 588), np.uint8)
    hashes = set()
    for kind, grid in [
        ("image", (1, 2, 8)),
        ("image", (1, 8, 2)),
        ("image", (1, 4, 4)),
        ("video", (1, 4, 4)),
    ]:
        content = ContentHash(kind, grid)
        content.update(patches)
        hashes.add(content.hexdigest())
    assert len(hashes) == 4


def test_the_hash_follows_pixels_and_options_not_the_encoding(tmp_path: Path) -> None:
    image = make_image(120, 80)
    png, _ = decode(encode_image(image), tmp_path)
    bmp, _ = decode(encode_image(image, "BMP"), tmp_path)
    smaller, _ = decode(encode_image(image), tmp_path, image_max_pixels=8 * 28 * 28)
    image.putpixel((60, 40), (0, 0, 0))
    changed, _ = decode(encode_image(image), tmp_path)
    assert all(isinstance(reply, Decoded) for reply in (png, bmp, smaller, changed))
    assert png.content_hash == bmp.content_hash
    assert len({png.content_hash, smaller.content_hash, changed.content_hash}) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_shown_upright(orientation: int) -> None:
    upright = make_image(60, 40)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = read_image(io.BytesIO(encode_image(stored, exif=exif)))
    assert_same_bits(np.asarray(shown), np.asarray(upright), f"orientation {orientation}")


def test_transparency_shows_white() -> None:
    image = make_image(40, 30, "RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert read_image(io.BytesIO(encode_image(image))).getextrema() == ((255, 255),) * 3
    palette = make_image(40, 30).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    shown = read_image(io.BytesIO(encode_image(palette)))
    assert shown.mode == "RGB" and shown.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_to_eight() -> None:
    wide = Image.fromarray(np.full((30, 30), 0x80FF, np.uint16))
    assert read_image(io.BytesIO(encode_image(wide))).getextrema() == ((0x80, 0x80),) * 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    shown = read_image(io.BytesIO(encode_image(make_image(40, 30, mode), kind)))
    assert (shown.mode, shown.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    red, blue = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 255))
    content = encode_image(red, kind, save_all=True, append_images=[blue, red], duration=100)
    level = read_image(io.BytesIO(content)).getpixel((20, 20))
    assert level[0] > 240 and level[2] < 15


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


JPEG = encode_image(make_image(200, 150), "JPEG")
PNG = encode_image(make_image(200, 150))
BAD = {
    "empty": (b"", "supported format"),
    "text named jpg": (b"I am not an image, whatever my name says." * 10, "supported format"),
    "svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "supported format",
    ),
    "a format that is not allowed": (encode_image(make_image(50, 50), "TIFF"), "supported format"),
    "eps, which would start another program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "supported format"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "damaged or cut short"),
    "only a jpeg header": (JPEG[:200], "damaged or cut short|supported format"),
    "truncated png": (PNG[: len(PNG) // 2], "damaged or cut short"),
    "truncated webp": (
        encode_image(make_image(200, 150), "WEBP")[:300],
        "damaged or cut short|supported format",
    ),
    "1x1": (encode_image(make_image(1, 1)), "1x1 pixels"),
    "1x65535": (encode_image(Image.new("L", (1, 65535))), "1x65535 pixels"),
    "65535x1": (encode_image(Image.new("L", (65535, 1))), "65535x1 pixels"),
    "aspect 201": (encode_image(Image.new("L", (2 * 201, 2))), "200 times"),
    "bomb": (png_header(50_000, 50_000), "more than the 100 million"),
    "bomb within the side limits": (png_header(2_000_000_000, 2_000_000_000), "more than the 100 million"),
    "claims more rows than it has": (png_header(500, 500), "damaged or cut short"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    reply, _ = decode(content, tmp_path)
    assert isinstance(reply, Refused), reply
    assert re.search(reason, reply.message), reply.message
    leak = re.search(rf"{tmp_path}|\b0x|PIL|object at|Error", reply.message)
    assert leak is None, leak


def test_aspect_200_is_still_an_image(tmp_path: Path) -> None:
    reply, _ = decode(encode_image(Image.new("L", (2 * 200, 2))), tmp_path)
    assert isinstance(reply, Decoded) and reply.grid == (1, 2, 28)


def test_every_cut_of_a_file_is_an_answer_and_never_a_crash(tmp_path: Path, rand: Rand) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        content = encode_image(make_image(64, 48), kind)
        for _ in range(12):
            damaged = bytearray(content[: rand.python.randrange(len(content) + 1)])
            for _ in range(rand.python.randrange(4)):
                if damaged:
                    damaged[rand.python.randrange(len(damaged))] = rand.python.randrange(256)
            reply, _ = decode(bytes(damaged), tmp_path)
            assert isinstance(reply, Decoded | Refused), (rand, kind)


def test_an_image_beyond_the_context_is_refused_before_resizing(tmp_path: Path) -> None:
    reply, _ = decode(encode_image(make_image(640, 480)), tmp_path, max_tokens=390)
    assert isinstance(reply, Refused) and "needs 391 tokens" in reply.message


def test_a_size_given_for_the_item_comes_before_the_rules(tmp_path: Path) -> None:
    reply, _ = decode(encode_image(make_image(640, 480)), tmp_path, image_width=280, image_height=140)
    assert isinstance(reply, Decoded) and reply.grid == (1, 10, 20)
