"""Images of every kind become uint8 RGB; unreadable ones are BadSamples that name file and
reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from base.errors import BadSample, UserError
from dataset.images import decode as images
from dataset.images.decode import (
    check_image_root,
    decode_image,
    is_turned,
    plain_jpeg_size,
    reading,
)
from dataset.sources.class_folder import ClassFolder
from tests.helpers.images import encoded


def image(mode="RGB", size=(40, 30)):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


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
        (JPEG[:620], "Truncated"),
        (JPEG[:2], "identify"),
        (JPEG[:100], "x.jpg"),
        (encoded(image(), "PNG")[:60], "x.jpg"),
        (encoded(image("1"), "PNG")[:44], "x.jpg"),
        (encoded(image(), "TIFF", compression="tiff_lzw")[:-60], "x.jpg"),
        (encoded(image(), "WEBP")[:-9], "x.jpg"),
        (encoded(image(), "WEBP")[:50], "x.jpg"),
        (png_with_size(100_000, 100_000), "pixels exceed"),
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
    with pytest.raises(BadSample, match=r"gone.jpg: No such file"):
        decode_image(tmp_path / "gone.jpg")
    with pytest.raises(BadSample, match="directory"):
        decode_image(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        check_image_root(tmp_path / "nowhere", [])
    with pytest.raises(UserError, match=r"none of the first 2 images.*a\.jpg"):
        check_image_root(tmp_path, ["a.jpg", "b.jpg"])
    with pytest.raises(
        UserError, match=r"^http://x/1.jpg: an image's address.*as img2dataset does"
    ):
        check_image_root(tmp_path, ["http://x/1.jpg"])
    (tmp_path / "b.jpg").write_bytes(JPEG)
    check_image_root(tmp_path, ["a.jpg", "b.jpg"])
    check_image_root(tmp_path / "nowhere", [str(tmp_path / "b.jpg")])  # absolute


def test_a_truncated_jpeg_keeps_its_rows_and_the_others_are_grey(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as the originals set it
    data = JPEG[: len(JPEG) // 2]
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    monkeypatch.undo()
    with reading() as noticed:
        ours = decode_image(data, "cut.jpg")
    assert torch.equal(ours, expected.permute(2, 0, 1)) and noticed.truncated == ["cut.jpg"]
    assert (ours[:, -1] == 128).all() and not (ours[:, 0] == 128).all()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with reading() as noticed:  # a download that stopped, in a file of the full size
        zeros = decode_image(data + bytes(len(JPEG) - len(data)), "zeros.jpg")
    assert torch.equal(zeros, ours) and noticed.truncated == ["zeros.jpg"]
    with reading() as noticed:
        decode_image(JPEG, "whole.jpg")
        decode_image(JPEG + bytes(99), "whole.jpg")
    assert noticed.truncated == []


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "L", "RGBA", "LA", "I;16", "P")),
        *(("TIFF", mode) for mode in ("RGB", "CMYK", "I;16")),
        *(("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB")),
    ],
)
def test_other_formats_keep_the_rows_before_their_end(kind, mode):
    """The rest is grey; of a palette its first colour, of BMP the rows above."""
    noise = np.random.default_rng(0).integers(1, 255, (40, 30, 3), np.uint8)
    noise_image = Image.fromarray(noise).convert("L" if mode == "I;16" else mode).convert(mode)
    data = encoded(noise_image, kind, **({"interlace": 0} if kind == "GIF" else {}))
    whole = decode_image(data)
    cut = data[: len(data) * 4 // 5]
    zeros = cut + bytes(len(data) - len(cut))
    for content in (cut, zeros) if kind in ("PNG", "GIF") else (cut,):
        with reading() as noticed:
            ours = decode_image(content, "cut")
        assert noticed.truncated == ["cut"] and ours.shape == whole.shape
        if kind == "BMP":
            ours, whole = ours.flip(1), whole.flip(1)
        assert torch.equal(ours[:, :10], whole[:, :10])
        rest = ours[:, 38:]
        assert (rest == (rest[:, :1, :1] if mode == "P" else 128)).all()


def test_unreadable_images_are_grey_where_evaluation_asks_for_it():
    with reading(grey=True) as noticed:
        ours = decode_image(b"no image", "x.jpg")
    assert (ours == 128).all() and ours.shape == (3, 224, 224)
    assert "x.jpg: cannot identify" in noticed.unreadable[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_exif_orientation_is_an_option(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image(mode), "JPEG", exif=exif)
    stored = Image.open(io.BytesIO(data))
    turned = ImageOps.exif_transpose(stored).convert("RGB")
    for ours, theirs in (
        (decode_image(data), stored.convert("RGB")),
        (decode_image(data, exif=True), turned),
    ):
        assert torch.equal(ours, torch.from_numpy(np.array(theirs)).permute(2, 0, 1))
    with reading(exif=True):
        assert decode_image(data).shape[1:] == turned.size[::-1]
        assert decode_image(data, exif=False).shape[1:] == stored.size[::-1]
    assert is_turned(data) == (orientation != 1)
    exif[0x0112] = orientation + 8  # of a damaged file
    assert not is_turned(encoded(image(mode), "JPEG", exif=exif))


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_bad_samples(values, tmp_path):
    grey = np.arange(256).reshape(16, 16).astype(values)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    with pytest.raises(BadSample, match=r"x\.tif: .* pixels have no known range"):
        decode_image(tmp_path / "x.tif")


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_sixteen_bits(order, tmp_path):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    if order == ">":
        Image.frombytes("I;16B", (16, 16), grey.astype(">u2").tobytes()).save(tmp_path / "x.tif")
    assert decode_image(tmp_path / "x.tif")[0].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "SGI"])
def test_formats_off_the_list_are_not_opened(kind):
    with pytest.raises(
        BadSample,
        match=r"x\.jpg: cannot identify an image format in it( \(it looks like a PDF\))?$",
    ):
        decode_image(encoded(image(), kind), "x.jpg")


def test_transparency_is_dropped_and_palettes_are_read(tmp_path):
    colours = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    grey = Image.new("LA", (4, 4), (77, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    for each, pixel in ((colours, [200, 100, 50]), (grey, [77] * 3), (palette, [9, 8, 7])):
        options = {"transparency": 1} if each is palette else {}
        found = decode_image(encoded(each, "PNG", **options))
        assert found[:, 0, 0].tolist() == pixel


def test_files_that_are_none_and_files_without_end(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    with pytest.raises(BadSample, match="no regular file"):
        decode_image(tmp_path / "fifo.jpg")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(BadSample, match="bytes, the limit is"):
        decode_image(tmp_path / "sparse.jpg")


def test_no_foreign_warnings(recwarn):
    for kind, mode in (("JPEG", "RGB"), ("PNG", "P"), ("WEBP", "RGB")):
        decode_image(encoded(image(mode), kind))
    # Python may find here what an earlier test left open
    assert all(issubclass(warning.category, ResourceWarning) for warning in recwarn.list)


@pytest.mark.parametrize("ending", ["jpg", "AVIF", "jfif", "jpx", "gif", "dib", "tif", "apng"])
def test_class_folders_take_every_image_that_is_read(ending, tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    formats = {"jfif": "JPEG", "jpg": "JPEG", "jpx": "JPEG2000", "tif": "TIFF", "apng": "PNG"}
    data = encoded(image(), formats.get(ending, ending.upper()))
    (tmp_path / f"cat/0.{ending}").write_bytes(data)
    (tmp_path / "cat/notes.txt").write_text("x")
    folder = ClassFolder(tmp_path, lambda pixels: pixels)
    assert len(folder) == 1 and folder.load(0)["image"].shape == (3, 30, 40)
    assert "left out files whose ending is no image's: 1 .txt" in capsys.readouterr().err


def test_class_folders_follow_links_and_ignore_hidden_files(tmp_path):
    for name in (
        "data/cat/0.jpg",
        "data/cat/.1.jpg",
        "data/.ipynb_checkpoints/z-checkpoint.jpg",
        "disk/dogs/deep/2.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "data/dog").symlink_to(tmp_path / "disk/dogs")
    (tmp_path / "disk/dogs/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/cat/again").symlink_to(tmp_path / "data/cat")
    folder = ClassFolder(tmp_path / "data", lambda pixels: pixels)
    assert folder.folders == ["cat", "dog"]
    names = [str(path.relative_to(tmp_path / "data")) for path in folder.files]
    assert names[0] == "cat/0.jpg" and names[-1] == "dog/loop/cat/0.jpg"
    assert "dog/deep/2.jpg" in names and folder.labels.tolist() == [0, 1, 1]
    for link in ("data/bird.v2", "disk/dogs/more"):  # of a disk that is not mounted
        (tmp_path / link).symlink_to(tmp_path / "nowhere")
        with pytest.raises(
            UserError, match=f"{link.rpartition('/')[2]}: a link that leads nowhere"
        ):
            ClassFolder(tmp_path / "data", None)
        (tmp_path / link).unlink()


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "HEIC"),
        (b"\0\0\0\x20ftypisom" + bytes(100), "a film"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.4" + bytes(100), "a PDF"),
        (b"BZh91AY&SY" + bytes(100), "a bzip2 file"),
        (b"\xfd7zXZ\0\0" + bytes(100), "an xz file"),
    ],
)
def test_what_an_unreadable_image_looks_like(content, seen):
    with pytest.raises(BadSample, match=rf"a\.jpg: cannot identify .*\(it looks like {seen}"):
        decode_image(content, "a.jpg")
