"""Pictures in requests: what is read of them, and what damaged and hostile ones may do."""

import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxldm.errors import DataError, InvalidArgumentError, JaxldmError
from jaxldm.pipelines.resizing import resize_picture
from jaxldm.serving.pictures import MAX_EXIF, MAX_PARTS, MAX_SCANS, read_picture, with_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
KINDS = {"PNG": {}, "JPEG": {"progressive": True}, "WEBP": {}}


def in_file(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def coded(content):
    return base64.b64encode(content).decode()


def read(content):
    """As a server does: the head at the door, the rest in the worker."""
    return with_picture({"image": read_picture("image", coded(content))})["image"]


RGB = Image.fromarray(PIXELS[..., :3])
FILES = {kind: in_file(RGB, kind, **options) for kind, options in KINDS.items()}


# ---------------------------------------------------------------- what may be sent


GREY16 = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
OTHERS = {
    "alpha": in_file(Image.fromarray(PIXELS)),
    "palette": in_file(RGB.convert("P")),
    "palette with a transparent colour": in_file(RGB.convert("P"), transparency=3),
    "grey and alpha": in_file(Image.fromarray(PIXELS).convert("LA")),
    "black and white": in_file(RGB.convert("1")),
    "16 bits": in_file(GREY16),
    "CMYK": in_file(RGB.convert("CMYK"), "JPEG"),
    "alpha of WebP": in_file(Image.fromarray(PIXELS), "WEBP"),
    "one pixel": in_file(RGB.resize((1, 1))),
    "one line": in_file(RGB.resize((1, 3000))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_pictures_of_every_kind_are_read(name):
    image = resize_picture(read(OTHERS[name]), (16, 8), "crop")
    assert image.shape == (16, 8, 3) and np.abs(image).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_stand_upright_and_their_metadata_goes_no_further(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture = read(in_file(RGB, kind, exif=exif.tobytes() + b"\x01" * 99))
    assert picture.size == RGB.size[::-1] and not picture.info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resize_picture(
            read(in_file(RGB, kind, exif=b"II*\0\x08\0\0\0\xff\xff" + b"\x01" * 500)), (8, 8), "crop"
        )


WRONG_BASE64 = {
    "letters of URLs": "-_-_",
    "lines": coded(FILES["PNG"])[:40] + "\n" + coded(FILES["PNG"])[40:],
    "no padding": "abc",
    "too much padding": coded(FILES["PNG"]) + "==",
    "other letters": "é" + coded(FILES["PNG"]),
    "a URL of data without a comma": "data:" + coded(FILES["PNG"]),
}


@pytest.mark.parametrize("name", WRONG_BASE64)
def test_what_is_no_base64_is_refused_with_what_that_is(name):
    with pytest.raises(InvalidArgumentError, match=r"image must be .* in base64"):
        read_picture("image", WRONG_BASE64[name])
    assert read_picture("image", "DATA:image/png;base64," + coded(FILES["PNG"])) == FILES["PNG"]


# ---------------------------------------------------------------- damaged and hostile ones


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_what_is_cut_off_behind_its_head_is_refused(kind, part):
    with pytest.raises(JaxldmError, match=r"^image "):
        read(FILES[kind][: int(len(FILES[kind]) * part)])


def test_animations_are_refused():
    frames = [RGB, RGB.rotate(90)]
    for kind in ("PNG", "WEBP"):
        with pytest.raises(DataError, match="image holds several frames"):
            read(in_file(frames[0], kind, save_all=True, append_images=frames[1:]))


@given(data=st.data())
def test_whatever_is_damaged_is_read_or_refused(data):
    """Errors are those of people: none of the decoders' own comes through."""
    content = bytearray(FILES[data.draw(st.sampled_from([*KINDS]))])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content), 200) - 1) | st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        resize_picture(read(bytes(content)), (8, 8), "crop")
    except JaxldmError as error:
        assert str(error).startswith("image ")


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(chunks, behind=False):
    """A PNG with more chunks before its pixels, or behind them."""
    place = len(FILES["PNG"]) - 12 if behind else FILES["PNG"].index(b"IDAT") - 4
    return FILES["PNG"][:place] + chunks + FILES["PNG"][place:]


def test_a_file_of_very_many_parts_is_refused_unread(monkeypatch):
    """Of a JPEG each scan makes all its pixels read again: some dozens of bytes for a second of work."""
    jpeg = FILES["JPEG"]
    tables = jpeg.rindex(b"\xff\xc4", 0, jpeg.rindex(b"\xff\xda"))
    scans = jpeg[:-2] + jpeg[tables:-2] * MAX_SCANS + jpeg[-2:]
    segments = jpeg[:2] + b"\xff\xe5\x00\x02" * MAX_PARTS + jpeg[2:]
    read(jpeg[:-2] + jpeg[tables:-2] * 9 + jpeg[-2:])
    monkeypatch.setattr(Image, "open", None)
    for content in (scans, segments, with_chunks(chunk(b"tEXt", b"a\0b") * MAX_PARTS), *LATE):
        with pytest.raises(InvalidArgumentError, match="save it again, not progressive and without metadata"):
            read_picture("image", coded(content))


LATE = [with_chunks(chunk(b"abCd") * MAX_PARTS, behind=True)]


def test_exif_whose_entries_are_all_as_long_as_it_is_refused_unread(monkeypatch):
    entries = 6000
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", entries)
    exif = head + b"".join(struct.pack("<HHLL", tag, 7, 60000, 8) for tag in range(entries)) + b"\0" * 4
    assert len(exif) > MAX_EXIF
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", None)
    for content in (with_chunks(chunk(b"eXIf", exif), behind=True), in_file(RGB, "WEBP", exif=exif)):
        with pytest.raises(DataError, match=r"image has 72,0\d\d bytes of EXIF, at most 65,536"):
            read(content)


@pytest.mark.parametrize("error", [EOFError, zlib.error, KeyError, AssertionError])
def test_whatever_a_decoder_raises_at_the_head_is_a_refusal(error, monkeypatch):
    def fail(*args, **options):
        raise error("at 0x7f")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InvalidArgumentError, match="this is none, or damaged"):
        read_picture("image", coded(FILES["PNG"]))
