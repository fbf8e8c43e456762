"""The networks that are measured, at their published sizes, and how often a picture calls each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxldm import models

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One call of a network: a preset, and the shapes of inputs that differ from its `example_inputs()`.

    method: of the module, where it is not its `__call__`; then the first shape is the only input.
    """

    preset: str
    shapes: Mapping[int, Shape] = dataclasses.field(default_factory=dict)
    method: str | None = None

    def module(self, dtype: str) -> nn.Module:
        """The network that computes in `dtype`."""
        return models.build(self.preset, dtype=dtype)

    def inputs(self, module: nn.Module) -> list[jax.ShapeDtypeStruct | None]:
        """Shapes of the arrays of the call."""
        inputs = list(module.example_inputs())
        for place, shape in self.shapes.items():
            integers = self.method == "decode_indices"
            dtype = "int32" if integers else inputs[place].dtype
            inputs[place] = jax.ShapeDtypeStruct(shape, dtype)
        return inputs[:1] if self.method else inputs

    @property
    def options(self) -> dict[str, Any]:
        """Of `module.apply`."""
        return {"method": self.method} if self.method else {}


@dataclasses.dataclass(frozen=True)
class Picture:
    """What one picture takes: how often each part is called.

    pixels: height and width.
    how: steps and guidance that the calls come from.
    """

    pixels: int
    calls: Mapping[str, int]
    how: str


def _decoder(preset: str, side: int, channels: int, method: str = "decode") -> Part:
    return Part(preset, {0: (1, side, side, channels)}, method)


def _texts(preset: str, tokens: int) -> Part:
    return Part(preset, {0: (1, tokens)})


DENOISERS = {
    name: Part(name)
    for name in (
        *("tiny-dit", "mini-unet", "dit-s-8", "dit-s-2", "dit-b-4", "dit-xl-2", "sit-xl-2"),
        *("amused-256", "amused-512", "lcm-unet", "sd15-unet", "sdxl-unet"),
        *("pixart-sigma-256", "pixart-sigma-512", "pixart-sigma"),
        *("if-i-xl", "if-ii-l", "flux-schnell", "flux-dev"),
    )
} | {
    # 1024x1024 pixels: 24x24 latents of the prior, 256x256 of the decoder.
    "wuerstchen-prior": Part("wuerstchen-prior", {0: (1, 24, 24, 16), 2: (1, 77, 1280)}),
    "wuerstchen-decoder": Part(
        "wuerstchen-decoder", {0: (1, 256, 256, 4), 2: (1, 24, 24, 16), 3: (1, 77, 1024)}
    ),
    # 77 tokens of CLIP and 256 of T5.
    **{name: Part(name, {2: (1, 333, 4096)}) for name in ("sd3-medium", "sd35-medium", "sd35-large")},
    "z-image": Part("z-image", {0: (1, 128, 128, 16), 2: (1, 128, 2560)}),
    "qwen-image": Part("qwen-image", {2: (1, 128, 3584)}),
    "flux2-dev": Part("flux2-dev"),
    "flux2-klein-4b": Part("flux2-klein-4b"),
    "flux2-klein-9b": Part("flux2-klein-9b"),
}
TEXT_ENCODERS = {
    "clip-l, 77 tokens": _texts("clip-l", 77),
    "openclip-h, 77 tokens": _texts("openclip-h", 77),
    "openclip-bigg, 77 tokens": _texts("openclip-bigg", 77),
    "t5-xxl, 77 tokens": _texts("t5-xxl", 77),
    "t5-xxl, 256 tokens": _texts("t5-xxl", 256),
    "t5-xxl, 300 tokens": _texts("t5-xxl", 300),
    "t5-xxl, 512 tokens": _texts("t5-xxl", 512),
    "qwen3-4b, 128 tokens": _texts("qwen3-4b", 128),
    "qwen3-4b, 512 tokens": _texts("qwen3-4b", 512),
    "qwen3-8b, 512 tokens": _texts("qwen3-8b", 512),
    "mistral-small-3.2, 512 tokens": _texts("mistral-small-3.2", 512),
    "qwen2.5-vl-7b, 162 tokens": _texts("qwen2.5-vl-7b", 162),  # 34 of the chat are left out of them
}
DECODERS = {
    "mini-autoencoder, 28 pixels": _decoder("mini-autoencoder", 7, 4),
    "sd-vae, 256 pixels": _decoder("sd-vae", 32, 4),
    "sd-vae, 512 pixels": _decoder("sd-vae", 64, 4),
    "sdxl-vae, 1024 pixels": _decoder("sdxl-vae", 128, 4),
    "sd3-vae, 1024 pixels": _decoder("sd3-vae", 128, 16),
    "flux2-vae, 1024 pixels": _decoder("flux2-vae", 64, 128),
    "qwen-image-vae, 1024 pixels": _decoder("qwen-image-vae", 128, 16),
    "amused-vq, 256 pixels": Part("amused-vq", {0: (1, 16, 16)}, "decode_indices"),
    "amused-vq, 512 pixels": Part("amused-vq", {0: (1, 32, 32)}, "decode_indices"),
    "wuerstchen-vqgan, 1024 pixels": _decoder("wuerstchen-vqgan", 256, 4),
}
PARTS: dict[str, Part] = DENOISERS | TEXT_ENCODERS | DECODERS

