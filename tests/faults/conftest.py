"""What is killed here is killed thousands of times: nothing waits for a disk."""

import os
import tempfile
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path():
    """A folder in memory, where the system has one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Files are as durable as they need to be."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
