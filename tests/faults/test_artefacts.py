"""Every artefact of several files, its writer killed at each of its operations: the whole old or the new.

Then the next writer, and after it nothing is left of the killed one.
"""

import errno
import functools
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.faults.kill_points import killed, moments
from jaxldm import checkpoints, files, models, pipelines
from jaxldm.checkpoints.safetensors_file import StoredTensor
from jaxldm.commands.eval import save_results
from jaxldm.errors import StorageError
from jaxldm.metrics import save_png

SHARD_SIZES = (10**9, 700, 2_000)  # one file, many, some


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The shapes of a model are found once."""
    monkeypatch.setattr(models, "shapes", shapes)


shapes = functools.cache(models.shapes)


@functools.cache
def model(version):
    """A tiny network, all its numbers and its scaling factor are the version."""
    config = {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 8}
    module = models.build("mini-autoencoder", scaling_factor=float(version + 1), **config)
    return module, jax.tree.map(lambda leaf: np.full(leaf.shape, version, leaf.dtype), models.shapes(module))


def number_of(module, params):
    """The version that all of a model is of."""
    (number,) = {float(number) for leaf in jax.tree.leaves(params) for number in np.unique(leaf)}
    assert module.config.scaling_factor == number + 1
    return int(number)


def write_model(folder, version):
    checkpoints.save(folder, *model(version), max_shard_size=SHARD_SIZES[version % 3])


def read_model(folder):
    return number_of(*checkpoints.load(folder))


def write_pipeline(folder, version):
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": version + 10}
    parts = {"vae": model(version), "scheduler": scheduler, ("unet", "prior")[version % 2]: None}
    checkpoints.save_components(folder, f"Class{version}Pipeline", parts)


def read_pipeline(folder):
    found = checkpoints.load_components(folder)
    version = number_of(*found["vae"])
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == f"Class{version}Pipeline" and ("unet", "prior")[version % 2] in index
    assert found["scheduler"]["num_train_timesteps"] == version + 10
    return version


@functools.cache
def tokenizer(version):
    """CLIP's files with another end for each version; every third one without merges.txt."""
    import tokenizers

    words = {"[UNK]": 0, f"version{version}": 1, "[CLS]": 2, "[SEP]": 3, "[PAD]": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    content = {"tokenizer_config.json": json.dumps({"model_max_length": version + 10}).encode()}
    if version % 2:
        content["vocab.txt"] = "\n".join(words).encode()
    return checkpoints.tokenizer.Tokenizer(version + 10, 4, backend, content)


def read_tokenizer(folder):
    found = checkpoints.load_tokenizer(folder)
    version = found.max_length - 10
    assert found.backend.token_to_id(f"version{version}") == 1
    assert ("vocab.txt" in found.files) == bool(version % 2)
    return version


def write_samples(folder, version):
    images = np.full((2 + version % 2, 2, 2, 1), version / 127.5 - 1, np.float32)
    pipelines.save_samples(folder, images, np.full(len(images), version))


def read_samples(folder):
    files.finish_interrupted(folder)
    saved = np.load(folder / "samples.npz")
    (version,) = set(np.ravel(saved["images"]).tolist()) | set(saved["labels"].tolist())
    names = {f"image-{k:05d}-class-{version}.png" for k in range(2 + version % 2)}
    assert {path.name for path in folder.glob("*.png")} == names | {"grid.png"}
    for name in names:
        with Image.open(folder / name) as picture:
            assert set(np.ravel(picture)) == {version}
    return version


def write_results(folder, version):
    picture = np.full((2, 2, 1), version, np.uint8)
    grids = {f"grid-w{scale}.png": picture for scale in (1, version + 2)}
    save_results(folder, {"version": version}, f"version {version}\n", grids)


def read_results(folder):
    files.finish_interrupted(folder)
    version = json.loads((folder / "metrics.json").read_text())["version"]
    assert (folder / "metrics.md").read_text() == f"version {version}\n"
    assert {path.name for path in folder.glob("*.png")} == {"grid-w1.png", f"grid-w{version + 2}.png"}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert set(np.ravel(picture)) == {version}
    return version


def write_picture(folder, version):
    save_png(folder / "picture.png", np.full((8, 8, 3), version, np.uint8))


def read_picture(folder):
    with Image.open(folder / "picture.png") as picture:
        return int(np.unique(picture).item())


ARTEFACTS = {
    "model in shards": (write_model, read_model),
    "pipeline": (write_pipeline, read_pipeline),
    "tokenizer": (lambda folder, version: tokenizer(version).save(folder), read_tokenizer),
    "samples": (write_samples, read_samples),
    "evaluation": (write_results, read_results),
    "picture": (write_picture, read_picture),
}


def contents_in(folder):
    """All files and folders next to an artefact and below it."""
    paths = {str(path.relative_to(folder.parent)): path for path in folder.parent.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


def check_every_kill(place, artefact, old, new, add=lambda folder: None):
    """Kills the writing of `new` over `old` (None: over nothing) at each operation."""
    write, read = ARTEFACTS[artefact]
    before, clean = place / "before" / "out", place / "clean" / "out"
    for folder in (before, clean):
        folder.parent.mkdir(parents=True)
        if old is not None:
            write(folder, old)
            add(folder)
    points = moments(clean.parent, lambda: write(clean, new))
    assert read(clean) == new and len(points) > 3
    seen, whole = set(), contents_in(clean)
    for at in points:
        folder = place / str(at) / "out"
        shutil.copytree(before.parent, folder.parent)
        assert killed(folder.parent, at, lambda folder=folder: write(folder, new)) == (at < points[-1])
        # A folder without anything to read is the old state where there was none.
        version = read(folder) if old is not None or is_there(folder) else None
        assert version in (old, new), at
        seen.add(version)
        write(folder, new)
        assert contents_in(folder) == whole, at
        shutil.rmtree(folder.parent)
    assert seen == {old, new}


def is_there(folder):
    files.finish_interrupted(folder)
    return folder.is_dir() and any(not name.startswith(".") for name in os.listdir(folder))


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_new(tmp_path, artefact):
    check_every_kill(tmp_path, artefact, None, 1)


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_over_an_earlier_one(tmp_path, artefact):
    check_every_kill(tmp_path, artefact, 1, 2)


def test_one_file_over_shards(tmp_path):
    check_every_kill(tmp_path, "model in shards", 2, 3)


def with_notes(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "photo.png").write_text("mine")


@pytest.mark.parametrize("artefact", [name for name in ARTEFACTS if name != "pipeline"])
def test_over_an_earlier_one_in_a_folder_with_other_things(tmp_path, artefact):
    check_every_kill(tmp_path, artefact, 1, 2, with_notes)


def test_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    check_every_kill(tmp_path, "pipeline", 1, 3)


def test_tensors_of_the_model_that_is_replaced_may_be_what_is_written(tmp_path):
    """As when a folder is written again in other shards: its tensors are read while it is written."""
    write_model(tmp_path / "out", 1)
    stored = checkpoints.weight_files.open_weights(tmp_path / "out", "diffusion_pytorch_model")[1]
    assert all(isinstance(tensor, StoredTensor) for tensor in stored.values())
    contents = checkpoints.weight_files.weight_contents("diffusion_pytorch_model", stored, 2_000)
    config = (tmp_path / "out" / "config.json").read_bytes()
    files.write_together(tmp_path / "out", contents | {"config.json": config})
    assert read_model(tmp_path / "out") == 1 and len(list((tmp_path / "out").glob("*-of-*"))) > 1


def test_a_living_writer_loses_nothing_to_another(tmp_path):
    """Both write the same names at the same time; leftovers of the dead alone are removed."""
    for killed_name in (".out.00aa11bb.tmp", ".out.tmp", ".y.00aa11bb.tmp"):
        (tmp_path / killed_name).mkdir()
        (tmp_path / killed_name / "half").write_text("")
    with files.folder_written_whole(tmp_path / "out") as first:
        (first / "x").write_text("first")
        files.write_atomically(tmp_path / "x", b"x")
        with files.folder_written_whole(tmp_path / "out") as second:
            (second / "x").write_text("second")
            assert first.is_dir() and not (tmp_path / ".out.tmp").exists()
        assert (tmp_path / "out" / "x").read_text() == "second"
    assert (tmp_path / "out" / "x").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [".y.00aa11bb.tmp", "out", "x"]


def test_a_file_that_somebody_adds_meanwhile_is_kept(tmp_path):
    write_samples(tmp_path / "out", 1)
    with files.folder_written_whole(tmp_path / "out", lambda name: name != "notes.txt") as partial:
        (partial / "new").write_text("")
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert sorted(os.listdir(tmp_path / "out")) == ["new", "notes.txt"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["../mine", "/etc/hostname", ".", "a/../../mine", "link/mine"])
def test_a_forged_list_of_files_to_remove_leads_nowhere(tmp_path, name):
    commit = tmp_path / "model" / ".jaxldm-commit"
    commit.mkdir(parents=True)
    (tmp_path / "mine").write_text("")
    (tmp_path / "model" / "link").symlink_to(tmp_path)
    (commit / ".obsolete.json").write_text(json.dumps([name]))
    with pytest.raises(StorageError, match="leads out of"):
        checkpoints.read_config(tmp_path / "model")
    assert (tmp_path / "mine").exists()


def test_the_folder_keeps_its_permissions_and_its_links(tmp_path):
    write_samples(tmp_path / "real", 1)
    (tmp_path / "real").chmod(0o750)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_samples(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink() and read_samples(tmp_path / "real") == 2
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o750


def test_a_part_that_is_a_link_to_elsewhere_is_not_written_through(tmp_path, monkeypatch):
    """Where files are moved into a folder that stays: refused before anything is changed."""
    write_pipeline(tmp_path / "out", 1)
    (tmp_path / "out" / "vae").rename(tmp_path / "vae")
    (tmp_path / "out" / "vae").symlink_to(tmp_path / "vae")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(StorageError, match="leads out of"):
        write_pipeline(tmp_path / "out", 2)
    assert read_pipeline(tmp_path / "out") == 1 and sorted(os.listdir(tmp_path)) == ["out", "vae"]


def test_the_working_folder_stays_where_it_is(tmp_path, monkeypatch):
    write_samples(tmp_path / "out", 1)
    monkeypatch.chdir(tmp_path / "out")
    inode = os.stat(".").st_ino
    write_samples(".", 2)
    assert os.stat(".").st_ino == inode == (tmp_path / "out").stat().st_ino
    assert read_samples(tmp_path / "out") == 2


def half_moved(folder):
    """A folder whose new files are committed and not moved yet."""
    commit = folder / files._COMMIT
    commit.mkdir(parents=True)
    (commit / "a.txt").write_text("new")
    return commit


def test_a_writer_that_does_not_end_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    descriptor = os.open(half_moved(tmp_path / "run"), os.O_RDONLY)
    try:
        assert files.lock(descriptor)
        with pytest.raises(StorageError, match=r"another process began to write .*run and does not end"):
            files.finish_interrupted(tmp_path / "run")
    finally:
        os.close(descriptor)
    files.finish_interrupted(tmp_path / "run")  # the writer has died
    assert (tmp_path / "run" / "a.txt").read_text() == "new"


def test_a_folder_that_may_not_be_looked_into_is_said_to_be_unreadable(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pathlib.Path, "is_dir", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*no permission to look into this folder"):
        files.finish_interrupted(tmp_path)
