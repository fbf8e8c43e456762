"""One run of a pipeline of diffusers and one of ours, with any scheduler, around the same stand-in network.

The pipelines are tiny; in the place of their network is a function of x and t, so that a run costs little and
what is compared is all that lies around it: rows, times, scales, the noise and where image-to-image begins.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.diffusers_schedulers.scheduler_probes import reference_class, signature
from experiments.diffusers_schedulers.scheduler_runs import IN_PAIRS, IN_SIGMA_SPACE, brownian
from jaxldm import diffusion as D
from jaxldm import models, pipelines

# Modules of tests/pipelines in the order in which they need each other; behind them that of the folder.
_WRITERS = ("reference_pipelines", "t5_parts", "sd3_folders", "z_image_folders")
KEY = jax.random.key(7)
STEPS, STRENGTH = 6, 0.61


class Kind(NamedTuple):
    """A pipeline of diffusers.

    Attributes:
        name: its class.
        write: folder -> a tiny one of it, or of the class whose parts it has.
        channels: of its latents.
        total: the t of our network at pure noise.
        their_total: that of the reference's.
        image: "": it is given none; "start": a run starts from it; "condition": the network sees it, too.
        form: how the reference's network takes x: "plain", "packed" tokens, "tokens" or "rows" of one latent
            each, which the pipeline returns as latents or as they are, or a "list" of pictures, with the
            time from noise to data and an output of the other sign.
        doubles: the network has a second half of channels, which the pipeline leaves out.
        written: arguments of `write`.
        options: of both calls.
        their_options: of the reference's alone.
        opened: the function that opens the reference's in a folder, of the module that writes it; "": the
            usual one.
    """

    name: str
    write: str
    channels: int = 4
    total: float = 1000.0
    their_total: float = 1000.0
    image: str = ""
    form: str = "plain"
    doubles: bool = False
    written: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    their_options: tuple[tuple[str, Any], ...] = ()
    opened: str = ""

    @property
    def starts_from_image(self) -> bool:
        """Whether a run starts from an image."""
        return self.image == "start"

    @property
    def prompt(self) -> Any:
        """Of both calls."""
        return [3] if self.name == "DiTPipeline" else "a cat"


_OF_FLOW = {"channels": 16, "total": 1.0, "options": (("max_sequence_length", 20),)}
_SQUARE = {"options": (("max_sequence_length", 20), ("height", 16), ("width", 16))}
_OF_FLUX = {**_OF_FLOW, **_SQUARE, "their_total": 1.0, "form": "packed"}
_OF_QWEN = _OF_FLUX | {"options": (("max_sequence_length", 256), ("height", 16), ("width", 16))}
_LAYERS = (("text_encoder_out_layers", (1, 2)), ("max_sequence_length", 64))
_AS_IT_IS = (("use_resolution_binning", False), ("clean_caption", False))
KINDS = (
    Kind("StableDiffusionPipeline", "write_sd"),
    Kind("StableDiffusionImg2ImgPipeline", "write_sd", image="start"),
    Kind("StableDiffusionXLPipeline", "write_sdxl"),
    Kind("StableDiffusionXLImg2ImgPipeline", "write_sdxl", image="start"),
    Kind("StableDiffusion3Pipeline", "write_sd3", **_OF_FLOW),
    Kind("StableDiffusion3Img2ImgPipeline", "write_sd3", image="start", **_OF_FLOW),
    Kind(
        "StableDiffusionInstructPix2PixPipeline",
        "write_sd",
        image="condition",
        written=(("in_channels", 8),),
    ),
    Kind("PixArtSigmaPipeline", "write_pixart", doubles=True, their_options=_AS_IT_IS),
    Kind("DiTPipeline", "write_dit", doubles=True),
    Kind("FluxPipeline", "write_flux", written=(("name", "dev"),), **_OF_FLUX),
    Kind(
        "FluxImg2ImgPipeline",
        "write_flux",
        image="start",
        written=(("name", "schnell"),),
        **_OF_FLUX,
    ),
    Kind("ZImagePipeline", "write_z_image", form="list", **_OF_FLOW | _SQUARE),
    Kind("QwenImagePipeline", "write_qwen_image", **_OF_QWEN),
    Kind(
        "Flux2Pipeline",
        "write_flux2",
        channels=12,
        total=1.0,
        their_total=1.0,
        form="rows",
        options=(*_LAYERS[:1], ("max_sequence_length", 232), ("height", 32), ("width", 32)),
        opened="open_flux2",
    ),
    Kind(
        "Flux2KleinPipeline",
        "write_flux2_klein",
        channels=12,
        total=1.0,
        their_total=1.0,
        form="tokens",
        options=(*_LAYERS, ("height", 32), ("width", 32)),
    ),
)


def module_of_tests(name: str) -> ModuleType:
    """A module of tests/pipelines, where the tiny folders are written."""
    if name not in sys.modules:
        path = pathlib.Path(__file__).parents[2] / "tests" / "pipelines" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def stand_in(x: Any, t: Any, xp: Any) -> Any:
    """What a network answers: number by number, so that any layout of the latents will do."""
    return 0.7 * xp.sin(1.5 * x + 0.3 * t) + 0.2 * x


class Pair(NamedTuple):
    """A pipeline of diffusers and ours of the same folder, and the entries of its scheduler."""

    theirs: Any
    ours: pipelines.Pipeline
    quirky: pipelines.Pipeline
    config: dict[str, Any]


@functools.cache
def pair(kind: Kind) -> Pair:
    """Both, with the stand-in in the reference's."""
    import diffusers

    writers: dict[str, Any] = {}
    own = kind.write.replace("write", "", 1).strip("_").removesuffix("_klein") + "_folders"
    for name in _WRITERS if kind.write in ("write_sd", "write_sdxl") else (*_WRITERS, own):
        writers |= vars(module_of_tests(name))
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = writers[kind.write](pathlib.Path(place) / "folder", **dict(kind.written))
        if kind.opened:
            made = writers[kind.opened](folder)
        else:
            made = writers["open_reference"](getattr(diffusers, kind.name), folder)
        if kind.image == "condition":  # its own class, with the parts of another
            made.save_pretrained(folder)
        ours, quirky = (pipelines.load(folder, reference_quirks=quirks) for quirks in (False, True))
    network = made.unet if hasattr(made, "unet") else made.transformer
    network.forward = functools.partial(_their_answer, kind)
    return Pair(made, ours, quirky, dict(made.scheduler.config))


