"""`jaxldm sample`: images from a model of classes or of texts."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional

from jaxldm.commands.adapters import check_adapter_guidance
from jaxldm.commands.class_names import read_labels, with_class_names
from jaxldm.commands.control import CONTROL_NAMES, check_has_control, control_options
from jaxldm.commands.image_prompts import OF_IMAGE_PROMPTS, image_prompts, with_ip_adapters
from jaxldm.commands.options import first_devices, named_values, numbers, read_mesh, shown
from jaxldm.commands.prompts import OF_REDUX, redux_states, repeat_prompts
from jaxldm.commands.refiner import check_refiner, options_of, second_options
from jaxldm.commands.terminal import check_seed, print_findings, progress_bar
from jaxldm.errors import InvalidArgumentError

# Options that only one kind of model has, and the names of those that a pipeline's call has under another.
OF_CONTROL = ("control_image", "control_scale", "control_start", "control_end")
OF_CLASSES = ("class_labels", "negative_class_labels")
OF_TEXTS = (
    "prompt",
    "negative_prompt",
    "true_cfg_scale",
    "height",
    "width",
    "image",
    "strength",
    "mask",
    "resize",
    "refiner",
    "refiner_start",
    "embedding",
    "controlnet",
    *OF_CONTROL,
    *OF_IMAGE_PROMPTS,
    *OF_REDUX,
)
# Options that do nothing without another one, and those that do nothing without guidance.
NEEDS = {
    **{"lora_scale": "lora", "refiner_start": "refiner", "ip_adapter": "ip_adapter_image"},
    **dict.fromkeys(("image_encoder", "ip_adapter_image", "ip_adapter_scale"), "ip_adapter"),
    **{"redux": "redux_image", "redux_image": "redux", "redux_scale": "redux"},
    **dict.fromkeys(("strength", "mask"), "image"),
    **dict.fromkeys((*OF_CONTROL[1:], "controlnet"), "control_image"),
}
OF_GUIDANCE = ("guidance_rescale", "negative_class_labels")
REFINER_START = 0.8
WITH_OPTIONS_OF_THEIR_OWN = {
    *("key", "prompt", "negative_prompt", "class_labels", "num_images", "negative_labels"),
}
OPTION_NAMES = {
    "mask_image": "mask",
    **CONTROL_NAMES,
    "denoising_end": "refiner-start",
    "denoising_start": "refiner-start",
}


@dataclass(frozen=True)
class Sample:
    """Sample images from a model: OUT/grid.png, one PNG per image and OUT/samples.npz.

    For example:
      jaxldm sample runs/mini-ldm --class-labels 3 7 --num-images 64 --guidance-scale 3 --output-dir OUT
      jaxldm sample stable-diffusion-v1-5 --prompt "a cat in the snow" --solver dpmpp_2m --dtype bfloat16
      jaxldm sample sdxl-base --refiner sdxl-refiner --prompt "a cat" --height 1024 --width 768
      jaxldm sample stable-diffusion-v1-5 --prompt "a red hat" --image cat.png --mask hat.png

    The same seed samples the same images: image 5 is the same for any number of images, batch size and number
    of devices.

    Defaults of the families:
      family                    steps  guidance scale  strength
      ClassToImage                 50             3.0
      DiT                          50             4.0
      MaskGIT                      12             2.0
      StableDiffusion              50             7.5       0.8
      LDMTextToImage               50             1.0       0.8
      LDMSuperResolution          100             1.0
      StableDiffusionXL            50             5.0       0.3
      InstructPix2Pix             100             7.5
      InstructPix2PixXL           100             5.0
      StableDiffusionUpscale       75             9.0
      StableDiffusionLatentUpscale 75             9.0
      StableDiffusion3             28             7.0       0.6
      Flux (dev)                   28             3.5       0.6
      Flux (schnell)                4             3.5       0.6
      FluxFill                     50            30.0       1.0
      FluxControl                  28             3.5
      FluxKontext                  28             3.5
      Flux2                        50             4.0
      Flux2Klein (base)            50             4.0
      Flux2Klein (distilled)        4             1.0
      PixArt                       20             4.5       0.8
      DeepFloydIF                 100             7.0       0.7
      Wuerstchen                   60             4.0
      Amused                       12            10.0       0.5
      ZImage                       50             6.0       0.6
      QwenImage                    50             1.0       0.6

    With --mask, strength is 1. The solvers of distilled models (lcm, tcd) take 4 steps; latent consistency
    models have guidance scale 8.5. What a student of `jaxldm distill` takes, `jaxldm info STUDENT` says.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`, folder made by `jaxldm export`, or a folder in the layout of
    diffusers.
    """

    prompt: Annotated[tuple[str, ...] | None, shown("TEXT ...", "for text-to-image models")] = None
    """What to draw; several texts repeat in this order until there are --num-images images."""

    negative_prompt: Annotated[tuple[str, ...] | None, shown("TEXT ...", "none")] = None
    """What to avoid: one text for all prompts, or one for each."""

    height: Annotated[int | None, shown("PIXELS", "the model's own, or the image's")] = None
    """Height of the images, with --prompt; a multiple of 8."""

    width: Annotated[int | None, shown("PIXELS", "the model's own, or the image's")] = None
    """Width of the images, with --prompt; a multiple of 8."""

    image: Annotated[str | None, shown("FILE", "none: start from noise")] = None
    """Picture to start from, with --prompt; it is resized to --height and --width where these are given."""

    strength: Annotated[float | None, shown("FLOAT", "the family's; with --mask 1")] = None
    """How much to change --image, up to 1: the fraction of the steps that is taken."""

    mask: Annotated[str | None, shown("FILE", "none")] = None
    """Picture that is white where --image is drawn again and black where it stays."""

    resize: Annotated[str | None, shown("NAME", "stretch, to given sides")] = None
    """Make --image and --mask fit --height and --width, or the nearest sides that the model draws: "crop"
    cuts off what stands out, "pad" repeats the edges, "stretch" changes the proportions.
    """

    refiner: Annotated[str | None, shown("FOLDER", "none")] = None
    """Folder of the SDXL refiner, which continues from an SDXL base model at --refiner-start."""

    refiner_start: Annotated[float | None, shown("FLOAT", "0.8")] = None
    """Fraction of the noise that the base model removes before the --refiner starts."""

    vae: Annotated[str | None, shown("FOLDER", "the model's own")] = None
    """Folder of another autoencoder: one that was trained further, or TAESD, which decodes faster."""

    lora: Annotated[tuple[str, ...] | None, shown("FILE ...", "none")] = None
    """LoRA files (DoRA, LoHa, LoKr too) to merge into the weights of the model."""

    lora_scale: Annotated[tuple[float, ...] | None, shown("FLOAT ...", "1")] = None
    """How much of --lora to merge: one number for all files, or one for each."""

    embedding: Annotated[tuple[str, ...] | None, shown("FILE ...", "none")] = None
    """Files of textual inversion, whose words may then stand in --prompt (Stable Diffusion 1, 2 and XL)."""

    controlnet: Annotated[tuple[str, ...] | None, shown("FOLDER ...", "those of the folder")] = None
    """Folders of ControlNets or T2I-Adapters that draw along --control-image."""

    control_image: Annotated[tuple[str, ...] | None, shown("FILE ...", "none")] = None
    """Picture of edges, depths or poses, one for each --controlnet; resized as --image is."""

    control_scale: Annotated[tuple[float, ...] | None, shown("FLOAT ...", "1")] = None
    """How much --control-image counts: one number for all, or one for each."""

    control_start: Annotated[tuple[float, ...] | None, shown("FLOAT ...", "0")] = None
    """Fraction of the steps after which --control-image counts: one number for all, or one for each."""

    control_end: Annotated[tuple[float, ...] | None, shown("FLOAT ...", "1")] = None
    """Fraction of the steps until which --control-image counts."""

    guess_mode: bool = False
    """Let ControlNets act without guidance, so that a picture is followed with an empty --prompt."""
    ip_adapter: Annotated[tuple[str, ...] | None, shown("FILE ...", "none")] = None
    """IP-Adapters, plain or plus, which make --ip-adapter-image a prompt (Stable Diffusion 1.5 and XL)."""

    image_encoder: Annotated[str | None, shown("FOLDER", "image_encoder next to the file")] = None
    """Folder of the image encoder that --ip-adapter was trained with."""

    ip_adapter_image: Annotated[tuple[str, ...] | None, shown("FILE ...", "none")] = None
    """Pictures as prompts, next to --prompt: one for each --ip-adapter, or several for the one."""

    ip_adapter_scale: Annotated[tuple[float, ...] | None, shown("FLOAT ...", "1")] = None
    """How much --ip-adapter-image counts next to the text: one number, or one for each --ip-adapter."""

    redux: Annotated[str | None, shown("FOLDER", "none")] = None
    """Folder of FLUX.1 Redux, which puts --redux-image in the place of --prompt (FLUX.1)."""

    redux_image: Annotated[tuple[str, ...] | None, shown("FILE ...", "none")] = None
    """Pictures of which --redux makes variations: several become one sum."""

    redux_scale: Annotated[tuple[float, ...] | None, shown("FLOAT ...", "1")] = None
    """How much each --redux-image counts: one number for all, or one for each."""

    options: Annotated[tuple[str, ...] | None, shown("NAME=VALUE ...", "none")] = None
    """Options that only the model's family has, as in `--options clip_skip=1 original_size=[768,768]`."""

    family: Annotated[str | None, shown("MODULE:FAMILY", "the one that the folder names")] = None
    """A family of models of your own: package.module:FAMILY."""

    dtype: Annotated[str | None, shown("NAME", "that of the files")] = None
    """float32, bfloat16 or float16, for folders of diffusers: of the weights and the computation."""

    reference_quirks: bool = False
    """Draw what diffusers draws with the folder, also where its schedulers err: to compare pictures."""

    class_labels: Annotated[tuple[str, ...] | None, shown("LABEL ...", "each of up to 100 once")] = None
    """Classes to draw, counted from 0, or their names, repeated in this order up to --num-images."""

    num_images: Annotated[int | None, shown("INT", "one for each label or prompt")] = None
    """Number of images."""

    num_inference_steps: Annotated[int | None, shown("INT", "the family's, or a student's own")] = None
    """Number of steps from noise to image; more steps are slower and more accurate, but for students of few
    steps.
    """

    guidance_scale: Annotated[float | None, shown("FLOAT", "the family's")] = None
    """Scale of classifier-free guidance: 1 is the model as trained; higher is clearer and varies less."""

    true_cfg_scale: Annotated[float | None, shown("FLOAT", "the family's, mostly 1")] = None
    """Scale of classifier-free guidance for models that take --guidance-scale as an input (FLUX), and for
    Qwen-Image, where it is 4.
    """

    guidance_rescale: Annotated[float | None, shown("FLOAT", "the family's, mostly 0")] = None
    """Between 0 and 1: how much of the contrast that a high guidance scale adds is removed (0.7 is usual)."""

    negative_class_labels: Annotated[tuple[str, ...] | None, shown("LABEL ...", "none")] = None
    """Classes to avoid: one for all images, or several, repeated as --class-labels are."""

    solver: Annotated[str | None, shown("NAME", "ddim, or that of the folder")] = None
    """Solver: ddim, dpmpp_2m, heun, ddpm, ... (`jaxldm info` lists all), or package.module:function."""

    eta: Annotated[float | None, shown("FLOAT", "the solver's own")] = None
    """Fresh noise in each step, for solvers with this option (ddim): 0 is none, 1 is as in DDPM."""

    spacing: Annotated[str | None, shown("NAME", "the one that fits the model")] = None
    """Spacing of the steps: trailing, linspace, karras, ... (`jaxldm info` lists all), or
    package.module:function.
    """

    sigmas: Annotated[tuple[str, ...] | None, shown("FLOAT ...", "none")] = None
    """The noise levels sigma / alpha of the steps, in place of a spacing, from the noisiest down."""

    cache: Annotated[str | None, shown("NAME:NUMBERS", "every step computes all")] = None
    """Reuse the network's blocks of earlier steps, faster and less exact: fora:3 computes them in every third
    step, taylor:4,1 in every fourth and extrapolates between, first-block:0.1 where the first block changes
    by 0.1, and deepcache:3 is fora:3 of U-Nets.
    """

    weak_guidance: Annotated[str | None, shown("NAME:NUMBERS@LAYERS", "none")] = None
    """Guidance away from the network made weak: skip-layers:2.8,0.01,0.2@7+8+9 (SD 3.5), or
    perturbed-attention:3@mid_block (Stable Diffusion, XL); scale, start and stop, then layers.
    """

    free_u: Annotated[tuple[float, float, float, float] | None, shown("S1 S2 B1 B2", "none")] = None
    """FreeU in U-Nets of Stable Diffusion, as in `--free-u 0.9 0.2 1.5 1.6`."""

    token_merging: Annotated[float | None, shown("FLOAT", "none")] = None
    """Share of the tokens, up to 0.75, that are merged with others like them within attention, faster and
    less exact: of DiT, SiT and the U-Nets of Stable Diffusion.
    """

    seed: int = 0
    """Seed of all random numbers, from 0 to 4294967295; another seed samples other images."""

    batch_size: Annotated[int | None, shown("INT", "64; with --prompt 1")] = None
    """Number of images at once; larger is faster on a large device, and needs its memory."""

    devices: Annotated[int | None, shown("INT", "all; with --prompt 1")] = None
    """Number of devices to use."""

    mesh: Annotated[str | None, shown("AXIS=INT,...", "each device has all weights")] = None
    """Split the weights over the devices: `tensor=4`, `fsdp=2,tensor=4`; the rest draw other images."""

    output_dir: Annotated[str, shown("OUT")] = "samples"
    """Folder for the images; it is made where needed, and images of an earlier call in it are replaced."""

    quiet: bool = False
    """Print only errors and warnings, and no progress bar."""

    def run(self) -> None:
        """Checks the options, samples, checks the images, writes them."""
        check_seed(self.seed)

        from jaxldm import pipelines

        pipelines.check_output_folder(self.output_dir)
        check_solver(self.solver)
        check_cache(self.cache)
        texts = pipelines.kind_of(self.folder, self.family) == "text-to-image"
        self._check_options(texts)
        images, guidance_scale, labels, columns = self._of_texts() if texts else self._of_classes()
        print_findings(pipelines.check_drawn(images, guidance_scale))
        pipelines.save_samples(self.output_dir, images, labels, columns)
        if not self.quiet:
            print(f"{len(images)} images: see {self.output_dir}/grid.png; samples.npz holds all of them")

    def _check_options(self, texts: bool) -> None:
        """Raises `InvalidArgumentError` for options of the other kind of model."""
        for name in OF_CLASSES if texts else OF_TEXTS:
            if getattr(self, name) is not None:
                kind = "draws from texts" if texts else "knows no texts"
                raise InvalidArgumentError(
                    f"--{name.replace('_', '-')} is not for this model: {self.folder} {kind}; leave it out"
                )
        if self.resize is not None and self.image is None and self.control_image is None:
            raise InvalidArgumentError("--resize is of --image: give --image, too, or leave it out")
        for name, other in NEEDS.items():
            if getattr(self, name) is not None and getattr(self, other) is None:
                other = other.replace("_", "-")
                raise InvalidArgumentError(
                    f"--{name} is of --{other}: give --{other}, too, or leave it out".replace("_", "-")
                )
        if texts:
            check_has_control(self)
        check_adapter_guidance(self.lora or (), self.guidance_scale)
        for name in OF_GUIDANCE:
            if getattr(self, name) is not None and self.guidance_scale == 1 and self.true_cfg_scale is None:
                raise InvalidArgumentError(
                    f"--{name.replace('_', '-')} has no effect at --guidance-scale 1: leave one of them out"
                )
        if texts and self.prompt is None and self.redux is None and self._takes_texts():
            raise InvalidArgumentError(
                f'{self.folder} draws from texts: give one, as in --prompt "a cat in the snow"'
            )

    def _takes_texts(self) -> bool:
        """Whether a model that draws from no classes takes a text: not one that enlarges a picture alone."""
        import inspect

        from jaxldm.pipelines.folders import family_of

        return "prompt" in inspect.signature(family_of(self.folder, self.family).call).parameters

    def _common_options(self, pipe: Any) -> dict[str, Any]:
        """Where they are given, the options of a call that all models have, and those of the family."""
        from jaxldm import pipelines

        names = ("num_inference_steps", "guidance_scale", "solver", "eta", "spacing", "batch_size", "cache")
        names += ("token_merging",)
        options = {name: getattr(self, name) for name in names}
        sigmas = numbers(self.sigmas, "sigmas")
        if sigmas is not None and self.num_inference_steps is None:
            options["num_inference_steps"] = len(sigmas)
        options |= {"sigmas": sigmas, "guidance_rescale": self.guidance_rescale}
        options["devices"] = None if self.mesh else first_devices(self.devices)
        options |= named_values(self.options, "options", own_options(pipe))
        if self.weak_guidance is not None:
            options["weak_guidance"] = pipelines.read_weak_guidance(self.weak_guidance)
        return {name: value for name, value in options.items() if value is not None}

    def _loading(self) -> dict[str, Any]:
        """Options of `pipelines.load`."""
        mesh = None if self.mesh is None else read_mesh(self.mesh, self.devices)
        quirks = self.reference_quirks
        return {"dtype": self.dtype, "vae": self.vae, "mesh": mesh, "reference_quirks": quirks}

    def _with_changes(self, pipe: Any) -> Any:
        """The model, with the file of --lora in it where there is one, and FreeU."""
        from jaxldm import pipelines

        if self.free_u is not None:
            pipe = pipelines.with_free_u(pipe, *self.free_u)
        if self.lora is None:
            return pipe
        scales = self.lora_scale or (1.0,)
        return pipelines.with_lora(pipe, self.lora, scales[0] if len(scales) == 1 else scales)

    def _of_classes(self) -> tuple[Any, float, Any, int]:
        """(images, guidance scale, labels, columns of the grid) of a model of classes."""
        import jax

        from jaxldm import pipelines

        pipe = self._with_changes(pipelines.load(self.folder, family=self.family, **self._loading()))
        pipe = with_class_names(pipe, self.folder)
        labels = pipe.cycle_labels(read_labels(self.class_labels), self.num_images)
        num_images = (self.num_images or 1) if labels is None else len(labels)
        options = supported(pipe, self._common_options(pipe))
        with progress_bar(pipe.num_callbacks(num_images, **options), "sampling", self.quiet) as progress:
            images = pipe(
                jax.random.key(self.seed),
                labels,
                num_images=num_images,
                negative_labels=read_labels(self.negative_class_labels),
                progress=progress,
                **options,
            )
        columns = pipelines.columns_for(num_images, len(self.class_labels or ()) or pipe.num_classes or 1)
        return images, options.get("guidance_scale", pipe.default_guidance_scale), labels, columns

    def _of_texts(self) -> tuple[Any, float, None, int]:
        """(images, guidance scale, None, columns of the grid) of a text-to-image model."""
        import jax

        from jaxldm import pipelines
        from jaxldm.commands.pictures import read_mask, read_start

        count = self.num_images
        of_texts = self._takes_texts()
        states = redux_states(self)
        if of_texts and not states:
            texts = repeat_prompts(self.prompt or (), self.negative_prompt, count)
            count = len(texts[0])
        else:
            texts, count = (), 1 if count is None else count
        begin = read_start(self.image, self.height, self.width, as_it_is=self.resize is not None)
        mask = None if self.mask is None or begin is None else read_mask(self.mask, begin)
        check_refiner(self)
        loading = self._loading()
        pipe = pipelines.load(self.folder, family=self.family, **loading)
        if not pipe.family.draws_images:
            raise InvalidArgumentError(
                f"{self.folder} holds one stage of a model, a {pipe.family.name}: put all of them into one "
                "folder, as described on the page of the model"
            )
        pipe = with_ip_adapters(self, self._with_changes(pipe))
        for file in self.embedding or ():
            pipe = pipelines.with_embedding(pipe, file)
        if self.controlnet is not None:
            pipe = pipelines.with_control(pipe, self.controlnet, dtype=self.dtype)
        refiner = None if self.refiner is None else pipelines.load(self.refiner, **loading)
        common = self._common_options(pipe) | {"true_cfg_scale": self.true_cfg_scale}
        own = {"strength": self.strength, "mask_image": mask, "resize": self.resize}
        own |= {} if begin is None else {"image": begin.image}
        own |= control_options(self, pipe, begin)
        own |= image_prompts(self) | states
        options = supported(pipe, own | {"height": self.height, "width": self.width} | common)
        total = pipe.num_callbacks(count, **options)
        if not of_texts:
            given = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "num_images": count}
            options |= supported(pipe, given)
        key = jax.random.key(self.seed)
        with warnings_as_lines(), progress_bar(total, "sampling", self.quiet) as progress:
            if refiner is None:
                images = pipe(key, *texts, **options, progress=progress)
            else:
                start = REFINER_START if self.refiner_start is None else self.refiner_start
                first = supported(pipe, {"denoising_end": start, "output": "latents"})
                latents = pipe(key, *texts, **options_of(pipe, options), **first, progress=progress)
                second = common | second_options(start, latents, options)
                images = refiner(
                    key, *texts, **supported(refiner, options_of(refiner, second)), progress=progress
                )
        scale = options.get("guidance_scale", pipe.default_guidance_scale)
        return images, scale, None, pipelines.columns_for(len(images), len(self.prompt or "1"))


def check_solver(solver: str | None) -> None:
    """Raises `UnknownNameError` or `InvalidArgumentError` for a solver that does not exist."""
    from jaxldm import diffusion as D

    if solver is not None:
        D.solvers.make(solver)


def check_cache(cache: str | None) -> None:
    """Raises `UnknownNameError` or `InvalidArgumentError` for a notation that is not of a cache."""
    from jaxldm import diffusion as D

    if cache is not None:
        D.caching.read(cache)


def own_options(pipe: Any) -> list[str]:
    """The options of a call that the model's family adds to those that all have."""
    from jaxldm import pipelines

    shared = {field.name for field in dataclasses.fields(pipelines.Call)}
    return [name for name in pipe.call_options() if name not in shared | WITH_OPTIONS_OF_THEIR_OWN]


def supported(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given. Raises `InvalidArgumentError` for one that the model's family lacks."""
    given = {name: value for name, value in options.items() if value is not None}
    known = pipe.call_options()
    for name in given:
        if name not in known:
            option = OPTION_NAMES.get(name, name.replace("_", "-"))
            raise InvalidArgumentError(f"--{option} is not for a model of the family {pipe.family.name}")
    return given


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Prints the warnings of a pipeline, for example of words beyond the text encoder's length, as lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        print(f"jaxldm: warning: {' '.join(text.split())}", file=sys.stderr)
