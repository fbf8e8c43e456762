import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

VP = D.VP(D.linear_betas())
KEY = jax.random.key(2)
SHAPE = (3, 4, 4, 2)
LABELS, NULL = jnp.array([0.5, 1.0, 2.0]), 0.0


def network(x, t, labels):
    shape = (-1, 1, 1, 1)
    return jnp.sin(x * (1 + labels.reshape(shape))) + 0.3 * labels.reshape(shape)


def as_denoisers(predict):
    return D.denoiser(predict, D.v(VP))


BRANCHES = D.condition_branches(network, LABELS, NULL).map(as_denoisers)


def two_images(seed):
    return np.random.default_rng(seed).standard_normal((2, *SHAPE)).astype(np.float32)


@given(w=st.floats(0, 15), eta=st.floats(0, 1), threshold=st.floats(0.1, 20), seed=st.integers(0, 1000))
def test_one_step_is_that_of_diffusers(w, eta, threshold, seed):
    conditional, unconditional = two_images(seed)
    expected = normalized_guidance(
        torch.from_numpy(conditional), torch.from_numpy(unconditional), w - 1, None, eta, threshold,
        use_original_formulation=True,
    )  # fmt: skip
    ours = D.project_guidance(conditional, conditional - unconditional, w, eta, threshold)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_scale_one_is_conditional_as_it_is_not_in_diffusers():
    conditional, unconditional = two_images(0)
    # The reference starts from the unconditional answer unless asked for the "original formulation": at a
    # scale of 1 it then drops the parallel part of the difference. Its guider hides that by not guiding at 1
    # at all.
    theirs = normalized_guidance(torch.from_numpy(conditional), torch.from_numpy(unconditional), 1.0, eta=0.0)
    assert np.abs(theirs.numpy() - conditional).max() > 0.1
    np.testing.assert_array_equal(
        D.project_guidance(conditional, conditional - unconditional, 1.0), conditional
    )


@given(w=st.floats(0, 15), seed=st.integers(0, 1000))
def test_without_projection_it_is_classifier_free_guidance(w, seed):
    c, u = two_images(seed)
    np.testing.assert_allclose(
        D.project_guidance(c, c - u, w, eta=1.0), D.guide(u, c, w), rtol=1e-4, atol=1e-4
    )


@given(w=st.floats(0, 15), seed=st.integers(0, 1000))
def test_guidance_is_across_the_image_and_no_longer_than_told(w, seed):
    c, u = two_images(seed)
    moved = np.asarray(D.project_guidance(c, c - u, w, norm_threshold=0.5)) - c
    along = (moved * c).sum((1, 2, 3)) / np.sqrt((c**2).sum((1, 2, 3)))
    np.testing.assert_allclose(along, 0, atol=1e-4)
    assert (np.sqrt((moved**2).sum((1, 2, 3))) <= abs(w - 1) * 0.5 * (1 + 1e-4) + 1e-4).all()


