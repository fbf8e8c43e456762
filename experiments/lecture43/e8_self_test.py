"""The self-test of lecture 43, its answers as checks (exercise E8).

Question: do the answers hold, in numbers: how many tokens an image has, what zero-initialised gates do, what
          joint attention joins, why 20 steps do for 1000, and why 12 steps of unmasking suffice?
Command:  python -m experiments.lecture43.e8_self_test
Needs:    a CPU, seconds; no trained model. What came out: README.md in this folder.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checks import Check, distance, show
from jaxldm import diffusion as D
from jaxldm import models, nn
from jaxldm.commands.terminal import run_script
from jaxldm.nn.initialization import init_params

LENGTH, VALUES = 256, 4  # tokens of an image of 256x256 pixels, and how many kinds there are of them


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """Check the answers of the lecture's self-test."""

    num_images: int = 256
    """Drawn for each number of unmasking steps."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 12, 24, 64)
    """Of unmasking; 1, 2, 8 and 12 among them."""


def check_tokens() -> list[Check]:
    """256x256 pixels in patches of 16x16, or in latents 8 times smaller in patches of 2x2, are 256 tokens."""
    pixels = jax.eval_shape(lambda x: nn.patchify(x, 16), jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32))
    x = jnp.arange(2 * 256 * 256 * 3, dtype=jnp.float32).reshape(2, 256, 256, 3)
    back = nn.unpatchify(nn.patchify(x, 16), 16, 256, 256)
    rows, columns = models.PRESETS["dit-xl-2"].grid_size
    amused = models.PRESETS["amused-256"].sample_size
    return [
        Check(
            "256x256 pixels in 16x16 patches are 256 tokens of 768 numbers",
            distance(pixels.shape, (1, 256, 768)),
            0,
        ),
        Check("... and unpatchify gives every pixel back", distance(back, x), 0),
        Check("DiT-XL/2 for 256x256 sees 256 tokens, too", abs(rows * columns - 256), 0),
        Check("and so does aMUSEd: 16x16 entries of a codebook", abs(amused**2 - 256), 0),
    ]


def check_identity() -> list[Check]:
    """adaLN-Zero: the gates start at 0, so a fresh network is x -> x, and its output is 0."""
    dit = models.build("dit-s-2", sample_size=8, hidden_size=32, depth=3, num_heads=4)
    x, t, labels = (
        jax.random.normal(jax.random.key(0), (2, 8, 8, 4)),
        jnp.array([3.0, 500.0]),
        jnp.array([1, 7]),
    )
    output = jax.jit(dit.apply)({"params": models.init(dit, jax.random.key(1))}, x, t, labels)
    gates = nn.Modulation(6)
    c = jax.random.normal(jax.random.key(2), (2, 32))
    vectors = gates.apply({"params": init_params(gates, jax.random.key(3), c)}, c)
    return [
        Check(
            "shifts, scales and gates of a fresh block are 0, whatever the condition",
            distance(vectors, np.zeros((6, 2, 32))),
            0,
        ),
        Check("so a fresh DiT of three blocks answers 0", distance(output, np.zeros_like(output)), 0),
    ]


def check_joint_attention() -> list[Check]:
    """MM-DiT: one softmax over text and image, with weights of each one's own."""
    joint = nn.JointAttention(num_heads=4, qk_norm=True)
    image, text = (jax.random.normal(jax.random.key(k), (1, n, 32)) for k, n in ((0, 9), (1, 5)))
    params = init_params(joint, jax.random.key(2), image, text)

    @jax.jit
    def apply(params, image, text):
        seen, sown = joint.apply({"params": params}, image, text, mutable=["intermediates"])
        return seen, sown["intermediates"]["attention_weights"][0]

    (seen_image, seen_text), weights = apply(params, image, text)
    of_image = {"to_q": "add_q_proj", "to_k": "add_k_proj", "to_v": "add_v_proj", "to_out_0": "to_add_out"}
    of_image |= {"norm_q": "norm_added_q", "norm_k": "norm_added_k"}
    shared = params | {theirs: params[ours] for ours, theirs in of_image.items()}
    (half_image, half_text), _ = apply(shared, image, text)
    one = {name: params[name] for name in of_image}
    together = jax.jit(joint.apply)({"params": one}, jnp.concatenate([text, image], axis=1))
    halves = jnp.concatenate([half_text, half_image], axis=1)
    moved_image, moved_text = apply(params, image, text + 1)[0][0], apply(params, image + 1, text)[0][1]
    return [
        Check(
            "a query's weights over text and image add up to 1",
            distance(weights.sum(-1), np.ones(weights.shape[:-1])),
            1e-6,
        ),
        Check(
            "with one set of weights it is self-attention over [text, image]",
            distance(halves, together),
            1e-5,
        ),
        Check("the text changes the image's output", _unchanged(moved_image, seen_image), 0),
        Check(
            "and the image changes the text's, as it never does in cross-attention",
            _unchanged(moved_text, seen_text),
            0,
        ),
    ]


def _unchanged(after, before) -> float:
    return float(distance(after, before) < 1e-3)


