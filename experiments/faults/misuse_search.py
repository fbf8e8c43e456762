"""The valid calls that `misuse` starts from, of `jaxldm.diffusion.search`."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.faults.misuse_cases import FLOW, IMAGES, KEY, ONES, TOKENS, Case
from jaxldm import diffusion as D


def brightness(images):
    """A verifier."""
    return images.reshape(len(images), -1).mean(1)


def of(at: str, /, *, cheap: bool = False, **arguments: Any) -> Case:
    """The case of a public function."""
    return Case(f"D.search.{at}", getattr(D.search, at), arguments, cheap, {"x_T": "x_T|[Ii]mages|image"})


def of_search() -> list[Case]:
    """What is made of arrays, then the searches, on a grid of two steps."""
    grid, solver = D.make_grid(FLOW, 2), D.solvers.ddim()
    runs = {"key": KEY, "denoise": D.gaussian_denoiser(FLOW), "grid": grid}
    many = {**runs, "x_T": np.ones((2, 1, 4, 4, 1), np.float32)}
    one = {**runs, "solver": solver, "x_T": IMAGES[:1] + 1, "verifier": brightness}
    return [
        of("candidate_keys", key=KEY, num_candidates=2, batch_size=2),
        of("candidate_noise", key=KEY, shape=(2, 4, 4, 1), grid=grid, num_candidates=2),
        of("effective_sample_size", log_weights=ONES),
        of("systematic_resampling", key=KEY, log_weights=ONES),
        of("sphere_neighbour", direction=IMAGES, pivot=IMAGES, radius=0.5),
        of("label_log_probability", cheap=True, logits=brightness, labels=TOKENS[:, 0]),
        of("gradient_ascent", cheap=True, solver=solver, verifier=brightness, eta=0.1),
        of("steering_steps", cheap=True, grid=grid, first=0.2, last=0.8, every=1),
        of("best_of_n", **many, solver=solver, verifier=brightness),
        of("zero_order_search", **one, num_neighbours=2, num_rounds=1, radius=0.3),
        of(
            "search_over_paths",
            **many,
            solver=solver,
            verifier=brightness,
            num_children=2,
            first=1,
            back=1,
            forward=2,
        ),
        of(
            "steer",
            **many,
            solver=D.solvers.ddpm(),
            reward=brightness,
            reward_scale=1.0,
            potential="max",
            steer_at=np.ones(2, bool),
            threshold=0.5,
        ),
        of(
            "optimize_noise",
            **one,
            num_updates=1,
            learning_rate=0.1,
            regularization=0.0,
            max_gradient=1.0,
        ),
    ]
