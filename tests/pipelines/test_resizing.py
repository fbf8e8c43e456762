"""Pictures and masks of any size and mode, against the image processor of diffusers."""

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from jaxldm.data.pictures import mask_of
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.pipelines.inputs import Latents, LatentSpec, as_masks, read_inputs
from jaxldm.pipelines.resizing import nearest_size, scaled_size

SPEC = LatentSpec((32, 32), 8, 8, 4)
THEIRS = {"crop": "crop", "pad": "fill", "stretch": "default"}


def smooth(height, width):
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 255 / height, columns * 255 / width, (rows + 2 * columns) * 255 / (height + 2 * width)]
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("how", THEIRS)
@pytest.mark.parametrize("size", [(40, 80), (80, 40), (24, 24), (96, 96)])
def test_pictures_are_resized_as_in_diffusers(how, size):
    picture = Image.fromarray(smooth(*size))
    target = (32, 48)
    expected = VaeImageProcessor(resample="lanczos").resize(picture, *target, THEIRS[how])
    drawn = read_inputs(SPEC, 1, image=picture, height=32, width=48, resize=how).image[0]
    levels = np.rint((drawn + 1) * 127.5)
    assert levels.shape == (*target, 3)
    # Pillow's bytes; what diffusers fills the edges with, it resamples once more.
    scaled = scaled_size(size, target, how)
    first = [max(0, (wanted - side) // 2) for wanted, side in zip(target, scaled, strict=True)]
    inside = tuple(slice(at, wanted - at) for at, wanted in zip(first, target, strict=True))
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(levels[inside], expected[inside], atol=1)
    np.testing.assert_allclose(levels, expected, atol=16)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "floats"])
@pytest.mark.parametrize("size", [(7, 900), (900, 7), (33, 50), (32, 90)])
def test_of_a_cropped_picture_what_is_kept_alone_is_computed(mode, size, monkeypatch):
    """It is that of the whole, resized and then cropped, which a long picture has too many pixels for."""
    picture = Image.fromarray(smooth(*size))
    if mode == "I;16":
        picture = Image.fromarray(smooth(*size)[..., 0].astype(np.uint16) * 257)
    expected = Image.fromarray(smooth(*size)).resize(
        scaled_size(size, (32, 48), "crop")[::-1], Image.Resampling.LANCZOS
    )
    middle = [(side - wanted + 1) // 2 for side, wanted in zip(expected.size, (48, 32), strict=True)]
    expected = expected.crop((*middle, middle[0] + 48, middle[1] + 32))
    if mode == "I;16":
        expected = expected.getchannel(0)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a: sizes.append(to) or resize(self, to, *a))
    if mode == "floats":
        picture = (smooth(*size) / 127.5 - 1).astype(np.float32)
    image = read_inputs(SPEC, 1, image=picture, height=32, width=48, resize="crop").image[0]
    expected = np.asarray(expected.convert("RGB"), np.float32)
    np.testing.assert_allclose((image + 1) * 127.5, expected, atol=1.6)
    assert sizes and all(to[0] * to[1] <= 32 * 48 for to in sizes)


@pytest.mark.parametrize("how", THEIRS)
def test_arrays_are_resized_as_pictures_are(how):
    pixels = smooth(37, 50)
    of_picture, of_bytes, of_floats = (
        read_inputs(SPEC, 1, image=image, resize=how)
        for image in (Image.fromarray(pixels), pixels, (pixels / 127.5 - 1).astype(np.float32))
    )
    assert of_picture.size == nearest_size((37, 50), 8) == (40, 48)
    np.testing.assert_array_equal(of_bytes.image, of_picture.image)
    np.testing.assert_allclose(of_floats.image, of_picture.image, atol=2.1 / 255)