def check_solver() -> list[Check]:
    """On a mixture, whose denoiser is exact: 20 steps of second order come nearer than 50 of first."""
    path = D.VP(D.linear_betas())
    means = jnp.array([-1.0, 0.6]).reshape(2, 1, 1, 1)
    denoise = D.gaussian_mixture_denoiser(path, jnp.array([0.3, 0.7]), means, jnp.array([0.2, 0.2]))
    x_T = jax.random.normal(jax.random.key(0), (512, 1, 1, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def draw(solver, grid):
        return D.sample(jax.random.key(1), denoise, solver, grid, x_T)

    dpmpp, ddim = D.solvers.dpmpp_2m(), D.solvers.ddim()
    exact = draw(ddim, D.make_grid(path, 1000))

    def error(solver, steps, spacing):
        grid = D.pad(D.make_grid(path, steps, spacing=spacing), 50)
        return float(jnp.abs(draw(solver, grid) - exact).mean())

    print(
        "\n| mean distance from the exact solution | grid uniform in log-SNR | uniform in t |\n|---|---|---|"
    )
    errors = {}
    for name, solver, steps in (("DPM-Solver++", dpmpp, 20), ("DDIM", ddim, 20), ("DDIM", ddim, 50)):
        errors[name, steps], uniform = (
            error(solver, steps, spacing) for spacing in ("uniform_log_snr", None)
        )
        print(f"| {name}, {steps} steps | {errors[name, steps]:.4f} | {uniform:.4f} |")
    ours = errors["DPM-Solver++", 20]
    return [
        Check("DPM-Solver++ in 20 steps, over DDIM in 20", ours / errors["DDIM", 20], 0.25),
        Check("... over DDIM in 50", ours / errors["DDIM", 50], 0.7),
        Check(
            "... as a share of the data's spread, with 1000 / 20 = 50 times fewer calls",
            ours / exact.std(),
            0.02,
        ),
    ]


def transition() -> np.ndarray:
    """p(next token | token): [VALUES, VALUES], mostly the same again, as neighbours in an image are."""
    near = np.exp(-np.abs(np.subtract.outer(np.arange(VALUES), np.arange(VALUES))))
    return near / near.sum(1, keepdims=True)


def stationary(moves: np.ndarray) -> np.ndarray:
    """p(token) that the moves leave as it is, [VALUES]."""
    return np.linalg.matrix_power(moves, 1000)[0]


def chain_logits(tokens: jax.Array) -> jax.Array:
    """log p(token i | all known tokens) [B, N, VALUES] of the chain, by forward and backward messages."""
    moves, first = jnp.asarray(transition(), jnp.float32), jnp.asarray(stationary(transition()), jnp.float32)
    known = jnp.where((tokens == VALUES)[..., None], 1.0, jax.nn.one_hot(tokens, VALUES)).swapaxes(0, 1)

    def step(message, seen, matrix):
        passed = (message * seen) @ matrix
        return passed / passed.sum(-1, keepdims=True), message

    start = jnp.broadcast_to(first, known.shape[1:])
    ahead = jax.lax.scan(functools.partial(step, matrix=moves), start, known)[1]
    behind = jax.lax.scan(functools.partial(step, matrix=moves.T), jnp.ones_like(start), known[::-1])[1][::-1]
    return jnp.log(ahead * behind + 1e-30).swapaxes(0, 1)


def pair_error(tokens: np.ndarray) -> float:
    """Total variation between the neighbouring pairs that were drawn and those of the chain."""
    moves = transition()
    counts = np.zeros((VALUES, VALUES))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    return float(np.abs(counts / counts.sum() - stationary(moves)[:, None] * moves).sum() / 2)


def check_unmasking(options: SelfTest) -> list[Check]:
    """Tokens of one step are drawn without regard to each other: the error falls as 1 / steps.

    With the exact conditionals of a chain of 256 tokens, in random order (a temperature far above the
    confidences), so that nothing but the number of steps is wrong.
    """
    start = jnp.full((options.num_images, LENGTH), VALUES)
    most = max(options.steps)
    draw = jax.jit(
        lambda unmasking: D.sample_tokens(
            jax.random.key(0), chain_logits, start, unmasking, mask_token=VALUES
        )
    )
    errors = {}
    print("\n| steps | total variation of neighbouring pairs | share of one step's |\n|---|---|---|")
    for steps in options.steps:
        drawn = draw(D.make_unmasking(steps, temperature=1e4, max_steps=most))
        errors[steps] = pair_error(np.asarray(drawn))
        print(f"| {steps} | {errors[steps]:.4f} | {errors[steps] / errors[1]:.2f} |")
    fraction = D.make_unmasking(12).fraction
    left = np.floor(LENGTH * fraction)
    print("tokens drawn in each of 12 steps:", ", ".join(f"{n:.0f}" for n in -np.diff([LENGTH, *left])))
    law = 8 * errors[8] / (2 * errors[2])
    return [
        Check("12 steps: error over that of one step", errors[12] / errors[1], 0.15),
        Check("four times the steps, a fourth of the error: 2 steps to 8", abs(law - 1), 0.25),
        Check("tokens that the cosine draws first, while nothing is known: of 256", LENGTH - left[0], 3),
        Check(
            "it draws a third in the last 3 of 12 steps: what is missing", max(0, 1 / 3 - left[8] / LENGTH), 0
        ),
    ]


def main(options: SelfTest) -> None:
    show("Tokens", check_tokens())
    show("Zero-initialised gates", check_identity())
    show("Joint attention", check_joint_attention())
    show("1000 steps to 20", check_solver())
    show("12 steps of unmasking", check_unmasking(options))


if __name__ == "__main__":
    run_script(main, SelfTest)
