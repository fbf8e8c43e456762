"""More compute for a better digit: every search of `D.search`, judged by one who did not choose.

Question: which search makes the demo's digits readable at w = 1, for how many evaluations, at what loss of
          diversity, and does it beat more steps or more guidance for as many evaluations?
Command:  python -m experiments.less_compute.search --run-dir runs/mini-ldm
Needs:    a finished run folder (make demo), the `demo` and `plots` extras; two CPU cores, no accelerator.
          Minutes and what came out: README.md in this folder. A second call goes on where the first one
          stopped; --quick draws few digits in few steps, to see that everything runs.

The verifier is log p(label | digit) of the run's classifier, which chooses; a second classifier of another
kind, trained on other digits, says how many are right. The difference between the two is what was gamed.
"Good enough" is the verifier cut off at --enough: of candidates that are surely right the first one is taken,
and not the one that looks most like its class.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.few_steps import judge
from experiments.figures import quick_options, save_figure
from experiments.results import Results, markdown, save_table
from experiments.trained import check_demo, load_classifier, load_dataset, load_latent_model, weights_hash
from jaxldm import checkpoints, data, host, metrics, models, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script

S = D.search


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        draw: (problem, key per image) -> latents.
        evaluations: (steps) -> of the network, for an image. A gradient through the network counts two
            more than the evaluation itself.
        kind: its mark in the picture.
    """

    draw: Callable[[Problem, Any], Any]
    evaluations: Callable[[int], int]
    kind: str


class Problem(NamedTuple):
    """A batch of digits to draw: what every search is given.

    Attributes:
        denoise: guidance scale -> denoiser of these labels.
        verifier: latents -> log p(label | digit).
        enough: the score at which a digit is good enough.
        path: of the denoiser.
        steps: of one run.
        shape: of the latents, [B, h, w, c].
    """

    denoise: Callable[[float], D.Denoiser]
    verifier: Callable[[Any], Any]
    enough: float
    path: D.Path
    steps: int
    shape: tuple[int, ...]

    def grid(self, times: float = 1) -> D.Grid:
        """The grid of so many times the steps."""
        return D.make_grid(self.path, max(2, round(self.steps * times)))

    def score(self, enough: bool) -> Callable[[Any], Any]:
        """The verifier, or the one that is content with what is good enough."""
        return (lambda x: jnp.minimum(self.verifier(x), self.enough)) if enough else self.verifier

    def search(self, by: Callable[..., Any], keys: Any, x_T: Any, enough: bool, **options: Any) -> Any:
        """The latents that a search of `D.search` finds without guidance; by DDIM, or another `solver`."""
        solver = options.pop("solver", D.solvers.ddim())
        given = (keys, self.denoise(1.0), solver, self.grid(), x_T, self.score(enough))
        return by(*given, **options).x_0


def plain(times: float = 1, scale: float = 1.0, solver: D.Solver | None = None) -> Method:
    """Sampling, in so many times the steps."""
    chosen = D.solvers.ddim() if solver is None else solver

    def draw(problem, keys):
        grid = problem.grid(times)
        x_T = D.initial_noise(keys, problem.shape, grid)
        return D.sample(keys, problem.denoise(scale), chosen, grid, x_T)

    cost = 1 if scale == 1 else 2
    kind = "guidance" if scale != 1 else "sampling alone"
    return Method(draw, lambda steps: cost * max(2, round(steps * times)), kind)


def best_of(count: int, enough: bool = False) -> Method:
    """Best of N."""

    def draw(problem, keys):
        x_T = S.candidate_noise(keys, problem.shape, problem.grid(), count)
        return problem.search(S.best_of_n, keys, x_T, enough)

    return Method(draw, lambda steps: count * steps, "best of N, good enough" if enough else "best of N")


