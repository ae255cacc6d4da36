"""Images of every kind become uint8 RGB; unreadable ones are BadSamples that name file and
reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from base.errors import BadSample, UserError
from dataset.images import decode as images
from dataset.images.decode import check_image_root, decode_image, plain_jpeg_size

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")


def image(mode="RGB", size=(40, 30)):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20, "subsampling": 0}])
def test_jpeg_equals_pillow(mode, options):
    data = encoded(image(mode), "JPEG", **options)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(
        2, 0, 1
    )
    ours = decode_image(data)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, expected)
    assert plain_jpeg_size(data) == (None if mode == "CMYK" else (30, 40))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("PNG", "LA"),
        ("PNG", "1"),
        ("WEBP", "RGB"),
    ]
    + [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "CMYK")],
)
def test_other_formats_equal_pillow(tmp_path, kind, mode):
    path = tmp_path / f"image.{kind.lower()}"
    image(mode).save(path)
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode_image(path), expected)
    assert torch.equal(decode_image(path.read_bytes()), expected)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    ours = decode_image(encoded(Image.fromarray(grey), "PNG"))
    assert ours[0].flatten().tolist() == list(range(256))
    assert torch.equal(ours[0], ours[2])


def test_first_frame_no_exif_rotation():
    frames = [image().convert("P"), Image.new("P", (40, 30))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert torch.equal(decode_image(data), decode_image(encoded(frames[0], "GIF")))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(image(), "JPEG", exif=exif)).shape == (3, 30, 40)


def png_with_size(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


JPEG = encoded(image(size=(400, 300)), "JPEG")
HUGE_JPEG = JPEG.replace(struct.pack(">HH", 300, 400), struct.pack(">HH", 60_000, 60_000), 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404 not found</html>", "cannot identify"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:2], "identify"),
        (JPEG[:100], "x.jpg"),
        (encoded(image(), "PNG")[:-60], "x.jpg"),
        (encoded(image(), "WEBP")[:50], "x.jpg"),
        (png_with_size(100_000, 100_000), "exceeds limit"),
        (png_with_size(12_000, 9_000), "pixels exceed"),
        (HUGE_JPEG, "pixels exceed"),
    ],
)
def test_bad_images(tmp_path, data, reason):
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(BadSample, match=reason) as caught:
        decode_image(path)
    assert str(path) in str(caught.value)
    with pytest.raises(BadSample, match="shard/7"):
        decode_image(data, "shard/7")


def test_every_cut_of_a_file_is_decided(tmp_path):
    """No byte count of a cut JPEG or PNG makes the decoder raise anything but BadSample."""
    for data in (encoded(image(size=(9, 7)), "JPEG"), encoded(image(size=(9, 7)), "PNG")):
        for length in range(0, len(data), 5):
            try:
                assert decode_image(data[:length]).shape == (3, 7, 9)
            except BadSample:
                pass


def test_without_a_fast_decoder_the_pixels_are_the_same(monkeypatch):
    fast = decode_image(JPEG)
    monkeypatch.setattr(images, "_fast_decoder", lambda: None)
    assert torch.equal(decode_image(JPEG), fast)


def test_missing_files_and_wrong_root(tmp_path):
    with pytest.raises(BadSample, match="gone.jpg: No such file"):
        decode_image(tmp_path / "gone.jpg")
    with pytest.raises(BadSample, match="directory"):
        decode_image(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        check_image_root(tmp_path / "nowhere", [])
    with pytest.raises(UserError, match=r"none of the first 2 images.*a\.jpg"):
        check_image_root(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "b.jpg").write_bytes(JPEG)
    check_image_root(tmp_path, ["a.jpg", "b.jpg"])