class _Answer(NamedTuple):
    """What a network of the reference returns, with or without `return_dict`."""

    sample: Any


def _their_answer(kind: Kind, *arguments: Any, **options: Any) -> _Answer:
    """The stand-in in the place of the reference's network: of x and t alone."""
    x = arguments[0] if arguments else options.get("sample", options.get("hidden_states"))
    timestep = arguments[1] if len(arguments) > 1 else options["timestep"]
    x = torch.stack(list(x)) if kind.form == "list" else x
    t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, *[1] * (x.ndim - 1)) / kind.their_total
    if kind.form == "list":
        return _Answer(list(-stand_in(x, 1 - t * kind.their_total, torch)))
    x = x if kind.form in ("packed", "tokens", "rows") else x[:, : kind.channels]
    answer = stand_in(x, t, torch)
    return _Answer(torch.cat([answer, answer], 1) if kind.doubles else answer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the reference about schedulers that its authors did not mean."""
    import diffusers

    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def config_of(kind: Kind, scheduler: str, **changes: Any) -> dict[str, Any]:
    """The file of a scheduler that was made from that of the folder, as `from_config` of diffusers does."""
    with quiet():
        made = reference_class(scheduler).from_config(pair(kind).config, **changes)
        config = json.loads(made.to_json_string())
    known = signature(scheduler)
    return {key: value for key, value in config.items() if key in known} | {"_class_name": scheduler}


def image(kind: Kind) -> np.ndarray:
    """Latents to start from."""
    return np.random.default_rng(6).standard_normal((1, 8, 8, kind.channels)).astype(np.float32)


@functools.cache
def step_noise(channels: int, step: int) -> np.ndarray:
    """The noise of our image 0 at a step."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(D.image_keys(KEY, 1), np.uint32(step))
    return np.asarray(D.solvers.noise_like(keys, np.zeros((1, 8, 8, channels), np.float32)))


def first_noise(channels: int) -> np.ndarray:
    """The noise that our image 0 starts from, before it is scaled."""
    unit = D.Grid(*(np.asarray(column, np.float32) for column in (np.zeros(2), np.zeros(2), np.ones(2))))
    return np.asarray(D.initial_noise(KEY, (1, 8, 8, channels), unit))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _as_theirs(kind: Kind, array: np.ndarray) -> torch.Tensor:
    """Latents as the reference's pipeline has them."""
    latents = _tensor(array)
    return module_of_tests("flux_folders").packed(latents) if kind.form == "packed" else latents


def theirs(kind: Kind, config: dict[str, Any]) -> np.ndarray:
    """Latents [1, 8, 8, C] of the pipeline of diffusers with that scheduler, in the scheduler's scale."""
    made, name = pair(kind).theirs, config["_class_name"]
    with quiet(), contextlib.ExitStack() as patches:
        scheduler = reference_class(name).from_config(config)
        made.scheduler = scheduler
        # Pipelines of flow matching round the number of steps that are left out, the others of those taken.
        left_out = int(STEPS - STEPS * STRENGTH) if kind.total == 1 else STEPS - int(STEPS * STRENGTH)
        first, taken = left_out if kind.starts_from_image else 0, [0]
        step = scheduler.step

        @functools.wraps(step)
        def counted(*arguments, **options):
            taken[0] += 1
            if name == "DPMSolverSDEScheduler":
                scheduler.noise_sampler = brown
            return step(*arguments, **options)

        def brown(sigma, following):
            row, half = divmod(taken[0] - 1, 2)
            shape = 1, 8, 8, kind.channels
            return brownian(KEY, shape, first + row, half == 1, float(sigma / following))

        def noise(*arguments, **options):
            row = (taken[0] - 1) // (2 if name.startswith(IN_PAIRS) else 1)
            noise = _as_theirs(kind, step_noise(kind.channels, first + row))
            return noise[:, :, None] if kind.form == "list" and len(arguments[0]) == 5 else noise

        scheduler.step = counted
        module: Any = sys.modules[type(scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            patches.enter_context(mock.patch.object(module, "randn_tensor", noise))
        call = {"num_inference_steps": STEPS, "guidance_scale": _scale(kind), "output_type": "latent"}
        call |= dict(kind.options + kind.their_options)
        start = _tensor(first_noise(kind.channels))
        call["latents"] = _as_theirs(kind, first_noise(kind.channels))
        if kind.image:
            call["image"] = _tensor(image(kind))
        if kind.starts_from_image or kind.name == "DiTPipeline":
            outer: Any = sys.modules[type(made).__module__]
            patches.enter_context(mock.patch.object(outer, "randn_tensor", lambda *args, **options: start))
            del call["latents"]
        if kind.starts_from_image:
            call["strength"] = STRENGTH
        with torch.no_grad():
            drawn = (
                _of_dit(made, kind, call)
                if kind.name == "DiTPipeline"
                else made(prompt=kind.prompt, **call).images
            )
        if kind.form == "packed":
            drawn = made._unpack_latents(drawn, 16, 16, made.vae_scale_factor)
            drawn = drawn[:, :, 0] if drawn.ndim == 5 else drawn  # one frame
        if kind.form == "rows":
            drawn = drawn.reshape(1, 8, 8, kind.channels).permute(0, 3, 1, 2)
        if kind.form == "tokens":
            drawn = _normalised(made, drawn)
        return drawn.numpy().transpose(0, 2, 3, 1)


def _normalised(made: Any, drawn: torch.Tensor) -> torch.Tensor:
    """The latents that FLUX.2 draws, of those of its autoencoder's convolutions."""
    mean, variance = (
        values.view(1, -1, 1, 1) for values in (made.vae.bn.running_mean, made.vae.bn.running_var)
    )
    return (made._patchify_latents(drawn) - mean) / torch.sqrt(variance + made.vae.config.batch_norm_eps)


def _scale(kind: Kind) -> float:
    """No guidance: 0 for the pipeline that counts it from there."""
    return 0.0 if kind.form == "list" else 1.0


def _of_dit(made: Any, kind: Kind, call: dict[str, Any]) -> torch.Tensor:
    """Its latents, which the pipeline shows nobody but the autoencoder."""
    seen = []

    def decode(z):
        seen.append(z)
        return SimpleNamespace(sample=torch.zeros(1, 3, 16, 16))

    with mock.patch.object(made.vae, "decode", decode):
        made(kind.prompt, **call | {"output_type": "np"})
    return seen[0] * made.vae.config.scaling_factor


def ours(kind: Kind, config: dict[str, Any], *, quirks: bool) -> np.ndarray:
    """The same of ours; without quirks from the first noise of the reference."""
    pipe = (pair(kind).quirky if quirks else pair(kind).ours).replace(scheduler=config)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0} | dict(kind.options)
    grid = pipe.family.grid(pipe, _read(pipe, call), pipe.latent_spec.default_size)[1]
    if kind.image:
        call["image"] = pipelines.Latents(image(kind))
    if kind.starts_from_image:
        call["strength"] = STRENGTH
    elif not quirks or kind.name == "DiTPipeline":
        call["latents"] = first_noise(kind.channels) * _first_scale(kind, config, grid)
    standing = mock.patch.object(
        models, "network", lambda module: lambda params, x, t, condition: _answer(kind, x, t)
    )
    with standing:
        x = pipe(KEY, kind.prompt, output="latents", **call)
    return x / grid.alpha[-1] if config["_class_name"].startswith(IN_SIGMA_SPACE) else x


def _answer(kind: Kind, x: Any, t: Any) -> Any:
    answer = stand_in(x[..., : kind.channels], jnp.reshape(t / kind.total, (-1, *[1] * (x.ndim - 1))), jnp)
    return jnp.concatenate([answer, answer], -1) if kind.doubles else answer


def _read(pipe: pipelines.Pipeline, call: dict[str, Any]) -> Any:
    from jaxldm.pipelines.pipeline import read_call

    return read_call(pipe, call)


def _first_scale(kind: Kind, config: dict[str, Any], grid: D.Grid) -> float:
    """Of the reference's first noise, in our scale."""
    if kind.name == "DiTPipeline" or kind.total == 1:
        return 1.0  # whatever the scheduler says
    with quiet():
        scheduler = reference_class(config["_class_name"]).from_config(config)
        scheduler.set_timesteps(STEPS)
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return scale * float(grid.alpha[0]) if config["_class_name"].startswith(IN_SIGMA_SPACE) else scale