def test_as_a_denoiser():
    x, t = jax.random.normal(KEY, SHAPE), 400.0
    scales = jnp.array([1.0, 3.0, 8.0])
    denoise = D.adaptive_projected_guidance(BRANCHES, scales, eta=0.2, norm_threshold=1.5)
    uncond, cond = BRANCHES.call(x, jnp.full(3, t))
    np.testing.assert_allclose(cond, as_denoisers(lambda x, t: network(x, t, LABELS))(x, t), rtol=1e-6)
    expected = D.project_guidance(cond, cond - uncond, scales, 0.2, 1.5)
    np.testing.assert_allclose(denoise(x, t), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(denoise(x, t)[0], cond[0], atol=1e-6)  # the first image's scale is 1
    assert denoise.path is VP
    unguided = D.adaptive_projected_guidance(BRANCHES, 1.0)
    np.testing.assert_array_equal(unguided(x, t), BRANCHES.cond(x, t))


def test_momentum_is_that_of_the_paper():
    """A whole DDIM run against the reference's buffer, fed the same answers."""
    grid = D.make_grid(VP, 6)
    x = x_T = D.initial_noise(KEY, SHAPE, grid)
    options = {"eta": 0.3, "norm_threshold": 2.0}
    denoise = D.adaptive_projected_guidance(BRANCHES, 4.0, momentum=-0.5, **options)
    run = jax.jit(
        lambda grid: D.sample(
            KEY, denoise, D.with_momentum(D.solvers.ddim()), grid, x_T, return_predictions=True
        )
    )
    ours, predictions = run(D.pad(grid, 8))
    call, buffer = jax.jit(BRANCHES.call), MomentumBuffer(-0.5)
    for i in range(6):
        uncond, cond = (
            torch.from_numpy(np.array(x_0)) for x_0 in call(jnp.asarray(x), jnp.full(3, grid.t[i]))
        )
        x_0 = normalized_guidance(cond, uncond, 3.0, buffer, use_original_formulation=True, **options).numpy()
        np.testing.assert_allclose(predictions[i], x_0, rtol=1e-3, atol=1e-4)
        x = grid.alpha[i + 1] * x_0 + grid.sigma[i + 1] / grid.sigma[i] * (x - grid.alpha[i] * x_0)
    np.testing.assert_allclose(ours, x, rtol=1e-3, atol=1e-4)
    without = D.adaptive_projected_guidance(BRANCHES, 4.0, **options)
    assert not np.allclose(D.sample(KEY, without, D.solvers.ddim(), grid, x_T), ours, atol=1e-2)


def test_momentum_zero_is_none_and_composes():
    grid = D.make_grid(VP, 4)
    x_T = D.initial_noise(KEY, SHAPE, grid)
    none = D.static_threshold(D.adaptive_projected_guidance(BRANCHES, 4.0))
    zero = D.static_threshold(D.adaptive_projected_guidance(BRANCHES, 4.0, momentum=0.0))
    np.testing.assert_allclose(
        D.sample(KEY, zero, D.with_momentum(D.solvers.heun()), grid, x_T),
        D.sample(KEY, none, D.solvers.heun(), grid, x_T),
        rtol=1e-4,
        atol=1e-5,
    )


def test_memory_costs_no_second_evaluation():
    weights = jnp.eye(32) * 0.1
    branches = D.condition_branches(lambda x, t, labels: jnp.tanh(x @ weights), LABELS, NULL)
    wide = branches.map(as_denoisers)
    x, grid = jnp.ones((3, 32, 32)), D.make_grid(VP, 4)

    def flops(solver, **options):
        denoise = D.adaptive_projected_guidance(wide, 3.0, **options)
        run = jax.jit(lambda x: D.sample(KEY, denoise, solver, grid, x))
        return run.lower(x).compile().cost_analysis()["flops"]

    one_evaluation = 2 * 6 * 32**3
    plain = flops(D.solvers.ddim(), norm_threshold=1.0, momentum=None)
    remembering = flops(D.with_momentum(D.solvers.ddim()), norm_threshold=1.0, momentum=-0.5)
    assert plain > one_evaluation  # or else this test sees nothing
    assert remembering < plain + 0.5 * one_evaluation


def test_gradients_are_finite_where_the_branches_agree():
    def loss(difference):
        return jnp.sum(D.project_guidance(jnp.zeros(SHAPE), difference, 3.0, 0.0, 1.0) ** 2)

    assert np.isfinite(jax.grad(loss)(jnp.zeros(SHAPE))).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: D.adaptive_projected_guidance(D.condition_branches(network, LABELS, NULL), 2.0),
            "make denoisers",
        ),
        (lambda: D.adaptive_projected_guidance(BRANCHES, np.nan), "guidance_scale"),
        (lambda: D.adaptive_projected_guidance(BRANCHES, -1.0, momentum=0.5), "guidance_scale"),
        (lambda: D.adaptive_projected_guidance(BRANCHES, 2.0, norm_threshold=-1.0), "norm_threshold"),
        (lambda: D.adaptive_projected_guidance(BRANCHES, 2.0, momentum=1.0), "momentum"),
        (
            lambda: D.sample(
                KEY,
                D.adaptive_projected_guidance(BRANCHES, 2.0, momentum=-0.5),
                D.solvers.ddim(),
                D.make_grid(VP, 2),
                jnp.ones(SHAPE),
            ),
            "with_momentum",
        ),
        (
            lambda: D.sample(
                KEY, BRANCHES.cond, D.with_momentum(D.solvers.ddim()), D.make_grid(VP, 2), jnp.ones(SHAPE)
            ),
            "momentum=",
        ),
    ],
)
def test_impossible_requests_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
