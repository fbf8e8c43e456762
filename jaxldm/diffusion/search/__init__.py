"""More compute for a better image: many are drawn, or one is changed, and a verifier says which is better.

    x_T = D.search.candidate_noise(key, (4, 32, 32, 3), grid, num_candidates=8)
    found = D.search.best_of_n(key, denoise, D.solvers.ddim(), grid, x_T, verifier)
    found.x_0, found.score

A verifier is a function of clean images [B, H, W, C] -> scores [B], more is better; where the denoiser works
on latents it decodes them first: `lambda z: score(decode(z))`. It is part of the compiled program, so it is
made of JAX operations. Candidates of the same image are an axis in front, [N, B, H, W, C]; the denoiser and
the verifier are mapped over it, and see B images as in `D.sample`, with the conditions of those.
"""

from jaxldm.diffusion.search.best_of import best_of_n
from jaxldm.diffusion.search.candidates import Found, FoundNoise, candidate_keys, candidate_noise
from jaxldm.diffusion.search.gradient import gradient_ascent
from jaxldm.diffusion.search.noise import optimize_noise
from jaxldm.diffusion.search.over_paths import search_over_paths
from jaxldm.diffusion.search.resampling import effective_sample_size, systematic_resampling
from jaxldm.diffusion.search.steering import POTENTIALS, Particles, steer, steering_steps
from jaxldm.diffusion.search.verifiers import label_log_probability
from jaxldm.diffusion.search.zero_order import sphere_neighbour, zero_order_search

__all__ = [
    "POTENTIALS",
    "Found",
    "FoundNoise",
    "Particles",
    "best_of_n",
    "candidate_keys",
    "candidate_noise",
    "effective_sample_size",
    "gradient_ascent",
    "label_log_probability",
    "optimize_noise",
    "search_over_paths",
    "sphere_neighbour",
    "steer",
    "steering_steps",
    "systematic_resampling",
    "zero_order_search",
]
