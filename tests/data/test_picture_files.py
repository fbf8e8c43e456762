"""Pictures and masks by their mode and range: what a person sees is what is read."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxldm import pipelines
from jaxldm.data import to_uint8
from jaxldm.data.pictures import mask_of, open_picture, resize_mask, rgb_of, shrink_masks
from jaxldm.errors import DataError, InvalidArgumentError

RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
GREY = RGB[..., 0]
LEFT = np.arange(4)[None] < np.full((6, 1), 2)  # white on the left half
PALETTE = [0, 0, 0, 255, 255, 255]


def levels(pictures):
    return np.rint((pictures + 1) * 127.5)


def palette(indices, colours):
    picture = Image.fromarray(indices.astype(np.uint8), "P")
    picture.putpalette(colours)
    return picture


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "CMYK", "P", "PA", "HSV", "YCbCr", "1", "L", "LA"])
def test_every_mode_becomes_the_rgb_that_is_seen(mode):
    picture = Image.fromarray(RGB).convert(mode)
    pixels = rgb_of(picture)
    assert pixels.shape == (6, 4, 3) and pixels.dtype == np.float32
    np.testing.assert_array_equal(levels(pixels), np.asarray(picture.convert("RGB")))


def test_what_is_transparent_lies_on_white():
    alpha = np.where(LEFT, 0, 255).astype(np.uint8)
    pixels = levels(rgb_of(Image.fromarray(np.dstack([RGB, alpha]))))
    assert (pixels[:, :2] == 255).all()
    np.testing.assert_array_equal(pixels[:, 2:], RGB[:, 2:])
    picture = palette(LEFT, PALETTE)
    picture.info["transparency"] = 0
    assert (rgb_of(picture) == 1).all()


def test_sixteen_bits_keep_their_range():
    values = np.array([[0, 256, 65535]], np.uint16)
    pixels = rgb_of(Image.fromarray(values))
    np.testing.assert_allclose(pixels[0, :, 1], values[0] / 32767.5 - 1, atol=1e-6)
    assert np.abs(rgb_of(Image.fromarray(np.tile(values, (9, 3))), (4, 5))).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F", "La"])
def test_a_mode_without_a_known_range_is_refused(mode):
    with pytest.raises(DataError, match=f"'{mode}'.*RGB"):
        rgb_of(Image.new(mode, (4, 4)))


def saved(picture, **options):
    file = io.BytesIO()
    picture.save(file, **options)
    file.seek(0)
    return file


def test_the_orientation_of_a_camera_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    (tmp_path / "cat.png").write_bytes(saved(Image.fromarray(RGB), format="PNG", exif=exif).read())
    turned = np.rot90(RGB, -1)
    np.testing.assert_array_equal(levels(rgb_of(open_picture(tmp_path / "cat.png"))), turned)
    np.testing.assert_array_equal(levels(rgb_of(Image.open(tmp_path / "cat.png"))), turned)
    mask = Image.fromarray(LEFT)
    mask.getexif()[0x0112] = 6
    np.testing.assert_array_equal(mask_of(mask), np.rot90(LEFT, -1))


def test_files_that_are_no_pictures_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no picture"):
        open_picture(tmp_path)
    whole = saved(Image.fromarray(RGB), format="PNG").read()
    for content in (b"", b"no picture", whole[:50], whole[:40] + b"\0" * 20 + whole[60:]):
        (tmp_path / "cat.png").write_bytes(content)
        with pytest.raises(DataError, match=r"cat\.png cannot be read"):
            open_picture(tmp_path / "cat.png")
    (tmp_path / "cat.png").write_bytes(whole)
    for most in (23, 11):  # Pillow warns of the first, and refuses the second itself
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(DataError, match=f"more than {most} pixels"):
            open_picture(tmp_path / "cat.png")


MASKS = {
    "booleans": LEFT,
    "0 and 1": LEFT.astype(np.uint8),
    "0 and 1, int64": LEFT.astype(np.int64),
    "8 bits": LEFT.astype(np.uint8) * 255,
    "8 bits in int32": LEFT.astype(np.int32) * 255,
    "16 bits": LEFT.astype(np.uint16) * 65535,
    "floats": LEFT.astype(np.float64),
    "soft": np.where(LEFT, 0.5, 0.49),
    "boolean PNG": Image.fromarray(LEFT),
    "grey": Image.fromarray(LEFT.astype(np.uint8) * 255),
    "grey 0 and 1": Image.fromarray(LEFT.astype(np.uint8)),
    "grey 16 bits": Image.fromarray(LEFT.astype(np.uint16) * 65535),
    "RGB": Image.fromarray(LEFT).convert("RGB"),
    "RGBA": Image.fromarray(LEFT).convert("RGBA"),
    "palette": palette(LEFT, PALETTE),
    "palette, white first": palette(~LEFT, PALETTE[::-1]),
    "palette, black and dark red": palette(LEFT, [0, 0, 0, 128, 0, 0]),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_read_by_its_own_range(name):
    np.testing.assert_array_equal(mask_of(MASKS[name]), LEFT)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.array([[0, 70000]]), "0 to 70000"),
        (np.array([[-1, 1]]), "-1 to 1"),
        (np.array([[0, np.nan]]), "from 0 .* to 1"),
        (np.array([[0.0, 255.0]]), "from 0 .* to 1"),
        (np.array([["white"]]), "booleans or numbers"),
        (Image.fromarray(RGB), "colours.*black and white"),
        (Image.fromarray(np.dstack([RGB, GREY])), "transparent.*black and white"),
    ],
)
def test_a_mask_that_may_mean_either_is_refused(mask, words):
    with pytest.raises(DataError, match=words):
        mask_of(mask)


@given(
    old=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    new=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    data=st.data(),
)
def test_no_pixel_of_a_mask_is_lost_in_another_size(old, new, data):
    i, j = (data.draw(st.integers(0, length - 1)) for length in old)
    mask = np.zeros(old, bool)
    mask[i, j] = True
    rows, columns = np.nonzero(resize_mask(mask, new))
    for places, at, length, wanted in ((rows, i, old[0], new[0]), (columns, j, old[1], new[1])):
        assert len(places) and places.min() >= at * wanted // length - 1
        assert places.max() <= (at + 1) * wanted // length
    assert not resize_mask(~np.ones(old, bool), new).any() and resize_mask(np.ones(old, bool), new).all()


def test_masks_of_latents_keep_single_pixels():
    masks = np.zeros((1, 8, 16, 1), np.float32)
    masks[0, 3, 9] = 1
    np.testing.assert_array_equal(shrink_masks(masks, 8)[0, ..., 0], [[0, 1]])


def test_pipelines_take_pictures_of_any_mode_and_masks_of_any_range():
    grey, rgb = Image.fromarray(GREY), Image.fromarray(RGB)
    images = pipelines.as_images([grey, rgb, RGB, rgb_of(rgb)])
    assert images.shape == (4, 6, 4, 3)
    for image, expected in zip(images, (np.repeat(GREY[..., None], 3, -1), RGB, RGB, RGB), strict=True):
        np.testing.assert_array_equal(levels(image), expected)
    for masks in (LEFT, LEFT[..., None], LEFT[None], LEFT[None, ..., None], [MASKS["palette"], LEFT]):
        read = pipelines.as_masks(masks, (6, 4))
        assert read.dtype == np.float32 and read.shape[1:] == (6, 4, 1)
        assert all((mask[..., 0] == LEFT).all() for mask in read)
    for wrong in (LEFT.T, [LEFT, LEFT.T], []):
        with pytest.raises(DataError):
            pipelines.as_masks(wrong, (6, 4))


@pytest.mark.parametrize("hidden", [None, 256])
def test_sixteen_bits_with_a_transparent_level_keep_their_range(hidden):
    """As PNG has them: Pillow itself would cut them to 8 bits."""
    values = np.array([[0, 256, 65535], [40000, 256, 30000]], np.uint16)
    picture, written = Image.fromarray(values), io.BytesIO()
    picture.save(written, "PNG", transparency=1 if hidden is None else hidden)
    with Image.open(written) as opened:
        seen = np.where(values == hidden, 1, values / 32767.5 - 1)
        np.testing.assert_allclose(rgb_of(opened)[..., 0], seen, atol=1e-6)
        if hidden is None:
            np.testing.assert_array_equal(mask_of(opened), values >= 32768)
        else:
            with pytest.raises(DataError, match="transparent"):
                mask_of(opened)


def test_a_file_that_ends_early_is_found_where_its_picture_is_used():
    """Pillow decodes what was opened only when its pixels are needed."""
    written, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (54, 36, 3), dtype=np.uint8)
    Image.fromarray(noise).save(written, "PNG")
    for read in (pipelines.as_images, lambda picture: pipelines.as_masks(picture, (54, 36))):
        torn = Image.open(io.BytesIO(written.getvalue()[:-300]))
        with pytest.raises(DataError, match="image: it cannot be read"):
            read(torn)


def test_pictures_and_masks_of_half_precision_are_floats():
    half = jnp.asarray(np.where(LEFT, 1.0, 0.0), jnp.bfloat16)
    assert pipelines.as_images(half[..., None]).dtype == np.float32
    np.testing.assert_array_equal(mask_of(half), LEFT)


def test_latents_are_no_pictures_to_save_and_pixels_no_floats(tmp_path):
    with pytest.raises(DataError, match=r"\[1, 8, 8, 4\].*decode_images"):
        pipelines.save_samples(tmp_path / "out", np.zeros((1, 8, 8, 4), np.float32))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidArgumentError, match="floating-point"):
        to_uint8(RGB)


FRAMES = [Image.new("RGB", (6, 4), colour) for colour in ("black", "white", "red")]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_none_is_taken_for_the_picture(form, tmp_path):
    path = tmp_path / "cat.picture"
    path.write_bytes(saved(FRAMES[0], format=form, save_all=True, append_images=FRAMES[1:]).read())
    with pytest.raises(DataError, match=r"cat\.picture holds several frames.* picture\.seek"):
        open_picture(path)
    with Image.open(path) as opened:
        for read in (rgb_of, mask_of):
            with pytest.raises(DataError, match="holds several frames"):
                read(opened)
        opened.seek(1)
        frame = opened.copy()  # as the message says
    assert (levels(rgb_of(frame)) == 255).all()
    path.write_bytes(saved(FRAMES[0], format=form).read())
    assert open_picture(path).size == (6, 4)


def test_a_preview_in_the_file_of_a_camera_is_no_second_picture(tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_bytes(saved(FRAMES[1], format="MPO", save_all=True, append_images=FRAMES[:1]).read())
    assert (levels(rgb_of(open_picture(path))) == 255).all()
    small = Image.new("RGB", (3, 2))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    path.write_bytes(saved(FRAMES[1], format="TIFF", save_all=True, append_images=[small]).read())
    assert (levels(rgb_of(open_picture(path))) == 255).all()
    small.encoderinfo = {"tiffinfo": {254: 0}}
    path.write_bytes(saved(FRAMES[1], format="TIFF", save_all=True, append_images=[small]).read())
    with pytest.raises(DataError, match="several frames or pages"):
        open_picture(path)
