"""Paths that the system refuses: without permission, too long, below a file, without a home folder."""

import contextlib
import os
import pwd
import sys
import types
from unittest import mock

import pytest

from jaxldm import checkpoints, data, host, metrics, pipelines, training
from jaxldm.arguments import a_path, checked, function
from jaxldm.cli import describe_os_error
from jaxldm.errors import DataError, InvalidArgumentError, JaxldmError, StorageError
from jaxldm.files import expanded

OPENERS = {
    "checkpoints.load": checkpoints.load,
    "checkpoints.load_lora": checkpoints.load_lora,
    "checkpoints.load_tokenizer": checkpoints.load_tokenizer,
    "checkpoints.read_weights": checkpoints.read_weights,
    "data.load_folder": data.load_folder,
    "data.load": lambda path: data.load(str(path)),
    "metrics.open_image_set": metrics.open_image_set,
    "pipelines.kind_of": pipelines.kind_of,
    "pipelines.load": pipelines.load,
    "training.read_kept": lambda path: training.read_kept(path, 1),
    "training.read_log": training.read_log,
}


@pytest.fixture
def refusing():
    """A function that makes the system refuse to look at a folder, as for other users than root."""
    real = os.stat

    def refuse(folder):
        def stat(path, *args, **kwargs):
            if str(path).startswith(str(folder) + os.sep):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        patched.enter_context(mock.patch.object(os, "stat", stat))

    with contextlib.ExitStack() as patched:
        yield refuse


@pytest.mark.parametrize("name", OPENERS)
def test_what_cannot_be_looked_at_is_said_in_one_line(name, tmp_path, refusing):
    (tmp_path / "closed").mkdir()
    refusing(tmp_path / "closed")
    for path in (tmp_path / "closed" / "a" / "b", tmp_path / ("x" * 300)):
        with pytest.raises(JaxldmError) as caught:
            OPENERS[name](path)
        message = str(caught.value).replace(str(path), "PATH")
        assert "\n" not in message and len(message) <= 400


def test_errors_of_other_paths_pass(tmp_path):
    @checked(path=a_path, call=function("()"))
    def run(path, call):
        call()

    def of(path, code=13):
        def call():
            raise OSError(code, os.strerror(code), path)

        return call

    for inside in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(StorageError, match="no permission: check who may") as caught:
            run(tmp_path, of(str(inside)))
        assert str(inside) in str(caught.value) and isinstance(caught.value.__cause__, PermissionError)
    with pytest.raises(StorageError, match=r"File name too long: check this path"):
        run(tmp_path, of(str(tmp_path / "a"), 36))
    for outside in (str(tmp_path) + "-else", "/etc/passwd", 3, None):
        with pytest.raises(PermissionError) as caught:
            run(tmp_path, of(outside))
        assert not isinstance(caught.value, JaxldmError)


@pytest.fixture
def homeless(monkeypatch):
    """A user without an account, as in some containers."""

    def unknown(*user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "JAXLDM_DATA_DIR", "TFDS_DATA_DIR", host.COMPILATION_CACHE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_a_user_without_a_home_folder(homeless, tmp_path):
    assert host.user_cache_folder() is None and host.compilation_cache_folder() is None
    with pytest.raises(InvalidArgumentError, match="write the whole path, or set HOME"):
        data.data_folder()
    with pytest.raises(InvalidArgumentError, match="home folder of '~nobody/x' is not known"):
        data.load("~nobody/x")
    assert data.data_folder(tmp_path) == expanded(tmp_path) == tmp_path


def test_an_import_of_tfds_that_failed_half_is_said(monkeypatch):
    """TFDS logs the errors of its own import and goes on as an empty module."""
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.ModuleType("tensorflow_datasets"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.public_api", None)
    with pytest.raises(DataError, match=r"tensorflow_datasets cannot be imported \(.*public_api"):
        data.load("mnist")


def test_a_folder_of_data_sets_without_permission_is_named(tmp_path, refusing):
    (tmp_path / "closed").mkdir()
    refusing(tmp_path / "closed")
    with pytest.raises(StorageError, match=r"mnist5k: .*no permission.*JAXLDM_DATA_DIR"):
        data.load("mnist5k", data_dir=tmp_path / "closed" / "data")


def test_a_file_that_may_not_be_read_is_not_said_to_be_written():
    """As `jaxldm info` of a run with a folder that is closed."""
    line = describe_os_error(PermissionError(13, "Permission denied", "run/log.csv"))
    assert line.startswith("run/log.csv: no permission: check who may read") and "write run" not in line
