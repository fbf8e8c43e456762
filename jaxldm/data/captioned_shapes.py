"""TFDS builder `captioned_shapes`: generated pictures of coloured shapes with captions, without TensorFlow.

`captioned_shapes/32` and `captioned_shapes/64` are of that side. Importing this module imports
tensorflow_datasets, so `jaxldm.data.load` imports it late.
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from jaxldm.data import shapes

# Split -> (seed, pictures). The pairs of shape and colour in "held_out" are in no other split.
SPLITS = {"train": (1, 24000), "validation": (2, 1000), "test": (3, 1000), "held_out": (4, 1000)}
_AT_ONCE = 1000
PAIRS = [f"{colour} {shape}" for shape in shapes.SHAPES for colour in shapes.COLOURS]


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """The side of the pictures."""

    image_size: int = 32


class CaptionedShapes(tfds.core.GeneratorBasedBuilder):
    """One coloured shape on a dark or light background, with a caption; its class is colour and shape."""

    name = "captioned_shapes"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(ShapesConfig(name=str(side), image_size=side) for side in (32, 64))

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.image_size  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        features = {
            "image": tfds.features.Tensor(shape=(side, side, 3), dtype=np.uint8),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=PAIRS),
            "attributes": tfds.features.Tensor(shape=(len(shapes.KINDS),), dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            description="Generated pictures of one coloured shape each, with captions.",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        seed, total = SPLITS[split]
        side = self.builder_config.image_size  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        pairs = sorted(shapes.HELD_OUT) if split == "held_out" else shapes.SEEN
        for start in range(0, total, _AT_ONCE):
            numbers = np.arange(start, min(start + _AT_ONCE, total))
            shown = shapes.draw_attributes(seed, numbers, pairs)
            images = shapes.render(seed, numbers, shown, side)
            texts = shapes.captions(seed, numbers, shown)
            for n, image, text, row in zip(numbers, images, texts, np.stack(shown, axis=1), strict=True):
                yield (
                    int(n),
                    {"image": image, "caption": text, "label": int(row[0] * 6 + row[1]), "attributes": row},
                )
