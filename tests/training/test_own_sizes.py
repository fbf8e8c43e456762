"""SDXL is told the size of each picture as it was, and where it was cut; so it is without a caption."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxldm import data
from jaxldm.data import ArrayRows
from jaxldm.training.conditions import SIZES, Condition
from jaxldm.training.text import CaptionConditions, CaptionedRows, own_sizes

TALL, WIDE = (16, 8), (16, 48)  # (height, width)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Pictures whose grey level is the row, and where they are wide the column."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(12):
        height, width = (TALL, WIDE)[n % 2]
        levels = np.arange(height)[:, None] if n % 2 == 0 else np.arange(width)
        grey = np.broadcast_to(levels, (height, width)).astype(np.uint8)
        Image.fromarray(np.stack([grey] * 3, -1)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text("a picture")
    return data.load_folder(folder, image_size=8, hold_out=False).rows("train")


def test_what_is_said_is_what_was_cut(rows):
    found = rows.sizes_and_crops()
    pictures = np.rint((rows.take(np.arange(len(rows)))["image"] + 1) * 127.5).astype(int)[..., 0]
    for row, numbers in enumerate(found):
        height, width, top, left, *target = map(int, numbers)
        assert target == [8, 8] and (height, width) in (TALL, WIDE)
        if (height, width) == TALL:  # not scaled
            assert (top, left) == (4, 0) and pictures[row, 0, 0] == top
        else:  # to half
            assert (top, left) == (0, 8) and abs(pictures[row, 0, 0] - 2 * left) <= 1


def captions_of(null, count):
    texts = ArrayRows({name: array[None] for name, array in null.items()})
    return CaptionConditions(texts, np.zeros(count, int), null)


def test_pictures_keep_their_sizes(rows):
    null = {"text_embeds": np.ones(3, np.float32), SIZES: np.zeros(6, np.float32)}
    captions = captions_of(null, len(rows))
    sizes = own_sizes(rows, captions)
    examples = CaptionedRows(ArrayRows({"mean": np.zeros((len(rows), 2))}), captions, sizes)
    batch = examples.take(np.array([3, 0]))
    np.testing.assert_array_equal(batch[SIZES], rows.sizes_and_crops()[[3, 0]])
    nulls = Condition(null).nulls(batch)
    np.testing.assert_array_equal(nulls[SIZES], batch[SIZES])
    np.testing.assert_array_equal(nulls["text_embeds"], jnp.ones(3))
    # Networks without such numbers, and the refiner's five.
    assert own_sizes(rows, captions_of({"text_embeds": null["text_embeds"]}, 2)) is None
    assert own_sizes(rows, captions_of({SIZES: np.zeros(5, np.float32)}, 2)) is None
    assert own_sizes(ArrayRows({"image": np.zeros((2, 8, 8, 3))}), captions) is None
