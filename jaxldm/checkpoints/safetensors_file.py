"""The safetensors file format: reading with errors for people, writing as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from jaxldm.errors import CheckpointError


def read_safetensors(path: Path | str) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, bit for bit, in host memory.

    Raises:
      CheckpointError: no such file; a header that is not one, or that promises more or less than the file
        holds (a download or a copy that was cut off); a dtype that numpy does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no weight file {path}")
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged ({error}): write or download it again"
        ) from error
    except (AttributeError, KeyError) as error:
        raise CheckpointError(f"{path} has tensors of a dtype that cannot be read here: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The content of a safetensors file with these tensors (contiguous), marked as PyTorch's layout."""
    return safetensors.numpy.save(dict(tensors), metadata={"format": "pt"})