@pytest.mark.parametrize("how", THEIRS)
def test_a_mask_follows_its_picture(how):
    """Where the picture is white the mask is, too; one of several pictures has its own size."""
    mask = np.zeros((30, 50), bool)
    mask[10:20, 20:40] = True
    pixels = np.repeat(mask[..., None], 3, axis=-1).astype(np.uint8) * 255
    found = read_inputs(SPEC, 2, image=[pixels, pixels[:, 5:]], mask_image=[mask, mask[:, 5:]], resize=how)
    assert found.size == (32, 48) and found.mask.shape == (2, 32, 48, 1)
    white = found.image.mean(-1, keepdims=True)
    assert (found.mask[white > 0.5] == 1).all() and (found.mask[white < -0.9] == 0).mean() > 0.95
    assert set(np.unique(found.mask)) == {0, 1}


def test_without_resize_a_picture_must_fit():
    with pytest.raises(InvalidArgumentError, match="height 37 is not divisible by 8"):
        read_inputs(SPEC, 1, image=smooth(37, 50))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (dict(image=None), "resize='crop' is for image="),
        (dict(image=Latents(np.zeros((4, 4, 4), np.float32))), "in pixels"),
        (dict(height=33), "height 33 is not divisible by 8"),
        (dict(image=smooth(20, 20)[..., 0]), "image must"),
        (dict(image=np.zeros((20, 20, 4), np.uint8)), "3 channels"),
        (dict(mask_image=np.zeros((16, 16), bool)), "mask_image must be 20x20"),
    ],
)
def test_what_cannot_be_resized(call, words):
    with pytest.raises((InvalidArgumentError, DataError), match=words):
        read_inputs(SPEC, 1, **{"image": smooth(20, 20), "resize": "crop", **call})


def test_masks_of_every_mode():
    """Boolean, grey, palette, RGB and RGBA, of Pillow and as arrays, are one mask."""
    expected = np.zeros((16, 24), bool)
    expected[3:9, 5:20] = True
    grey = Image.fromarray(expected.astype(np.uint8) * 255)
    pictures = [grey.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA")]
    palette = Image.fromarray(expected.astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 200, 30, 40])  # of a label file: black and one colour
    arrays = [expected, expected.astype(np.float32), *(np.asarray(picture) for picture in pictures[1:2])]
    arrays += [np.asarray(pictures[3]), np.asarray(pictures[4]), np.asarray(pictures[3]) / np.float32(255)]
    arrays += [np.asarray(pictures[3]) > 0]
    for mask in (*pictures, palette, *arrays):
        np.testing.assert_array_equal(as_masks(mask, (16, 24))[0, ..., 0], expected)
    np.testing.assert_array_equal(as_masks(np.stack(arrays[-2:]), (16, 24))[1, ..., 0], expected)
    diffusers = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    for picture in pictures[1:]:
        theirs = diffusers.preprocess(picture).numpy()[0, 0]
        np.testing.assert_array_equal(mask_of(picture), theirs > 0.5)


@pytest.mark.parametrize("kind", ["colours", "transparent", "range"])
def test_masks_that_mean_nothing_are_refused(kind):
    pixels = smooth(16, 24)
    if kind == "transparent":
        pixels = np.dstack([pixels[..., :1]] * 3 + [np.arange(16 * 24).reshape(16, 24, 1) % 256])
        pixels = pixels.astype(np.uint8)
    if kind == "range":
        pixels = pixels.astype(np.float32)
    with pytest.raises(DataError, match="mask_image"):
        as_masks(pixels, (16, 24))


def test_pictures_of_different_sizes_in_a_list_are_refused_with_their_sizes():
    different = [smooth(16, 24), Image.fromarray(smooth(16, 16))]
    with pytest.raises(DataError, match=r"image holds .* \[16, 24, 3\], \[16, 16, 3\]: .* or give resize"):
        read_inputs(SPEC, 2, image=different)
    masks = [np.zeros((16, 24), bool), np.zeros((16, 16), bool)]
    with pytest.raises(DataError, match=r"mask_image holds .* \[16, 24\], \[16, 16\]: give them in one size"):
        as_masks(masks, (16, 24))
    with pytest.raises(DataError, match="image must hold pictures"):
        read_inputs(SPEC, 1, image=[])