PICTURES = {
    "mini U-Net": Picture(28, {"mini-unet": 100, "mini-autoencoder, 28 pixels": 1}, "50 steps, guided"),
    "Tiny DiT": Picture(28, {"tiny-dit": 50}, "50 steps"),
    "DiT-S/8": Picture(256, {"dit-s-8": 100, "sd-vae, 256 pixels": 1}, "50 steps, guided"),
    "DiT-B/4": Picture(256, {"dit-b-4": 100, "sd-vae, 256 pixels": 1}, "50 steps, guided"),
    "DiT-XL/2": Picture(256, {"dit-xl-2": 100, "sd-vae, 256 pixels": 1}, "50 steps, guided"),
    "SiT-XL/2": Picture(256, {"sit-xl-2": 100, "sd-vae, 256 pixels": 1}, "50 steps, guided"),
    "aMUSEd 256": Picture(
        256,
        {"clip-l, 77 tokens": 2, "amused-256": 24, "amused-vq, 256 pixels": 1},
        "12 steps, guided",
    ),
    "aMUSEd 512": Picture(
        512,
        {"clip-l, 77 tokens": 2, "amused-512": 24, "amused-vq, 512 pixels": 1},
        "12 steps, guided",
    ),
    "PixArt-Sigma 256": Picture(
        256,
        {"t5-xxl, 300 tokens": 2, "pixart-sigma-256": 40, "sd-vae, 256 pixels": 1},
        "20 steps, guided",
    ),
    "LCM": Picture(512, {"clip-l, 77 tokens": 1, "lcm-unet": 4, "sd-vae, 512 pixels": 1}, "4 steps"),
    "SD 1.5": Picture(
        512, {"clip-l, 77 tokens": 2, "sd15-unet": 60, "sd-vae, 512 pixels": 1}, "30 steps, guided"
    ),
    "PixArt-Sigma 512": Picture(
        512,
        {"t5-xxl, 300 tokens": 2, "pixart-sigma-512": 40, "sd-vae, 512 pixels": 1},
        "20 steps, guided",
    ),
    "DeepFloyd IF-I-XL, II-L": Picture(
        256,
        {"t5-xxl, 77 tokens": 2, "if-i-xl": 200, "if-ii-l": 100},
        "100 and 50 steps, guided",
    ),
    "Wuerstchen": Picture(
        1024,
        {
            "openclip-bigg, 77 tokens": 2,
            "wuerstchen-prior": 120,
            "openclip-h, 77 tokens": 1,
            "wuerstchen-decoder": 12,
            "wuerstchen-vqgan, 1024 pixels": 1,
        },
        "60 steps, guided, and 12",
    ),
    "SDXL": Picture(
        1024,
        {
            "clip-l, 77 tokens": 2,
            "openclip-bigg, 77 tokens": 2,
            "sdxl-unet": 60,
            "sdxl-vae, 1024 pixels": 1,
        },
        "30 steps, guided",
    ),
    "PixArt-Sigma": Picture(
        1024,
        {"t5-xxl, 300 tokens": 2, "pixart-sigma": 40, "sdxl-vae, 1024 pixels": 1},
        "20 steps, guided",
    ),
    **{
        title: Picture(
            1024,
            {
                "clip-l, 77 tokens": 2,
                "openclip-bigg, 77 tokens": 2,
                "t5-xxl, 256 tokens": 2,
                preset: 56,
                "sd3-vae, 1024 pixels": 1,
            },
            "28 steps, guided",
        )
        for title, preset in (
            ("SD 3 medium", "sd3-medium"),
            ("SD 3.5 medium", "sd35-medium"),
            ("SD 3.5 large", "sd35-large"),
        )
    },
    "Z-Image": Picture(
        1024, {"qwen3-4b, 128 tokens": 1, "z-image": 9, "sd3-vae, 1024 pixels": 1}, "9 steps (Turbo)"
    ),
    "FLUX.2 klein 4B": Picture(
        1024,
        {"qwen3-4b, 512 tokens": 1, "flux2-klein-4b": 4, "flux2-vae, 1024 pixels": 1},
        "4 steps",
    ),
    "FLUX.2 klein 9B": Picture(
        1024,
        {"qwen3-8b, 512 tokens": 1, "flux2-klein-9b": 4, "flux2-vae, 1024 pixels": 1},
        "4 steps",
    ),
    "FLUX.2-dev": Picture(
        1024,
        {"mistral-small-3.2, 512 tokens": 1, "flux2-dev": 50, "flux2-vae, 1024 pixels": 1},
        "50 steps, guidance as an input",
    ),
    "Qwen-Image": Picture(
        1024,
        {"qwen2.5-vl-7b, 162 tokens": 2, "qwen-image": 100, "qwen-image-vae, 1024 pixels": 1},
        "50 steps, guided",
    ),
    "FLUX.1-schnell": Picture(
        1024,
        {"clip-l, 77 tokens": 1, "t5-xxl, 256 tokens": 1, "flux-schnell": 4, "sd3-vae, 1024 pixels": 1},
        "4 steps",
    ),
    "FLUX.1-dev": Picture(
        1024,
        {"clip-l, 77 tokens": 1, "t5-xxl, 512 tokens": 1, "flux-dev": 28, "sd3-vae, 1024 pixels": 1},
        "28 steps, guidance as an input",
    ),
}
