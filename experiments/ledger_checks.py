"""The rows of the ledger that are computed again in seconds: see `experiments.ledger`."""

from __future__ import annotations

from collections.abc import Callable


def demo_parameters() -> list[float]:
    """Millions of parameters of the demo's denoising network and autoencoder."""
    from jaxldm import models

    return [(models.count_params("mini-unet") + models.count_params("mini-autoencoder")) / 1e6]


def gallery_parameters() -> list[float]:
    """The same, and those of Tiny DiT."""
    from jaxldm import models

    return [*demo_parameters(), models.count_params("tiny-dit") / 1e6]


def dit_operations() -> list[float]:
    """G multiply-accumulates of DiT in the order of the page's table."""
    from jaxldm import models

    return [models.count_macs(f"dit-{size}-{p}") / 1e9 for size in ("s", "b", "l", "xl") for p in (8, 4, 2)]


def family_parameters() -> list[float]:
    """Billions of parameters of the networks in the table of families, in its order."""
    from jaxldm import models

    names = ("sd15-unet", "lcm-unet", "sd21-unet", "sdxl-unet", "sdxl-refiner-unet", "playground-unet")
    names += (
        "sd3-medium",
        "sd35-medium",
        "sd35-large",
        "flux-dev",
        "flux-schnell",
        "flux2-dev",
        "flux2-klein-4b",
        "flux2-klein-9b",
        "z-image",
        "qwen-image",
        "pixart-sigma",
    )
    names += ("dit-s-8", "dit-xl-2", "sit-s-8", "sit-xl-2", "amused-256", "amused-512")
    names += ("wuerstchen-prior", "wuerstchen-decoder", "if-i-xl", "if-ii-l")
    return [models.count_params(name) / 1e9 for name in names]


CHECKS: dict[str, Callable[[], list[float]]] = {
    "demo_parameters": demo_parameters,
    "gallery_parameters": gallery_parameters,
    "dit_operations": dit_operations,
    "family_parameters": family_parameters,
}
