"""`jaxldm train finetune`: a finished model on further pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxldm.commands import hints
from jaxldm.commands.hosts import SeveralHosts
from jaxldm.commands.options import batch_size, devices_or_mesh, shown
from jaxldm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from jaxldm.training import Recipe, RunFolder

RUN_DIR = "runs/finetune"
_METHOD = "the method's"


@dataclass(frozen=True)
class Finetune(SeveralHosts):
    """Train a finished model further on your own pictures: all of it, a part, or a small LoRA file.

    For example, where SD is the folder of a Stable Diffusion:
      jaxldm train finetune --from SD --data my-pictures --run-dir runs/my-lora
      jaxldm sample SD --prompt "a cat" --lora runs/my-lora/pytorch_lora_weights.safetensors
      jaxldm train finetune --from runs/mini-ldm --data my-digits --method full --run-dir runs/my-digits
      jaxldm train finetune --run-dir runs/my-lora --resume        (after an interruption)

    Methods:
      lora     an adapter of low rank (--rank, --alpha, --targets); the result is one file
      full     every parameter of the denoising network; the result is a model like the first
      freeze   those that no pattern of --freeze names
      dreambooth          one subject: its pictures have the caption --instance-prompt, pictures of
                          --class-prompt keep what the model knows of its class; with --rank it is a LoRA
      textual-inversion   the embeddings of a new --word alone; the result is one file, for sample --embedding

    Pictures are class folders for a model of classes, and have captions (a .txt next to each, metadata.jsonl,
    parquet or tar) for a model that draws from texts. All of them are trained on. Schedule, prediction,
    autoencoder and text encoders are those of the model.
    """

    source: Annotated[str | None, shown("FOLDER", "with --resume that of the run", name="from")] = None
    """The model to start from: a folder in the layout of diffusers, an exported one, or a run folder."""

    data: Annotated[str | None, shown("FOLDER", "with --resume that of the run")] = None
    """Folder of your pictures, or a TFDS name."""

    method: Annotated[str | None, shown("NAME", "lora")] = None
    """lora, full, freeze, dreambooth or textual-inversion."""

    run_dir: Annotated[str, shown("FOLDER")] = RUN_DIR
    """Folder for the checkpoints, logs, samples and the result."""

    resume: bool = False
    """Continue from the last checkpoint in the run folder."""

    rank: Annotated[int | None, shown("INT", "8")] = None
    """Of lora: rank of the change of each layer."""

    alpha: Annotated[float | None, shown("FLOAT", "the rank")] = None
    """Of lora: the change is multiplied with alpha / rank."""

    targets: Annotated[tuple[str, ...] | None, shown("PATTERN ...", "all projections of attention")] = None
    """Of lora: the layers that it changes, by patterns of their paths, as in '*/to_q' '*/to_v'."""

    lora_names: Annotated[str | None, shown("NAME", "diffusers")] = None
    """Of lora: names of the tensors in the file, diffusers or kohya (for a U-Net in ComfyUI)."""

    freeze: Annotated[tuple[str, ...] | None, shown("PATTERN ...", "none")] = None
    """Of freeze: parameters that stay, by patterns of their paths, as in 'down_blocks_*'."""

    instance_prompt: Annotated[str | None, shown("TEXT", "none")] = None
    """Of dreambooth: the caption of all pictures, as in "a photo of sks dog"."""

    class_prompt: Annotated[str | None, shown("TEXT", "none: without pictures of the class")] = None
    """Of dreambooth: what the subject is, as in "a photo of a dog"."""

    class_images: Annotated[str | None, shown("FOLDER", "the model draws them")] = None
    """Of dreambooth: pictures of the class."""

    num_class_images: Annotated[int | None, shown("INT", "100")] = None
    """Of dreambooth: pictures of the class that the model draws before it is trained."""

    prior_weight: Annotated[float | None, shown("FLOAT", "1")] = None
    """Of dreambooth: weight of the loss of the pictures of the class."""

    word: Annotated[str | None, shown("WORD", "none")] = None
    """Of textual-inversion: the new word, as in "<my-cat>"."""

    initial_text: Annotated[str | None, shown("TEXT", "none")] = None
    """Of textual-inversion: what the word is like at first, as in cat."""

    num_vectors: Annotated[int | None, shown("INT", "1")] = None
    """Of textual-inversion: embeddings that the word has, each in place of a token."""

    templates: Annotated[str | None, shown("NAME", "object")] = None
    """Of textual-inversion: the texts that the word is learned in, object or style."""

    epochs: Annotated[int | None, shown("INT", "20")] = None
    """How often each picture is seen."""

    batch_size: Annotated[int | Literal["auto"] | None, shown("INT|auto", "1")] = None
    """Pictures in an update; auto: as many as fit into memory."""

    accumulate: Annotated[int | None, shown("INT", "1")] = None
    """Compute each batch in so many parts, one after another, with the memory of one."""

    learning_rate: Annotated[float | None, shown("FLOAT", "the method's")] = None
    """Highest learning rate, after the warm-up: 1e-4 for LoRA, 5e-6 for dreambooth, 5e-3 for a word, else
    1e-5.
    """

    optimizer: Annotated[str | None, shown("NAME", "adamw")] = None
    """adamw, lion, muon, schedule_free_adamw, or prodigy (at --learning-rate 1 unless given)."""

    condition_dropout: Annotated[float | None, shown("FLOAT", "0.1; 0 for dreambooth and a word")] = None
    """Share of the pictures that are trained on without their caption or class, for guidance."""

    dtype: Annotated[str | None, shown("NAME", "float32")] = None
    """float32 or bfloat16, of the computation; parameters are float32."""

    remat: bool = False
    """Compute the inside of the network's blocks again in the backward pass: less memory, more time."""

    image_size: Annotated[int | None, shown("PIXELS", "the model's")] = None
    """Side to which the central square of each picture is scaled."""

    save_every: Annotated[int | None, shown("INT", "5")] = None
    """Epochs between checkpoints; 0: only at the end."""

    sample_every: Annotated[int | None, shown("INT", "5")] = None
    """Epochs between pictures of what it draws; 0: none."""

    seed: Annotated[int | None, shown("INT", "0")] = None
    """Seed of all random numbers, from 0 to 4294967295."""

    devices: Annotated[int | None, shown("INT", "as many as divide every batch")] = None
    """Number of devices over which each batch is split."""

    mesh: Annotated[str | None, shown("AXIS=INT,...", "all devices along data")] = None
    """Split the batch over data and fsdp, the state over fsdp and tensor, as in data=2,fsdp=4."""

    workers: int = 0
    """Processes that read and decode pictures that do not fit into memory; 0: a thread."""

    quiet: bool = False
    """Print only errors, and no progress bar."""

    def run(self) -> None:
        """Trains, or goes on with a run, and says how to draw with the result."""
        train_further(self)

    def make_recipe(self, run_dir: Path) -> Recipe:
        """The recipe of the options; with --resume and no model, that of the run.

        Raises what `training.finetune_recipe` raises.
        """
        return recipe_of(self, run_dir, self.method or "lora", ("method", *_OPTIONS), "finetune")