def neighbours(rounds: int, radius: float, enough: bool = False) -> Method:
    """Zero-order search, one neighbour a round."""

    def draw(problem, keys):
        x_T = D.initial_noise(keys, problem.shape, problem.grid())
        options = {"num_neighbours": 1, "num_rounds": rounds, "radius": radius}
        return problem.search(S.zero_order_search, keys, x_T, enough, **options)

    return Method(draw, lambda steps: (1 + rounds) * steps, "zero-order search")


def rows_of_paths(steps: int) -> dict[str, int]:
    """Where a search over paths begins, and how far it goes back and forth."""
    forward = max(2, steps // 6)
    return {"first": max(1, steps // 2), "back": max(1, forward // 4), "forward": forward}


def paths(width: int, children: int, enough: bool = False) -> Method:
    """Search over paths."""

    def draw(problem, keys):
        x_T = S.candidate_noise(keys, problem.shape, problem.grid(), width)
        rows = rows_of_paths(problem.steps)
        return problem.search(S.search_over_paths, keys, x_T, enough, num_children=children, **rows)

    def evaluations(steps):
        first, back, forward = rows_of_paths(steps).values()
        starts = range(first, steps, forward - back)
        rounds = sum(min(start - back + forward, steps) - (start - back) for start in starts)
        return width * first + width * children * rounds

    return Method(draw, evaluations, "search over paths")


def steered(count: int, potential: str, scale: float, enough: bool = False) -> Method:
    """Feynman-Kac steering: the best of the particles."""

    def draw(problem, keys):
        x_T = S.candidate_noise(keys, problem.shape, problem.grid(), count)
        options = {"solver": D.solvers.ddpm(), "reward_scale": scale, "potential": potential}
        return problem.search(S.steer, keys, x_T, enough, **options)

    return Method(draw, lambda steps: count * steps, "steering")


def ascended(eta: float) -> Method:
    """Gradient ascent before each step."""

    def draw(problem, keys):
        solver = S.gradient_ascent(D.solvers.ddim(), problem.verifier, eta)
        x_T = D.initial_noise(keys, problem.shape, problem.grid())
        return D.sample(keys, problem.denoise(1.0), solver, problem.grid(), x_T)

    return Method(draw, lambda steps: 4 * steps, "gradients")


def guided_by_verifier(scale: float) -> Method:
    """Classifier guidance by the verifier of x_0 (universal guidance)."""

    def draw(problem, keys):
        denoise = problem.denoise(1.0)
        guided = D.classifier_guidance(denoise, lambda x, t: problem.verifier(denoise(x, t)), scale)
        x_T = D.initial_noise(keys, problem.shape, problem.grid())
        return D.sample(keys, guided, D.solvers.ddim(), problem.grid(), x_T)

    return Method(draw, lambda steps: 4 * steps, "gradients")


def optimized(times: float, updates: int) -> Method:
    """Optimization of the noise, on a grid of few steps."""

    def draw(problem, keys):
        grid = problem.grid(times)
        x_T = D.initial_noise(keys, problem.shape, grid)
        return S.optimize_noise(
            keys,
            problem.denoise(1.0),
            D.solvers.ddim(),
            grid,
            x_T,
            problem.score(enough=True),
            num_updates=updates,
            learning_rate=1.0,
            regularization=0.01,
            max_gradient=1.0,
        ).x_0

    return Method(draw, lambda steps: (4 * updates + 1) * max(2, round(steps * times)), "gradients")


METHODS = {
    "sampling": plain(),
    "4 times the steps": plain(4),
    "8 times the steps": plain(8),
    "a fifth of the steps": plain(0.2),
    "ddpm": plain(solver=D.solvers.ddpm()),
    "guidance 1.5": plain(scale=1.5),
    "guidance 2": plain(scale=2.0),
    "guidance 3": plain(scale=3.0),
    "guidance 1.5, 4 times the steps": plain(4, 1.5),
    "guidance 3, 4 times the steps": plain(4, 3.0),
    "best of 2": best_of(2),
    "best of 4": best_of(4),
    "best of 8": best_of(8),
    "best of 2, good enough": best_of(2, enough=True),
    "best of 4, good enough": best_of(4, enough=True),
    "best of 8, good enough": best_of(8, enough=True),
    "neighbours": neighbours(7, 0.4),
    "neighbours, good enough": neighbours(7, 0.4, enough=True),
    "paths": paths(2, 4),
    "paths, good enough": paths(2, 4, enough=True),
    "steering, difference": steered(8, "difference", 1.0),
    "steering, max": steered(8, "max", 1.0),
    "steering, sum": steered(8, "sum", 0.2),
    "steering, difference, good enough": steered(8, "difference", 1.0, enough=True),
    "gradient ascent": ascended(0.02),
    "verifier guidance": guided_by_verifier(1.0),
    "optimized noise": optimized(0.2, 9),
}


@dataclasses.dataclass(frozen=True)
class Search:
    """Draw digits by each search, and measure them by two classifiers."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run of the demo."""
    output_dir: Path = Path("runs/less-compute-search")
    """Where table and pictures go."""
    image_dir: Path | None = None
    """Where the pictures go as well: docs/images for those on the page."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""
    steps: int = 50
    """Of one run, by DDIM."""
    num_images: int = 500
    """Digits of each row; the real test set has 500."""
    batch_size: int = 50
    """Digits at a time; each has its candidates besides."""
    enough: float = 0.9
    """The probability of the label at which a digit is good enough."""
    quick: bool = False
    """Ten digits in four steps: only to see that everything runs."""
    seed: int = 0


class Tools(NamedTuple):
    """The trained run, and what its digits are measured with."""

    pipe: Any
    classifier: tuple[Any, Any]
    dataset: Any
    classify: Any
    judge: Callable[[Any], Any]


def load_tools(run_dir: Path) -> Tools:
    """Everything of a run."""
    dataset = load_dataset(run_dir)
    folder = training.RunFolder(run_dir).stage("classifier").model
    return Tools(
        load_latent_model(run_dir),
        checkpoints.load(folder),
        dataset,
        load_classifier(run_dir),
        judge.second_judge(dataset),
    )


def sampler(options: Search, tools: Tools, method: Method) -> Callable[[Any, Any], Any]:
    """(keys, labels) -> latents of a batch, compiled once."""
    pipe, (classifier, classifier_params) = tools.pipe, tools.classifier
    vae, null = pipe.autoencoder, np.int32(pipe.num_classes)

    @jax.jit
    def draw(params, keys, labels):
        of_denoiser, of_vae, of_classifier = params

        def denoise(scale):
            network = functools.partial(models.network(pipe.denoiser.module), of_denoiser)
            predict = D.classifier_free_guidance(network, labels, null, scale)
            return D.denoiser(predict, pipe.prediction)

        def logits(latents):
            images = jnp.clip(models.decode_latents(vae.module, of_vae, latents), -1, 1)
            return classifier.apply({"params": of_classifier}, images)

        problem = Problem(
            denoise,
            S.label_log_probability(logits, labels),
            float(np.log(options.enough)),
            pipe.prediction.path,
            options.steps,
            (len(labels), *pipe.latent_shape()),
        )
        return method.draw(problem, keys)

    params = pipe.denoiser.params, vae.params, classifier_params
    return lambda keys, labels: draw(params, keys, labels).block_until_ready()


def measure(options: Search, tools: Tools, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures, arrays) of a method."""
    method = METHODS[name]
    run = sampler(options, tools, method)
    labels = np.arange(options.num_images, dtype=np.int32) % tools.pipe.num_classes
    keys = D.image_keys(jax.random.key(options.seed), options.num_images)
    size = min(options.batch_size, options.num_images)
    run(keys[:size], labels[:size])  # compiles
    start, parts = time.perf_counter(), []
    for first in range(0, options.num_images, size):
        rows = np.minimum(np.arange(first, first + size), options.num_images - 1)
        parts.append(np.asarray(run(keys[rows], labels[rows]))[: options.num_images - first])
    seconds = time.perf_counter() - start
    images = tools.pipe.decode(np.concatenate(parts), batch_size=size)
    report = metrics.evaluate(images, labels, tools.classify, tools.dataset)
    figures = {
        "evaluations": method.evaluations(options.steps),
        "accuracy": report.accuracy,
        "second judge": float(np.mean(tools.judge(images) == labels)),
        "distance": report.frechet_ratio,
        "diversity": report.feature_diversity,
        "pixel diversity": report.pixel_diversity,
        "seconds": seconds,
    }
    return figures, {"images": data.to_uint8(images)}


COLUMNS = (
    ("method", "name", ""),
    ("evaluations", "evaluations", "d"),
    ("right, by the verifier", "accuracy", ".1%"),
    ("right, by the second classifier", "second judge", ".1%"),
    ("distance, multiple of the floor", "distance", ".2f"),
    ("diversity of features", "diversity", ".2f"),
    ("of pixels", "pixel diversity", ".2f"),
    ("seconds", "seconds", ".1f"),
)


def save(options: Search, rows: list[dict[str, Any]], shown: Mapping[str, Any]) -> None:
    """The table so far, the digits, and the picture of both classifiers' trade-offs."""
    body = [[format(row[key], form) for _, key, form in COLUMNS] for row in rows]
    text = markdown([title for title, _, _ in COLUMNS], body)
    title = f"More compute for a better digit: {options.num_images} digits each, {options.steps} steps"
    save_table(options.output_dir / "search.md", title, text)
    picture = metrics.labelled_grid(
        np.concatenate(list(shown.values())), len(next(iter(shown.values()))), row_labels=list(shown)
    )
    for folder in folders(options):
        metrics.save_png(folder / "search-digits.png", picture)


def folders(options: Search) -> list[Path]:
    """Where pictures go."""
    return [options.output_dir, *([options.image_dir] if options.image_dir else [])]


def plot(options: Search, rows: list[dict[str, Any]]) -> None:
    """Right digits by the second classifier against evaluations, and diversity against right digits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(METHODS[row["name"]].kind for row in rows))
    for k, kind in enumerate(kinds):
        found = [row for row in rows if METHODS[row["name"]].kind == kind]
        marks = {"marker": "os^vDP*X"[k % 8], "color": f"C{k}", "linestyle": "", "label": kind}
        judged = [100 * row["second judge"] for row in found]
        left.plot([row["evaluations"] for row in found], judged, **marks)
        right.plot(judged, [row["diversity"] for row in found], **marks)
    left.set(
        xscale="log", xlabel="network evaluations for a digit", ylabel="right by the second classifier, %"
    )
    right.set(xlabel="right by the second classifier, %", ylabel="diversity of features, 1 is real")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    for folder in folders(options):
        save_figure(folder / "search.png", figure, dpi=80)


def main(options: Search) -> None:
    """Draws, measures and writes the table."""
    host.prepare()
    options = quick_options(options, steps=4, num_images=20, batch_size=10)
    check_demo(options.run_dir)
    tools = load_tools(options.run_dir)
    results, common = Results(options.output_dir), {"weights": weights_hash(options.run_dir)}
    common |= {"second judge": judge.TRAINED_ON}
    common |= {name: getattr(options, name) for name in ("steps", "num_images", "seed", "enough")}
    print(f"second classifier: {judge.known(tools.judge, tools.dataset):.1%} of the real training digits")
    rows, shown = [], {}
    for name in options.methods:
        figures, arrays = results.row(
            name,
            common,
            lambda: measure(options, tools, name),  # noqa: B023
        )
        rows.append({"name": name, **figures})
        shown[name] = data.from_uint8(arrays["images"][:10])
        print(f"{name}: {figures['second judge']:.1%}, diversity {figures['diversity']:.2f}", flush=True)
    save(options, rows, shown)
    plot(options, rows)


if __name__ == "__main__":
    run_script(main, Search)
