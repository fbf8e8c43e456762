"""`jaxldm inspect`: a model from the inside, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from jaxldm.commands.options import shown
from jaxldm.commands.terminal import check_seed
from jaxldm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from jaxldm.commands.inspect_subject import Subject
    from jaxldm.metrics.page import Section

PAGE = "index.html"


@dataclass(frozen=True)
class Inspect:
    """Show a model from the inside: attention, latents, t-SNE, checkpoints, as one HTML page.

    For example:
      jaxldm inspect runs/mini-ldm
      jaxldm inspect runs/tiny-dit --class-labels 3 7 --noise 1
      jaxldm inspect runs/captioned-shapes
      jaxldm inspect stable-diffusion-v1-5 --prompt "a cat in the snow"

    The page has its pictures in it, needs no network and no scripts, and says under each figure what one
    sees. A run is looked at with its test images (and their captions); of another model the images are drawn
    first.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`, or a model of classes or of texts in the layout of diffusers."""

    output_dir: Annotated[str | None, shown("OUT", "RUN/inspect")] = None
    """Folder for the page, index.html."""

    class_labels: Annotated[tuple[str, ...], shown("LABEL ...", "three classes")] = ()
    """Classes of the images whose attention is shown, one image each: counted from 0, or their names."""

    prompt: Annotated[str | None, shown("TEXT", "none")] = None
    """The text, for a model that draws from texts: images of it are drawn, and attention is shown for each
    of its words. A run of captions needs none: its test images have captions.
    """

    noise: float = 0.5
    """Standard deviation of the noise in the images that the network sees, as a multiple of the image's."""

    point: Annotated[tuple[int, int] | None, shown("ROW COLUMN", "where the image has most detail")] = None
    """The pixel whose patch asks, in the maps from one patch."""

    num_images: Annotated[int | None, shown("INT", "200 of a run's checkpoint, else 16, or 4 of a text")] = (
        None
    )
    """Number of images that are drawn."""

    num_inference_steps: Annotated[int | None, shown("INT", "20, or a student's own")] = None
    """Number of steps from noise to image."""

    inception: Annotated[str | None, shown("FILE", "none")] = None
    """Weights of FID's InceptionV3, as for `jaxldm eval`: adds the FID of each checkpoint of a run."""

    reference_quirks: bool = False
    """Draw what diffusers draws with the folder, also where its schedulers err: to compare pictures."""

    seed: int = 0
    """Seed of all random numbers, from 0 to 4294967295."""

    quiet: bool = False
    """Print only errors and warnings, and no progress bar."""

    def run(self) -> None:
        """Checks the options, loads the model, makes the sections, writes the page."""
        from jaxldm import pipelines
        from jaxldm.commands.inspect_checkpoints import inception_of
        from jaxldm.commands.inspect_figures import new_figure
        from jaxldm.commands.inspect_subject import check_options, default_output, load_subject
        from jaxldm.files import write_atomically
        from jaxldm.metrics.page import page

        check_seed(self.seed)
        self.check_numbers()
        new_figure(1, 1)  # refuses to begin without matplotlib
        out = pipelines.check_output_folder(self.output_dir or default_output(self.folder))
        subject = load_subject(self)
        check_options(subject, self)
        network = inception_of(self)
        name = Path(self.folder).resolve().name
        content = page(f"Inside of {name}", facts(subject), self.sections(subject, network))
        write_atomically(out / PAGE, content)
        if not self.quiet:
            print(f"saved in {out / PAGE}: open it in a browser")

    def sections(self, subject: Subject, network: Any) -> list[Section]:
        """All sections, in the order of the page; what is missing is also said here."""
        from jaxldm.commands import inspect_sections as S
        from jaxldm.commands.inspect_checkpoints import checkpoint_section

        log: Callable[[str], Any] = (lambda line: None) if self.quiet else print
        makers: list[Callable[[], Section]] = [
            lambda: checkpoint_section(subject, self, network, log),
            lambda: S.latents_section(subject),
            lambda: S.attention_section(subject, self),
            lambda: S.embedding_section(subject, self),
        ]
        if subject.captions:
            makers.insert(3, lambda: S.caption_section(subject, self))
        sections = []
        for make in makers:
            section = make()
            sections.append(section)
            log("\n  ".join(filter(None, (section.title, section.note))))
        return sections

    def check_numbers(self) -> None:
        """Raises `InvalidArgumentError` for a number out of range."""
        if not 0 < self.noise <= 1000:
            raise InvalidArgumentError(f"noise must be above 0 and at most 1000, got {self.noise}")
        for name in ("num_images", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{name} must be 1 or more, got {value}")


def facts(subject: Subject) -> list[tuple[str, str]]:
    """What was looked at, for the table on top of the page."""
    from jaxldm import __version__, models

    pipe = subject.pipe
    count = models.param_count(pipe.denoiser.params)
    shape = " x ".join(map(str, subject.x_0.shape[1:]))
    prediction = pipe.prediction
    terms = "" if subject.dataset is None else subject.dataset.license
    rows = [
        ("network", f"{type(pipe.denoiser.module).__name__}, {count:,} parameters"),
        ("draws", f"{shape} {'pixels' if pipe.autoencoder is None else 'latents'}"),
        ("learned", f"{prediction.name}, on the path {type(prediction.path).__name__}"),
        ("looked at", f"{len(subject.x_0)} {subject.source}"),
        ("pictures", terms),
        ("made by", f"jaxldm {__version__}"),
    ]
    return [(name, value) for name, value in rows if value]
