"""TFDS builder for MNIST and similar data sets from their original IDX files, without TensorFlow.

The builders of these names in tensorflow_datasets read and encode the images with TensorFlow; this one needs
only numpy. Importing this module imports tensorflow_datasets, so `jaxldm.data.load` imports it late.
"""

import dataclasses
import gzip
import math
import os

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from jaxldm.errors import DataError
from jaxldm.reading import check_regular, reading

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
MOST_AXES = 8  # of an array; MNIST's images have three
MOST_COMPRESSION = 1100  # of gzip: a byte stands for at most so many
DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


@dataclasses.dataclass
class IdxConfig(tfds.core.BuilderConfig):
    """The address of the four files and the names of the ten classes."""

    url: str = ""
    class_names: tuple[str, ...] = DIGITS


def read_idx(path: str | os.PathLike) -> UInt8[np.ndarray, "..."]:
    """Returns the uint8 array of a gzipped IDX file, the format of the original MNIST files.

    The format: two zero bytes, the type (8 for uint8), the number of axes, each extent as a big-endian 32-bit
    number, the values. Raises `DataError` for another or an incomplete file.
    """
    path = os.fspath(path)
    check_regular(path, "file of images", DataError)
    try:
        with reading(path, DataError), gzip.open(path) as file:
            start = file.read(4)
            axes = start[3] if start[:3] == b"\0\0\x08" and len(start) > 3 else 0
            shape = tuple(int(extent) for extent in np.frombuffer(file.read(4 * axes), dtype=">u4"))
            size = math.prod(shape)
            if size > MOST_COMPRESSION * os.stat(path).st_size or not 0 < axes <= MOST_AXES:
                size = -1  # no file of that size holds so many numbers
            numbers = np.frombuffer(file.read(max(size, 0) + 1), dtype=np.uint8)
    except DataError as error:
        raise DataError(f"{path} is not a complete gzip file ({error}): delete it and run again") from error
    if len(shape) < axes or numbers.size != size:
        raise DataError(f"{path} is not a complete IDX file of bytes: delete it and run again")
    return numbers.reshape(shape)


class IdxImages(tfds.core.GeneratorBasedBuilder):
    """Grey 28x28 images of ten classes, 60 000 for training and 10 000 for testing."""

    name = "idx_images"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        IdxConfig(name="mnist", url="https://storage.googleapis.com/cvdf-datasets/mnist/"),
        IdxConfig(
            name="fashion_mnist",
            url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            class_names=GARMENTS,
        ),
        IdxConfig(name="kmnist", url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/", class_names=KANA),
    )

    @property
    def _config(self) -> IdxConfig:
        assert isinstance(self.builder_config, IdxConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(names=list(self._config.class_names)),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        urls = {split: [self._config.url + name for name in names] for split, names in FILES.items()}
        downloaded: dict = dl_manager.download(urls)  # pyright: ignore[reportAssignmentType]
        return {split: self._generate_examples(*paths) for split, paths in downloaded.items()}

    def _generate_examples(self, image_path, label_path):
        images, labels = read_idx(image_path), read_idx(label_path)
        if images.shape != (len(labels), 28, 28):
            raise DataError(
                f"{image_path} has shape {images.shape} for {len(labels)} labels: delete it and run again"
            )
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield row, {"image": image[..., None], "label": int(label)}
