"""Published figures, where the images and the weights that they are of are at hand; else skipped.

torch-fidelity 0.4.0, tests/torch_versions_ge_1_13_0 and tests/tf1: the first 5 000 training images of
CIFAR-10 against the first 5 000 test images. About ten minutes on two cores.

dgm-eval, README: 512 training against 512 test images of CIFAR-10, drawn with its seed, DINOv2 ViT-L/14.
About ten minutes on two cores.

cmmd-pytorch, README: the two folders of images of its repository, CLIP ViT-L/14 at 336 pixels.

    JAXLDM_CIFAR10   the folder cifar-10-batches-py
    JAXLDM_WEIGHTS   a folder with pt_inception-2015-12-05-6726825d.pth and, in the layout of transformers,
                     dinov2-large and clip-vit-large-patch14-336
    JAXLDM_CMMD      a clone of cmmd-pytorch, with reference_images and generated_images
"""

import os
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxldm import checkpoints, metrics
from jaxldm.commands import eval_images

FOLDERS = {
    name: pathlib.Path(os.environ.get(f"JAXLDM_{name}", "none")) for name in ("WEIGHTS", "CIFAR10", "CMMD")
}
CIFAR10 = FOLDERS["CIFAR10"]
INCEPTION, DINOV2, CLIP = (
    FOLDERS["WEIGHTS"] / name
    for name in ("pt_inception-2015-12-05-6726825d.pth", "dinov2-large", "clip-vit-large-patch14-336")
)


def needs(**paths):
    """Skips a test where a file or folder is absent, and says which."""
    missing = [f"{what} ({path.name})" for what, path in paths.items() if not path.exists()]
    reason = f"{' and '.join(missing)} not here: see the head of this file"
    return pytest.mark.skipif(bool(missing), reason=reason)


def images_of(*batches):
    """The images of some files of CIFAR-10, in their order: uint8 [N, 32, 32, 3]."""
    pixels = []
    for batch in batches:
        with (CIFAR10 / batch).open("rb") as file:
            pixels.append(pickle.load(file, encoding="bytes")[b"data"])
    return np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@needs(Inception=INCEPTION, images=CIFAR10 / "test_batch")
def test_cifar_10_train_against_test(optimized, tmp_path):
    loaded = checkpoints.load_inception(INCEPTION)
    network = metrics.inception_network(loaded.module, loaded.params, loaded.sha256)
    train, test = (
        metrics.extract(
            metrics.array_set(images_of(batch)[:5000], batch), network, ["pool", "logits"], tmp_path
        )
        for batch in ("data_batch_1", "test_batch")
    )
    np.testing.assert_allclose(metrics.frechet_distance(train["pool"], test["pool"]), 10.3233274, atol=1e-3)
    np.testing.assert_allclose(
        metrics.inception_score_of_splits(train["logits"]), (10.75051, 0.5778723), atol=1e-3
    )
    kid = metrics.kernel_distance(train["pool"], test["pool"])
    np.testing.assert_allclose(kid, (-2.907863e-05, 1.023118e-04), atol=1e-7)
    overlap = metrics.manifold_overlap(train["pool"], test["pool"], k=3)
    np.testing.assert_allclose((overlap.precision, overlap.recall), (0.6852, 0.6908), atol=1e-3)


def embeddings(images, network, folder):
    return metrics.extract(images, network, ["embedding"], folder)["embedding"]


def drawn_by_dgm_eval(images, number=512, seed=13579):
    rows = np.sort(np.random.RandomState(seed).choice(len(images), number, replace=False))
    return metrics.array_set(images[rows], f"{number} of {len(images)}")


@needs(DINOv2=DINOV2, images=CIFAR10 / "test_batch")
def test_cifar_10_in_the_features_of_dinov2(optimized, tmp_path):
    network, _ = eval_images.image_encoder("dinov2", str(DINOV2))
    train, test = (
        embeddings(drawn_by_dgm_eval(images_of(*batches)), network, tmp_path)
        for batches in ([f"data_batch_{k}" for k in range(1, 6)], ["test_batch"])
    )
    np.testing.assert_allclose(metrics.frechet_distance(test, train), 862.53745, rtol=1e-3)
    np.testing.assert_allclose(metrics.polynomial_mmd(test, train), 0.01095, atol=1e-4)
    overlap = metrics.manifold_overlap(test, train, k=5)
    expected = (0.90430, 0.91797, 0.97969, 0.94141)
    np.testing.assert_allclose(tuple(overlap), expected, atol=0.01)


def squares_of(folder, side=336):
    """The central squares of the pictures of a folder, bicubic, as cmmd-pytorch has them."""
    squares = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            squares.append(ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(square) for square in squares])


@needs(CLIP=CLIP, images=FOLDERS["CMMD"] / "reference_images")
def test_the_example_of_cmmd(optimized, tmp_path):
    network, _ = eval_images.image_encoder("clip", str(CLIP))
    real, drawn = (
        embeddings(metrics.array_set(squares_of(FOLDERS["CMMD"] / name), name), network, tmp_path)
        for name in ("reference_images", "generated_images")
    )
    np.testing.assert_allclose(metrics.clip_mmd(drawn, real), 7.696, atol=0.05)


def test_a_skipped_test_says_what_is_missing():
    mark = needs(weights=pathlib.Path("nowhere/x.pth"), images=pathlib.Path(__file__))
    assert mark.args == (True,)
    assert mark.kwargs["reason"] == "weights (x.pth) not here: see the head of this file"
