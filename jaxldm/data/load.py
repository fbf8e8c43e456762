"""`load(name)`: a dataset by its TFDS name, prepared on first use, in train, validation and test splits."""

import contextlib
import difflib
import errno
import fnmatch
import importlib
import logging
import os
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxldm.arguments import a_path, checked, count, flag, optional, text
from jaxldm.data.buckets import A_BUCKETS, Buckets
from jaxldm.data.dataset import Dataset, RecordRows
from jaxldm.data.folders import load_folder
from jaxldm.data.layouts import described_files
from jaxldm.data.splits import split_records
from jaxldm.data.tfds_folder import check_shards, prepared_folder
from jaxldm.errors import (
    DataError,
    InvalidArgumentError,
    JaxldmError,
    MissingDependencyError,
    StorageError,
    UnknownNameError,
    one_of,
)
from jaxldm.files import expanded, storage_error
from jaxldm.reading import shown

MAX_RETRIES = 4  # of a connection: after 3 seconds in all
_NAME = re.compile(r"\w+(/[\w.+-]+)*(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)  # name/config:version
CAPTIONS = ("caption", "text", "description")  # names of the feature that describes an image in words
WELL_KNOWN = (
    "mnist5k",
    "captioned_shapes",
    "openmoji",
    "mnist",
    "fashion_mnist",
    "kmnist",
    "cifar10",
    "imagenet2012",
)


@checked(data_dir=optional(a_path))
def data_folder(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns the folder of the datasets.

    `data_dir` if given, else $JAXLDM_DATA_DIR, else $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    """
    choices = (data_dir, os.environ.get("JAXLDM_DATA_DIR"), os.environ.get("TFDS_DATA_DIR"))
    return expanded(next(filter(None, choices), "~/tensorflow_datasets"))


@checked(
    name=text,
    data_dir=optional(a_path),
    image_size=optional(count(1, 2**16)),
    pad_to=optional(count(1, 2**16)),
    buckets=optional(A_BUCKETS),
    hold_out=flag,
)
def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    pad_to: int | None = None,
    buckets: Buckets | None = None,
    hold_out: bool = True,
) -> Dataset:
    """Returns the dataset of a TFDS name, and prepares it first if it is not in the data folder; or the
    pictures of a folder.

    `mnist5k`, `captioned_shapes` and `openmoji` need no network and no TensorFlow; `mnist`, `fashion_mnist`
    and `kmnist` need only a network. tensorflow_datasets prepares all others, most of them with TensorFlow;
    once prepared as array_record, they are read without it.

    A dataset without validation split gets every tenth training record as one. One without test split uses
    its validation split, or else another tenth of the training records. Without class labels all labels are
    0.

    Args:
        name: "mnist5k", "mnist", "cifar10", "emnist/digits", ...; or a folder, "path/to/pictures", of which
            `jaxldm.data.folders` has the layouts, or of a data set that TFDS has prepared.
        data_dir: folder of the datasets; see `data_folder`.
        image_size: side to which the central square of each image is scaled; required where sizes differ.
        pad_to: side of the black square in whose centre each image is then placed: 28x28 digits become 32x32,
            which halves more often.
        buckets: in place of both, for a folder: the training images keep about their ratio of sides.
        hold_out: of a folder, see `jaxldm.data.load_folder`.

    Raises:
        UnknownNameError: there is no dataset of that name.
        MissingDependencyError: mnist5k or openmoji without the packages that hold them.
        DataError: no network, no TensorFlow where it is required, an incomplete folder, no images.
        InvalidArgumentError: `image_size` is missing or not positive; `pad_to` is less than the images' side.

    >>> dataset = load("mnist5k")                                     # doctest: +SKIP
    >>> images, labels = dataset.arrays("train")                      # doctest: +SKIP
    """
    if image_size is not None and image_size < 1:
        raise InvalidArgumentError(f"image_size must be 1 or more, got {image_size}")
    prepared = prepared_folder(expanded(name)) if is_folder(name) else None
    if is_folder(name) and prepared is None:
        options = {"image_size": image_size, "pad_to": pad_to, "buckets": buckets}
        return load_folder(name, **options, hold_out=hold_out)
    if buckets is not None:
        what = "is a TFDS name" if prepared is None else "has a data set of TFDS"
        raise InvalidArgumentError(f"buckets are for folders of pictures, and {shown(name)} {what}")
    if prepared is None and not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"there is no folder {shown(name)}, and it is no name of a TFDS data set: give a folder of "
            "pictures, or a name such as mnist5k, emnist/digits or mnist:3.0.1 (other catalogues are not "
            "read)"
        )
    with _quiet():
        if prepared is None:
            builder, fix = _prepared(name, data_folder(data_dir)), "delete it and run again"
        else:
            builder, fix = _opened(prepared), "prepare it again"
            name = "/".join(filter(None, (builder.name, getattr(builder.builder_config, "name", ""))))
    return _dataset(name, builder, image_size, pad_to, fix)


def _dataset(name: str, builder: Any, image_size: int | None, pad_to: int | None, fix: str) -> Dataset:
    """The dataset of a builder whose data is on disk; `fix`: what to do where it is damaged."""
    image_key, label_key, caption_key = _features(name, builder.info)
    features: Any = builder.info.features
    shape = tuple(features[image_key].shape)
    if image_size is None and None in shape:
        raise InvalidArgumentError(f"the images of {name} differ in size: give image_size, for example 64")
    if image_size is not None:
        shape = (image_size, image_size, shape[2])
    if pad_to is not None:
        if pad_to < max(shape[:2]):
            raise InvalidArgumentError(f"pad_to must be >= {max(shape[:2])}, the images' side, got {pad_to}")
        shape = (pad_to, pad_to, shape[2])
    class_names = tuple(features[label_key].names) if label_key else ("image",)
    where = os.fspath(builder.data_path)
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    origins = {origin for origin, _ in split_records(sizes).values()}
    sources = {origin: _source(builder, origin, fix) for origin in sorted(origins)}
    parts = {
        split: RecordRows(
            sources[origin],
            records,
            image_key,
            label_key,
            image_size,
            where,
            pad_to,
            caption_key,
            fix,
        )
        for split, (origin, records) in split_records(sizes).items()
    }
    terms = builder.info.as_proto.redistribution_info.license
    return Dataset(name, shape, class_names, parts, license=terms)


@checked(dataset=a_path)
def source_name(dataset: str | os.PathLike) -> str:
    """A TFDS name as it is, a folder with its whole path, so that a run is resumed from anywhere."""
    name = os.fspath(dataset)
    folder = isinstance(dataset, os.PathLike) or is_folder(name)
    return os.fspath(expanded(name).absolute()) if folder else name


def is_folder(name: str) -> bool:
    """Whether a dataset is named by its folder: a path, or any folder that there is under no known name."""
    return name.startswith((".", "~", os.sep)) or (name not in WELL_KNOWN and os.path.isdir(name))


def described_source(name: str) -> dict[str, Any]:
    """The names and sizes of the pictures of a folder (`layouts.described_files`); of a TFDS name nothing.

    Raises `DataError`.
    """
    root = expanded(name)
    return described_files(root) if is_folder(name) and root.is_dir() else {}


def _prepared(name: str, folder: pathlib.Path):
    """Returns the TFDS builder of `name`, with its data on disk."""
    builder = _builder(name, folder)
    path = pathlib.Path(builder.data_path)
    with _storage_errors(name, folder):  # a folder without permission cannot even be asked
        prepared = path.exists()
    if prepared and not builder.info.splits:
        raise DataError(f"the folder {path} is incomplete: delete it and run again")
    if not prepared:
        try:
            with _few_retries(), _storage_errors(name, folder):
                builder.download_and_prepare()
        except (MissingDependencyError, DataError, StorageError):
            raise
        except Exception as error:  # TFDS raises assertion, import, download and file errors
            if not (isinstance(error, OSError) and path.exists()):  # else another process was faster
                raise DataError(_why_not_prepared(name, folder, error)) from error
        builder = _builder(name, folder)
    return builder


def _opened(folder: pathlib.Path) -> Any:
    """The builder of a folder that TFDS has prepared, whatever program did it."""
    tfds = _tensorflow_datasets()
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # of the description or of the features: any file may be damaged
        raise DataError(f"cannot open {folder} as a data set of TFDS: {_reason(error)}") from error


@contextlib.contextmanager
def _storage_errors(name: str, folder: pathlib.Path) -> Iterator[None]:
    """Says how to choose another folder of data sets, where there is no permission for that one."""
    try:
        yield
    except OSError as error:
        refused = storage_error(error, folder)
        if refused is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise StorageError(
            f"the dataset {name}: {refused} (the environment variable JAXLDM_DATA_DIR names the folder)"
        ) from error


def _tensorflow_datasets() -> Any:
    """TFDS, all of it: where its own import fails it logs the error, and is an empty module.

    Raises `DataError`, with the cause.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        import tensorflow_datasets as tfds

        if not hasattr(tfds, "builder"):
            importlib.import_module("tensorflow_datasets.public_api")  # fails for the same cause
            raise ImportError("its import was interrupted")
    except Exception as error:
        raise DataError(
            f"the package tensorflow_datasets cannot be imported ({_reason(error)}): look at  python -c "
            "'import tensorflow_datasets'  (may this user read all of Python's folders?)"
        ) from error
    finally:
        logger.setLevel(level)
    return tfds


def _builder(name: str, folder: pathlib.Path):
    tfds = _tensorflow_datasets()
    tfds.disable_progress_bar()
    try:
        if re.split("[/:]", name)[0] == "mnist5k":
            from jaxldm.data.mnist5k import Mnist5k  # by this import TFDS knows it, with a version, too

            if name == "mnist5k":
                return Mnist5k(data_dir=folder, file_format="array_record")
        if name.split("/")[0] in _OWN_OF_SIDES:
            return _of_a_side(name, folder)
        builder = tfds.builder(name, data_dir=folder)
        if builder.info.splits:  # prepared already, perhaps by another program and in another format
            return builder
        from jaxldm.data.idx_images import IdxImages

        if name in IdxImages.builder_configs:
            return IdxImages(config=name, data_dir=folder, file_format="array_record")
        return tfds.builder(name, data_dir=folder, file_format="array_record")
    except UnknownNameError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        raise UnknownNameError("dataset", name, dict.fromkeys([*WELL_KNOWN, *near])) from error
    except Exception as error:  # a builder may import anything and read any file
        absent = _absent_part(tfds, name)
        if absent is not None:
            raise absent from error
        raise DataError(f"cannot open the dataset {shown(name)} in {folder}: {_reason(error)}") from error


def _absent_part(tfds: Any, name: str) -> JaxldmError | None:
    """What to say of a name whose config or version its data set does not have."""
    own, _, version = name.partition(":")
    base, _, config = own.partition("/")
    try:
        cls = tfds.builder_cls(base)
        configs = list(cls.builder_configs)
        versions = list(dict.fromkeys(map(str, filter(None, (cls.VERSION, *cls.SUPPORTED_VERSIONS)))))
    except Exception:  # noqa: BLE001  (of a builder that cannot be imported, the first error says more)
        return None
    if config and not configs:
        return InvalidArgumentError(
            f"the dataset {base} has no configs: give {base} in place of {shown(name)}"
        )
    if config and config not in configs:
        return UnknownNameError(f"config of {base}", config, configs)
    if version and versions and not any(fnmatch.fnmatch(known, version) for known in versions):
        return UnknownNameError(f"version of {base}", version, versions)
    return None


# Builders that draw their pictures, in several sizes -> (module, class, side by default).
_OWN_OF_SIDES = {
    "captioned_shapes": ("captioned_shapes", "CaptionedShapes", "32"),
    "openmoji": ("openmoji_builder", "Openmoji", "64"),
}


def _of_a_side(name: str, folder: pathlib.Path):
    """The builder of "captioned_shapes", "openmoji/128" and so on."""
    own = name.split("/")[0]
    module, class_name, default = _OWN_OF_SIDES[own]
    builder = getattr(importlib.import_module(f"jaxldm.data.{module}"), class_name)
    config = name.removeprefix(own).removeprefix("/") or default
    one_of(f"size of {own}", config, builder.builder_configs)
    return builder(config=config, data_dir=folder, file_format="array_record")


def _source(builder, split: str, fix: str):
    """Returns the stored records of a split, after counting them."""
    path = builder.data_path
    expected = builder.info.splits[split].num_examples
    try:
        source = builder.as_data_source(split)
        found = len(source)
    except NotImplementedError as error:
        raise DataError(
            f"{path} is in a format that cannot be read at random: {fix}, as array_record "
            "(file_format='array_record')"
        ) from error
    except (ValueError, OSError, RuntimeError, IndexError) as error:
        raise DataError(f"cannot read {path} ({_reason(error)}): {fix}") from error
    if found != expected:
        raise DataError(f"{path} has {found} of the {expected} records of {split!r}: {fix}")
    check_shards(builder.info.splits[split], fix)
    return source


def _features(name: str, info) -> tuple[str, str | None, str | None]:
    """Returns the names of the image, of the class label and of the caption feature (None without one)."""
    import tensorflow_datasets as tfds

    images = [
        key
        for key, feature in info.features.items()
        if len(feature.shape or ()) == 3 and feature.np_dtype == np.uint8
    ]
    labels = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if not images:
        raise DataError(f"the dataset {name} has no 8-bit images, only {', '.join(info.features)}")
    preferred = ("image", "label", *(info.supervised_keys or ()))
    texts = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.Text)]
    return (
        next((key for key in preferred if key in images), images[0]),
        next((key for key in preferred if key in labels), labels[0] if labels else None),
        next((key for key in CAPTIONS if key in texts), None),
    )


def _why_not_prepared(name: str, folder: pathlib.Path, error: Exception) -> str:
    if isinstance(error, ImportError):
        fix = "type  pip install tensorflow  (only to prepare it), or copy a folder prepared elsewhere"
    else:
        fix = "it needs a network and disk space, or a folder prepared elsewhere; mnist5k needs neither"
    return f"cannot prepare the dataset {name} in {folder} ({_reason(error)}): {fix}"


def _reason(error: Exception) -> str:
    """Returns the cause of an error in one short line."""
    url = getattr(getattr(error, "request", None), "url", None)  # of the errors of `requests`
    if url:
        return f"no answer from {urllib.parse.urlsplit(url).hostname}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= 200 else reason[:200] + "..."


@contextlib.contextmanager
def _few_retries():
    """Makes TFDS repeat a failed connection for seconds instead of minutes, so that a missing network is
    reported early.
    """
    from tensorflow_datasets.core.download import downloader

    retries = downloader.MAX_RETRIES
    downloader.MAX_RETRIES = min(retries, MAX_RETRIES)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = retries


@contextlib.contextmanager
def _quiet():
    """Sends what TFDS prints to stderr, without its warnings of repeated connections."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the calling program
            yield
    finally:
        logger.setLevel(level)
