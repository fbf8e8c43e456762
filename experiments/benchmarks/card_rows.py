"""The rows of `one_card.py` in order of worth, their sizes, and how long each is expected to take.

Nothing here imports JAX or PyTorch: the process that plans must not take the card's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

VARIANTS = ("jaxldm", "eager", "torch.compile")  # the last two are PyTorch's


class Row(NamedTuple):
    """One piece of work.

    Attributes:
        name: for `--rows`.
        title: for the table.
        kind: what `card_jaxldm.KINDS` and `card_torch.KINDS` have a function for.
        sizes: arguments of that function at the published size.
        small: the same for `--dry-run`.
        variants: who does it; whole programs are jaxldm's alone, and a product is not compiled.
    """

    name: str
    title: str
    kind: str
    sizes: Mapping[str, Any]
    small: Mapping[str, Any]
    variants: tuple[str, ...] = VARIANTS


ROWS = (
    Row(
        "correctness",
        "correctness",
        "correctness",
        {"tokens": 1024, "pixels": 64, "channels": 320},
        {"tokens": 40, "pixels": 8, "channels": 32},
        VARIANTS[:2],
    ),
    Row("peak", "matrix peak", "peak", {"size": 8192}, {"size": 256}, VARIANTS[:2]),
    Row(
        "dit-xl-training",
        "DiT-XL/2, 256 pixels",
        "training",
        {"batch_size": 32, "quick": False},
        {"batch_size": 4, "quick": True},
    ),
    Row(
        "flux-1024",
        "FLUX.1-dev, 1024 pixels",
        "model",
        {"family": "flux", "pixels": 1024},
        {"family": "flux", "pixels": 64, "quick": True},
    ),
    Row(
        "sdxl-1024",
        "SDXL, 1024 pixels",
        "model",
        {"family": "sdxl", "pixels": 1024, "steps": 30},
        {"family": "sdxl", "pixels": 64, "steps": 2, "quick": True},
    ),
    Row(
        "sd15-512",
        "SD 1.5, 512 pixels",
        "model",
        {"family": "sd15", "pixels": 512, "steps": 30},
        {"family": "sd15", "pixels": 32, "steps": 2, "quick": True},
    ),
    Row(
        "sd3-1024",
        "SD3 medium, 1024 pixels",
        "model",
        {"family": "sd3", "pixels": 1024},
        {"family": "sd3", "pixels": 64, "quick": True},
    ),
    Row(
        "dit-xl-sampling",
        "DiT-XL/2, 256 pixels",
        "model",
        {"family": "dit-xl", "pixels": 256, "steps": 50, "images": 16},
        {"family": "dit-xl", "pixels": 16, "steps": 2, "images": 2, "quick": True},
    ),
    Row(
        "decode-1024",
        "SDXL's autoencoder",
        "decoding",
        {"family": "sdxl", "pixels": 1024},
        {"family": "sdxl", "pixels": 32, "quick": True},
    ),
    Row(
        "demo",
        "the demo, end to end",
        "demo",
        {"recipe": "mini-ldm", "num_images": 500, "num_inference_steps": 50},
        {"recipe": "smoke", "num_images": 20, "num_inference_steps": 2},
        VARIANTS[:1],
    ),
    Row("captioned-shapes", "captioned shapes, end to end", "captions", {}, {"quick": True}, VARIANTS[:1]),
    Row(
        "few-steps",
        "DiT-B/2, a step of flow matching and of mean flows",
        "few-steps",
        {"batch_size": 64},
        {"batch_size": 4, "quick": True},
        VARIANTS[:1],
    ),
)

# Expected seconds of (jaxldm, eager, torch.compile), building and compiling included, by a part of the
# device's name; other GPUs take OTHER_GPUS times those of an H100. Correct them after each run from the
# column "took": those of GPUs are guesses until a run on one stands in results/.
OTHER_GPUS = 2.0
SECONDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "H100": {
        "correctness": (60, 10),
        "peak": (6, 4),
        "dit-xl-training": (60, 20, 70),
        "flux-1024": (60, 30, 40),
        "sdxl-1024": (90, 30, 110),
        "sd15-512": (70, 20, 80),
        "sd3-1024": (35, 15, 70),
        "dit-xl-sampling": (35, 15, 40),
        "decode-1024": (25, 8, 30),
        "demo": (150,),
        "captioned-shapes": (240,),
        "few-steps": (60,),
    },
    "cpu": {  # the small sizes of --dry-run
        "correctness": (45, 2),
        "peak": (2, 2),
        "dit-xl-training": (10, 3, 3),
        "flux-1024": (10, 2, 3),
        "sdxl-1024": (20, 3, 10),
        "sd15-512": (18, 3, 7),
        "sd3-1024": (6, 2, 2),
        "dit-xl-sampling": (10, 2, 3),
        "decode-1024": (6, 2, 2),
        "demo": (40,),
        "captioned-shapes": (90,),
        "few-steps": (20,),
    },
}


class Unit(NamedTuple):
    """One variant of a row: what is started, or not, as a whole."""

    row: Row
    variant: str


def units(rows: tuple[Row, ...], variants: tuple[str, ...]) -> list[Unit]:
    """All that could be run, in order of worth: the sides of a row one after the other."""
    return [Unit(row, variant) for row in rows for variant in row.variants if variant in variants]


def expected_seconds(unit: Unit, device_kind: str) -> float:
    """How long a unit takes on a device of this kind."""
    known = next((name for name in SECONDS if name.lower() in device_kind.lower()), None)
    seconds = SECONDS["H100" if known is None else known][unit.row.name]
    same_chip = known is not None or "H200" in device_kind
    return seconds[unit.row.variants.index(unit.variant)] * (1.0 if same_chip else OTHER_GPUS)


def fits(unit: Unit, device_kind: str, seconds_left: float) -> str | None:
    """Why a unit is not started; None if it is."""
    needed = expected_seconds(unit, device_kind)
    if needed <= seconds_left:
        return None
    return f"not started: about {needed:.0f} s, and {max(seconds_left, 0):.0f} s are left"
