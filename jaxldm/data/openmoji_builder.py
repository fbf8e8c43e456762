"""TFDS builder `openmoji`: pictures of emoji with their names, drawn once, without TensorFlow.

`openmoji/64` and `openmoji/128` are of that side. Importing this module imports tensorflow_datasets, so
`jaxldm.data.load` imports it late.
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from jaxldm.data import openmoji

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass
class OpenmojiConfig(tfds.core.BuilderConfig):
    """The side of the pictures."""

    image_size: int = 64


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """Colour pictures of emoji on white; the caption is the name, the class its group."""

    name = "openmoji"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(OpenmojiConfig(name=str(side), image_size=side) for side in openmoji.SIDES)

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.image_size  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        features = {
            "image": tfds.features.Tensor(shape=(side, side, 3), dtype=np.uint8),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(openmoji.GROUPS)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            description="OpenMoji's colour pictures on white with their English names. The names in "
            "validation and test, a tenth, are in no other split.",
            homepage="https://openmoji.org",
            license=openmoji.LICENSE,
        )

    def _split_generators(self, dl_manager):
        drawn = openmoji.draw_all(self.builder_config.name)  # pyright: ignore[reportOptionalMemberAccess]
        return {split: self._generate_examples(drawn, split) for split in SPLITS}

    def _generate_examples(self, drawn: openmoji.Drawn, split: str):
        for number, own in enumerate(drawn.splits):
            if own == split:
                image, name, group = drawn.images[number], drawn.names[number], drawn.groups[number]
                yield number, {"image": image, "caption": name, "label": group}
