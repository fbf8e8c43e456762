"""Equations and the functions that compute them (lecture 39, exercise E8).

Question: which function is which equation, and do they agree, number by number?
Command:  python -m experiments.lecture39.e8_translation_drills
Needs:    a CPU, seconds; no trained model. What came out: README.md in this folder.

Each drill writes an equation out with plain loops over numbers, in NumPy, and compares the library's function
with it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checks import Check, distance, show
from jaxldm import diffusion as D
from jaxldm import nn
from jaxldm.commands.terminal import run_script


@dataclasses.dataclass(frozen=True)
class Drills:
    """Check each equation against its function."""

    seed: int = 0
    """Of the numbers that go in."""


def forward_diffusion(x_0: np.ndarray, eps: np.ndarray, betas: np.ndarray, t: np.ndarray) -> np.ndarray:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, abar_t = prod_{s <= t} (1 - beta_s)."""
    x_t = np.zeros_like(x_0)
    for k in range(len(x_0)):
        abar = 1.0
        for s in range(t[k] + 1):
            abar = abar * (1 - betas[s])
        x_t[k] = math.sqrt(abar) * x_0[k] + math.sqrt(1 - abar) * eps[k]
    return x_t


def forward_moments(betas: np.ndarray, t: int) -> tuple[float, float]:
    """What x_0 is multiplied by, and the variance of the noise, one step q(x_s | x_{s-1}) after another."""
    factor, variance = 1.0, 0.0
    for beta in betas[: t + 1]:
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
    return factor, variance


def guidance(eps_u: np.ndarray, eps_c: np.ndarray, w: float) -> np.ndarray:
    """eps = (1 - w) eps_uncond + w eps_cond."""
    guided = np.zeros_like(eps_u)
    for index in np.ndindex(eps_u.shape):
        guided[index] = (1 - w) * eps_u[index] + w * eps_c[index]
    return guided


def cross_attention(Q: np.ndarray, K: np.ndarray, V: np.ndarray) -> np.ndarray:
    """softmax(Q K^T / sqrt(d)) V: each of N pixels [N, d] looks at M words [M, d]."""
    out = np.zeros((len(Q), V.shape[1]))
    for n, query in enumerate(Q):
        logits = [sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in K]
        powers = [math.exp(logit) for logit in logits]
        for m, value in enumerate(V):
            out[n] += powers[m] / sum(powers) * value
    return out


def drill_forward(rng: np.random.Generator) -> list[Check]:
    """Equation, library, and the chain of single steps; then the targets of eps, x_0 and v."""
    betas = D.linear_betas(1000, 1e-4, 0.02)
    path, t = D.VP(betas), np.array([0, 10, 500, 999])
    x_0, eps = rng.normal(size=(2, 4, 3, 3, 1))
    alpha, sigma = (of(t).reshape(-1, 1, 1, 1) for of in (path.alpha, path.sigma))
    x_t = alpha * x_0 + sigma * eps
    chains = [forward_moments(betas, s) for s in t]
    v = D.v(path).target(x_0, eps, t)
    back = [D.epsilon(path).to_x0(eps, x_t, t), D.v(path).to_x0(v, x_t, t)]
    return [
        Check(
            "x_t: path.alpha(t) x_0 + path.sigma(t) eps",
            distance(x_t, forward_diffusion(x_0, eps, betas, t)),
            1e-12,
        ),
        Check(
            "... is the chain of single steps: factor and variance",
            distance(np.stack([path.alpha(t), path.sigma(t) ** 2], axis=1), chains),
            1e-12,
        ),
        Check(
            "v = sqrt(abar) eps - sqrt(1 - abar) x_0: D.v(path).target",
            distance(v, alpha * eps - sigma * x_0),
            1e-12,
        ),
        Check(
            "to_x0 of D.epsilon(path) and of D.v(path) gives x_0 back",
            max(distance(b, x_0) for b in back),
            1e-12,
        ),
    ]


def drill_guidance(rng: np.random.Generator) -> list[Check]:
    """Equation, library, its two ends, and one batch for both branches."""
    eps_u, eps_c = rng.normal(size=(2, 2, 3, 3, 1))
    table = jnp.asarray(np.stack([eps_c[0], eps_c[1], eps_u[0]]))  # labels 0 and 1; 2 is the null class
    x, t = jnp.zeros((2, 3, 3, 1)), jnp.zeros(2)
    sizes = []

    def network(x, t, labels):
        sizes.append(len(labels))
        return table[labels]

    labels, both_null = jnp.array([0, 1]), np.stack([eps_u[0], eps_u[0]])
    batched = D.classifier_free_guidance(network, labels, 2, 3.0)(x, t)
    return [
        *(
            Check(f"w = {w:g}: D.guide", distance(D.guide(eps_u, eps_c, w), guidance(eps_u, eps_c, w)), 1e-12)
            for w in (0.0, 1.0, 3.0, 7.5)
        ),
        Check(
            "w = 0 is the unconditional answer, to the bit", distance(D.guide(eps_u, eps_c, 0.0), eps_u), 0.0
        ),
        Check(
            "w = 1 is the conditional answer, to the bit", distance(D.guide(eps_u, eps_c, 1.0), eps_c), 0.0
        ),
        Check(
            "D.classifier_free_guidance of a network",
            distance(batched, guidance(both_null, eps_c, 3.0)),
            1e-12,
        ),
        Check("... calls it once, with a batch of 2 x 2", abs(sizes[0] - 4) + abs(len(sizes) - 1), 0.0),
    ]


def drill_attention(rng: np.random.Generator) -> list[Check]:
    """Equation, library, and what has to follow from the equation."""
    pixels, words, d = 9, 5, 8
    Q, K, V = (rng.normal(size=(count, d)) for count in (pixels, words, words))
    heads = [jnp.asarray(a).reshape(1, -1, 1, d) for a in (Q, K, V)]
    out, weights = nn.dot_product_attention(*heads, return_weights=True)
    order = rng.permutation(words)
    shuffled = nn.dot_product_attention(heads[0], heads[1][:, order], heads[2][:, order])
    alike = nn.dot_product_attention(heads[0], jnp.zeros_like(heads[1]), heads[2])
    return [
        # The softmax is float32 on purpose, whatever comes in.
        Check(
            "softmax(Q K^T / sqrt(d)) V: nn.dot_product_attention",
            distance(out[0, :, 0], cross_attention(Q, K, V)),
            1e-6,
        ),
        Check(
            "9 pixels look at 5 words; each row of weights sums to 1",
            distance(weights.sum(-1), np.ones((1, 1, 9))),
            1e-6,
        ),
        Check("the order of the words does not matter", distance(shuffled, out), 1e-6),
        Check(
            "keys that are all alike: the mean of the values",
            distance(alike[0, :, 0], np.tile(V.mean(0), (9, 1))),
            1e-6,
        ),
    ]


def main(options: Drills) -> None:
    rng = np.random.default_rng(options.seed)
    with jax.enable_x64(True):
        show("Forward diffusion (Ho et al. 2020, equation 4)", drill_forward(rng))
        show("Classifier-free guidance (Ho and Salimans 2022, equation 6)", drill_guidance(rng))
        show("Cross-attention (Vaswani et al. 2017, equation 1)", drill_attention(rng))


if __name__ == "__main__":
    run_script(main, Drills)