def train_further(command: Any) -> None:
    """Run a command of fine-tuning, and say how to draw with the result."""
    command.join_hosts()
    from jaxldm import training

    run_dir = Path(command.run_dir)
    recipe, where = command.agreed(
        lambda: (command.make_recipe(run_dir), devices_or_mesh(command.devices, command.mesh))
    )
    options: dict[str, Any] = where | {"resume": command.resume, "workers": command.workers}
    if command.quiet:
        training.train(recipe, run_dir, **options, log=lambda line: None, bar=False)
        return
    run = training.train(recipe, run_dir, **options)
    if not command.speaks():
        return
    print(f"finished: everything is in {run.path}; try")
    print(f"  {hint_of(run, recipe)}")


def recipe_of(command: Any, run_dir: Path, method: str, names: Sequence[str], word: str) -> Recipe:
    """The recipe of a command's options `names`; with --resume and no model, that of the run.

    `word` is that behind `jaxldm train`. Raises what `training.finetune_recipe` raises.
    """
    from jaxldm import training

    values = {name: getattr(command, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    if command.resume and command.source is None and command.data is None:
        of_run = training.recipe_to_resume(run_dir)
        if of_run is not None and of_run.finetune is not None:
            if given:
                raise InvalidArgumentError(
                    f"--{next(iter(given)).replace('_', '-')} has no effect on a run that goes on: leave it "
                    "out, or give --from and --data, too"
                )
            return of_run
    for name, value in (("from", command.source), ("data", command.data)):
        if value is None:
            what = "the folder of a model" if name == "from" else "a folder of pictures"
            raise InvalidArgumentError(
                f"--{name} is missing: give {what}, as in `jaxldm train {word} --help`"
            )
    given.pop("method", None)
    if command.batch_size is not None:
        given["batch_size"] = batch_size(command.batch_size)
    if given.get("optimizer") == "prodigy":
        given.setdefault("learning_rate", 1.0)  # a factor of the rate that it finds
    return training.finetune_recipe(str(command.source), str(command.data), method, **given)


_OPTIONS = (
    *("rank", "alpha", "targets", "lora_names", "freeze", "instance_prompt", "class_prompt", "class_images"),
    *("num_class_images", "prior_weight", "word", "initial_text", "num_vectors", "templates", "epochs"),
    *("batch_size", "accumulate", "learning_rate", "optimizer", "condition_dropout", "dtype", "remat"),
    *("image_size", "save_every", "sample_every", "seed"),
)


def hint_of(run: RunFolder, recipe: Recipe) -> str:
    """The command that draws with the result of a fine-tuning."""
    from jaxldm import pipelines
    from jaxldm.training.runs import CONTROL_SAMPLES

    own: Any = recipe.finetune
    text = own.prompt or hints.caption_of(run.path) or "a cat in the snow"
    if own.control is not None:
        picture = run.stage("finetune").path / CONTROL_SAMPLES / "0.png"
        words = ["--controlnet", run.path, "--control-image", picture]
        return hints.command("sample", own.source, *words, "--prompt", text)
    option = "--lora" if own.lora is not None else None if own.word is None else "--embedding"
    folder = run.path if option is None else Path(own.source)
    words = [] if option is None else [option, run.path]
    if pipelines.kind_of(folder) != "text-to-image":
        return hints.command("sample", folder, *words, "--num-images", 16)
    prompt = text if own.word is None else f"{own.word.word} in the snow"
    return hints.command("sample", folder, *words, "--prompt", prompt)
