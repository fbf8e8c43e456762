"""How long tracing and compiling one training step takes, by how the optimizer is written.

Question: does a state that is a tree of arrays compile as fast as one flat vector of all parameters?
Command:  python -m experiments.benchmarks.train_step_compile       (--quick: the smallest recipe, once)
Needs:    nothing but jaxldm. Minutes and figures: README.md in this folder.

The step is that of a recipe's denoising network: loss, gradients, clipping, AdamW, moving average, on one
device. Its optimizer is the package's own (`adamw`), the same transformations as an `optax.chain`, or that
chain inside `optax.flatten`, whose moments are two vectors. The variants take turns, each round in a process
that has compiled everything else before, without any cache of compiled programs.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.timing import cores, machine
from experiments.figures import quick_options, save_results
from jaxldm import models, training
from jaxldm.commands.terminal import run_script
from jaxldm.training.diffusion import build_denoiser, latent_shape, make_loss

IMAGE_SHAPE, NUM_CLASSES = (28, 28, 1), 10


@dataclasses.dataclass(frozen=True)
class TrainStepCompile:
    """Trace and compile training steps with abstract parameters, and write the table."""

    quick: bool = False
    """The smallest recipe, once: only to see that everything runs."""
    recipes: tuple[str, ...] = ("mini-ldm", "tiny-dit")
    """Recipes whose denoising network is measured."""
    rounds: int = 5
    """Turns of each variant."""
    output_dir: Path = Path("runs/benchmarks")
    """Where train_step_compile.md and train_step_compile.json go."""


def optax_chain(recipe: Any) -> training.Optimizer:
    """The recipe's optimizer from the transformations of optax."""
    schedule = training.warmup_cosine(recipe.learning_rate, 100, 1000, recipe.final_scale)
    chain = optax.chain(
        optax.clip_by_global_norm(recipe.max_grad_norm),
        optax.scale_by_adam(b1=recipe.b1, b2=recipe.b2),
        optax.scale_by_learning_rate(schedule),
    )

    def update(gradients, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(gradients, state, params)

    return training.Optimizer(chain.init, update, schedule)


def optax_flatten(recipe: Any) -> training.Optimizer:
    """The same on one vector."""
    chain = optax_chain(recipe)
    flat = optax.flatten(optax.GradientTransformation(chain.init, chain.update))
    return chain._replace(init=flat.init, update=flat.update)


def own(recipe: Any) -> training.Optimizer:
    """What recipes train with."""
    return training.optimizer(
        recipe.learning_rate, 100, 1000, max_grad_norm=recipe.max_grad_norm, b1=recipe.b1, b2=recipe.b2
    )


VARIANTS: dict[str, Callable[[Any], training.Optimizer]] = {
    "adamw": own,
    "optax.chain": optax_chain,
    "optax.flatten": optax_flatten,
}


def step_and_arguments(name: str, variant: str) -> tuple[Any, Any, Any]:
    """The compiled step of a recipe's denoising network, an abstract state and an abstract batch."""
    whole = training.RECIPES[name]
    recipe, shape = whole.diffusion, latent_shape(whole, IMAGE_SHAPE)
    module = build_denoiser(whole, IMAGE_SHAPE, NUM_CLASSES)
    optimizer = VARIANTS[variant](recipe)
    state = jax.eval_shape(
        lambda params: training.create_train_state(jax.random.key(0), params, optimizer),
        models.shapes(module),
    )
    column = jax.ShapeDtypeStruct((recipe.batch_size, *shape), jnp.float32)
    batch = {"mean": column, "label": jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)}
    if whole.autoencoder is not None and recipe.sample_latents:
        batch["std"] = column
    train_step = training.make_train_step(make_loss(recipe, module), optimizer, recipe.ema_decay or 0.999)
    return training.compile_train_step(train_step, training.make_mesh(1)), state, batch


def measure(name: str, variant: str) -> dict[str, float]:
    """Seconds of tracing and of compiling, by the clock, and of the processor for both."""
    step, state, batch = step_and_arguments(name, variant)
    begin, processor = time.perf_counter(), time.process_time()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    seconds = {
        "trace": traced - begin,
        "compile": done - traced,
        "processor": time.process_time() - processor,
    }
    jax.clear_caches()
    return seconds


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each recipe and variant: medians of all rounds."""
    head = ["recipe", "arrays", "optimizer", "trace, s", "compile, s", "both, s", "processor, s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        trace, compile_, processor = (
            np.median(row["seconds"][kind]) for kind in ("trace", "compile", "processor")
        )
        both = np.median(np.add(row["seconds"]["trace"], row["seconds"]["compile"]))
        cells = [row["recipe"], str(row["arrays"]), row["optimizer"]]
        cells += [f"{value:.1f}" for value in (trace, compile_, both, processor)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: TrainStepCompile) -> None:
    options = quick_options(options, recipes=("smoke-dit",), rounds=1)
    rows = []
    for name in options.recipes:
        seconds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        measure(name, "adamw")  # what is imported and set up once does not count
        for _ in range(options.rounds):
            for variant in VARIANTS:
                seconds[variant].append(measure(name, variant))
        arrays = len(jax.tree.leaves(step_and_arguments(name, "adamw")[1].params))
        for variant, rounds in seconds.items():
            by_kind = {kind: [figures[kind] for figures in rounds] for kind in rounds[0]}
            rows.append({"recipe": name, "arrays": arrays, "optimizer": variant, "seconds": by_kind})
    print(table(rows))
    setting = machine("train_step_compile", {"optax": optax.__version__}) | {"cores": cores()}
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table(rows)}\n"
    figures = json.dumps({**setting, "rows": rows}, indent=1)
    save_results(options.output_dir, {"train_step_compile.md": text, "train_step_compile.json": figures})


if __name__ == "__main__":
    run_script(main, TrainStepCompile)
