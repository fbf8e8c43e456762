import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_kinds import DISTILLED, MULTISTEP, NOISY, SAME_AS

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
ZERO_SNR = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))
KEY = jax.random.key(11)
SHAPE = (3, 2, 2, 1)
MAX_STEPS = 16
# Every solver there is, as it comes, and those that draw noise only when told to.
VARIANTS = [(name, ()) for name in D.solvers.SOLVERS] + [
    ("ddim", (("eta", 0.7),)),
    ("heun", (("s_churn", 3.0),)),
]
STOCHASTIC = NOISY | DISTILLED | {"restart"}  # restart adds noise where the grid rises
DETERMINISTIC = [variant for variant in VARIANTS[: len(D.solvers.SOLVERS)] if variant[0] not in STOCHASTIC]


def over(variants):
    return pytest.mark.parametrize(
        "variant", variants, ids=lambda variant: variant[0] + str(dict(variant[1]))
    )


CHURN = ("heun", (("s_churn", 3.0),))


def network(x, t):
    return jnp.sin(2 * x + 0.3 * jnp.roll(x, 1, axis=1)) + 0.001 * t.reshape(-1, 1, 1, 1)


def solver_of(variant):
    return D.solvers.make(variant[0], **dict(variant[1]))


PATHS = (VP, ZERO_SNR, FLOW, EDM)


class PathByNumber:
    """One of PATHS, chosen by a number that may be traced."""

    __class__ = D.Path  # to `isinstance`

    def __init__(self, number):
        self.number = number

    def __getattr__(self, name):
        values = [getattr(path, name) for path in PATHS]
        if name in ("t_clean", "t_noisy"):
            return jnp.asarray(values)[self.number]
        return lambda t: jax.lax.switch(self.number, values, t)


@functools.cache
def runner(variant):
    """A compiled run(key, grid, x, path=0), kept for all the tests of this file."""
    denoisers = [D.denoiser(network, D.v(path)) for path in PATHS]

    def run(key, grid, x, path=0):
        denoise = D.Denoiser(lambda x, t: jax.lax.switch(path, denoisers, x, t), PathByNumber(path))
        return D.sample(key, denoise, solver_of(variant), grid, x)

    return jax.jit(run)


@over(VARIANTS)
def test_cutting_and_continuing_equals_the_whole(variant):
    if variant == CHURN or variant[0] in MULTISTEP:
        pytest.skip("multistep solvers remember the previous steps, and churn depends on the number of steps")
    run = runner(variant)
    grid = D.make_grid(VP, 7)
    x = D.initial_noise(KEY, SHAPE, grid)
    whole = run(KEY, D.pad(grid, MAX_STEPS), x)
    for k in (2, 4):
        middle = run(KEY, D.pad(D.cut(grid, 0, k), MAX_STEPS), x)
        np.testing.assert_array_equal(run(KEY, D.pad(D.cut(grid, k), MAX_STEPS), middle), whole)
    assert not np.allclose(middle, whole)


@over(VARIANTS)
def test_an_image_depends_on_its_own_key_alone(variant):
    run = runner(variant)
    grid = D.pad(D.make_grid(VP, 5), MAX_STEPS)
    images = run(KEY, grid, D.initial_noise(KEY, SHAPE, grid))
    order = jnp.array([2, 0, 1])
    keys = D.image_keys(KEY, 3)[order]
    shuffled = run(keys, grid, D.initial_noise(keys, SHAPE, grid))
    np.testing.assert_allclose(shuffled, images[order], rtol=1e-5, atol=1e-6)
    assert not np.allclose(images[0], images[1])


def test_an_image_does_not_depend_on_the_batch_size():
    run = runner(("ddpm", ()))
    grid = D.pad(D.make_grid(VP, 5), MAX_STEPS)
    few, many = (run(KEY, grid, D.initial_noise(KEY, (count, *SHAPE[1:]), grid)) for count in (3, 16))
    np.testing.assert_allclose(few, many[:3], rtol=1e-5, atol=1e-6)


def test_initial_noise():
    grid = D.make_grid(EDM, 4)
    noise = np.asarray(D.initial_noise(KEY, (64, 8, 8, 2), grid))
    assert noise.std() == pytest.approx(80, rel=0.02) and abs(noise.mean()) < 4 * 80 / noise.size**0.5
    assert not np.allclose(noise[0], noise[1])
    np.testing.assert_array_equal(noise[:3], D.initial_noise(KEY, (3, 8, 8, 2), grid))
    # It is none of the noises that the steps draw.
    for step in (0, 1, 49):
        keys = jax.vmap(jax.random.fold_in, (0, None))(D.image_keys(KEY, 64), step)
        assert np.abs(80 * D.solvers.noise_like(keys, noise) - noise).max() > 1


def test_old_style_keys_are_accepted():
    grid = D.make_grid(VP, 3)
    np.testing.assert_array_equal(
        D.initial_noise(jax.random.PRNGKey(11), SHAPE, grid), D.initial_noise(KEY, SHAPE, grid)
    )
    assert D.image_keys(jax.random.key_data(D.image_keys(KEY, 4)), 4).shape == (4,)


@over([variant for variant in DETERMINISTIC if variant[0] not in SAME_AS])
def test_jit_equals_eager(variant):
    grid = D.make_grid(VP, 3)
    x = D.initial_noise(KEY, SHAPE, grid)
    with jax.disable_jit():
        eager = D.sample(KEY, D.denoiser(network, D.v(VP)), solver_of(variant), grid, x)
    np.testing.assert_allclose(runner(variant)(KEY, D.pad(grid, MAX_STEPS), x), eager, rtol=1e-4, atol=1e-5)


@over([("ddpm", ())])
def test_vmap_over_runs(variant):
    run = runner(variant)
    grid = D.pad(D.make_grid(VP, 4), MAX_STEPS)
    keys = jax.random.split(KEY, 2)
    x = jax.random.normal(KEY, (2, *SHAPE))
    together = jax.vmap(run, (0, None, 0))(keys, grid, x)
    for k in range(2):
        np.testing.assert_allclose(together[k], run(keys[k], grid, x[k]), rtol=1e-5, atol=1e-5)


def test_pmap_over_eight_devices():
    assert jax.device_count() == 8
    run = runner(("ddpm", ()))
    grid = D.pad(D.make_grid(VP, 4), MAX_STEPS)
    x = D.initial_noise(KEY, (16, *SHAPE[1:]), grid)
    shared = jax.pmap(run, in_axes=(0, None, 0))(
        D.image_keys(KEY, 16).reshape(8, 2), grid, x.reshape(8, 2, *SHAPE[1:])
    )
    np.testing.assert_allclose(shared.reshape(x.shape), run(KEY, grid, x), rtol=1e-5, atol=1e-5)


def test_a_sharded_batch_gives_the_same_images():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    grid = D.pad(D.make_grid(VP, 4), MAX_STEPS)
    x = D.initial_noise(KEY, (16, *SHAPE[1:]), grid)
    run = runner(("ddpm", ()))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    shared = run(KEY, grid, split)
    assert len(shared.sharding.device_set) == 8
    np.testing.assert_allclose(shared, run(KEY, grid, x), rtol=1e-5, atol=1e-5)


@over([variant for variant in VARIANTS[:-2] if variant[0] not in SAME_AS])
def test_gradients_agree_with_differences(variant, x64):
    solver = solver_of(variant)
    grid = D.make_grid(FLOW, 3)  # from pure noise to the clean row, where a division by 0 would show
    x = jax.random.normal(KEY, SHAPE)

    @jax.jit
    def loss(scale, x):
        denoise = D.denoiser(lambda x, t: scale * network(x, t), D.v(FLOW))
        return jnp.sum(D.sample(KEY, denoise, solver, grid, x) ** 2)

    by_scale, by_x = jax.grad(loss, (0, 1))(0.8, x)
    step = 1e-5
    difference = (loss(0.8 + step, x) - loss(0.8 - step, x)) / (2 * step)
    assert float(by_scale) == pytest.approx(float(difference), rel=1e-5)
    direction = jax.random.normal(jax.random.key(1), SHAPE)
    difference = (loss(0.8, x + step * direction) - loss(0.8, x - step * direction)) / (2 * step)
    assert float(jnp.sum(by_x * direction)) == pytest.approx(float(difference), rel=1e-5)


@over(VARIANTS)
def test_finite_at_pure_noise_and_at_the_clean_row(variant):
    for index, path in list(enumerate(PATHS))[1:]:
        for steps in (1, 2, 3, MAX_STEPS):
            grid = D.make_grid(path, steps)
            assert grid.sigma[-1] == 0 and (path is EDM or grid.alpha[0] == 0)
            x_0 = runner(variant)(KEY, D.pad(grid, MAX_STEPS), D.initial_noise(KEY, SHAPE, grid), index)
            assert np.isfinite(x_0).all()


@over(DETERMINISTIC)
def test_finite_from_the_clean_row_to_pure_noise(variant):
    grid = D.reverse(D.make_grid(FLOW, MAX_STEPS))
    assert grid.sigma[0] == 0 and grid.alpha[-1] == 0
    assert np.isfinite(runner(variant)(KEY, D.pad(grid, MAX_STEPS), jnp.ones(SHAPE), PATHS.index(FLOW))).all()


def test_inversion_returns_to_the_start(x64):
    run = jax.jit(lambda grid, x: D.sample(KEY, D.gaussian_denoiser(VP, 0.2, 0.5), D.solvers.ddim(), grid, x))
    x_0 = 0.2 + 0.5 * jax.random.normal(KEY, SHAPE)
    errors = []
    for steps in (25, 50, 100, 200):
        grid = D.make_grid(VP, steps, spacing="exponential", final="sigma_min")
        noise = run(D.pad(D.reverse(grid), 200), x_0)
        errors.append(np.abs(run(D.pad(grid, 200), noise) - x_0).max())
    assert errors[-1] < 0.03 and all(a > 1.8 * b for a, b in itertools.pairwise(errors))


def test_second_calls_compile_nothing(caplog):
    @jax.jit
    def run(seed, guidance_scale, labels, grid):
        key = jax.random.key(seed)
        guided = D.classifier_free_guidance(
            lambda x, t, c: network(x, t) * c.reshape(-1, 1, 1, 1).astype(x.dtype), labels, 10, guidance_scale
        )
        x = D.initial_noise(key, SHAPE, grid)
        return D.sample(key, D.denoiser(guided, D.epsilon(VP)), D.solvers.dpmpp_2m(), grid, x)

    def compilations(call):
        caplog.clear()
        with jax.log_compiles():
            result = np.asarray(call())
        return result, sum("Compiling" in record.getMessage() for record in caplog.records)

    first, count = compilations(lambda: run(0, 3.0, np.arange(3), D.pad(D.make_grid(VP, 20), 50)))
    assert count > 0  # or else this test sees nothing
    second, count = compilations(lambda: run(1, 7.5, np.array([4, 4, 4]), D.pad(D.make_grid(VP, 50), 50)))
    assert count == 0
    third, count = compilations(
        lambda: run(1, 7.5, np.array([4, 4, 4]), D.pad(D.make_grid(VP, 7, spacing="leading"), 50))
    )
    assert count == 0
    assert not np.allclose(first, second) and not np.allclose(second, third)


@over([("heun", ()), ("dpmpp_2m", ())])
def test_padding_changes_nothing(variant):
    grid = D.make_grid(VP, 5)
    x = D.initial_noise(KEY, SHAPE, grid)
    np.testing.assert_allclose(
        runner(variant)(KEY, grid, x), runner(variant)(KEY, D.pad(grid, MAX_STEPS), x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "name, options, evaluations",
    [
        ("ddim", {}, 6),
        ("heun", {}, 11),
        ("dpm2", {}, 11),
        ("lms", {}, 6),
        ("pndm", {}, 7),
        ("pndm", {"skip_prk_steps": False}, 15),
        ("dpmpp_2m", {}, 6),
        ("dpmpp_2s", {}, 6),
        ("unipc", {}, 6),
    ],
)
def test_network_evaluations(name, options, evaluations):
    calls = []

    def predict(x, t):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return network(x, t)

    grid = D.pad(D.make_grid(VP, 6), 9)
    x = D.initial_noise(KEY, SHAPE, grid)
    solver = D.solvers.make(name, **options)
    D.sample(KEY, D.denoiser(predict, D.v(VP)), solver, grid, x).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == evaluations


def test_trajectory_and_callback():
    grid = D.make_grid(VP, 4)
    x = D.initial_noise(KEY, SHAPE, grid)
    seen = {}

    @jax.jit
    def run(grid, x):
        return D.sample(
            KEY,
            D.denoiser(network, D.v(VP)),
            D.solvers.ddpm(),
            grid,
            x,
            return_trajectory=True,
            callback=lambda row, x: seen.update({int(row): np.asarray(x)}),
        )

    last, trajectory = run(D.cut(grid, 1), x)
    jax.effects_barrier()
    assert trajectory.shape == (4, *SHAPE) and sorted(seen) == [1, 2, 3]
    np.testing.assert_array_equal(trajectory[0], x)
    np.testing.assert_array_equal(trajectory[-1], last)
    for row, value in seen.items():
        np.testing.assert_array_equal(value, trajectory[row])


def test_bfloat16_networks_leave_the_arithmetic_in_float32():
    def predict(x, t):
        assert t.dtype == jnp.float32
        return network(x, t).astype(jnp.bfloat16)

    grid = D.make_grid(VP, 4)
    x = D.initial_noise(KEY, SHAPE, grid)
    low = D.sample(KEY, D.denoiser(predict, D.epsilon(VP)), D.solvers.heun(), grid, x)
    assert low.dtype == jnp.float32
    assert (
        D.sample(
            KEY, D.denoiser(predict, D.epsilon(VP)), D.solvers.ddim(), grid, x.astype(jnp.bfloat16)
        ).dtype
        == jnp.float32
    )


def test_plain_functions_are_denoisers():
    grid = D.make_grid(FLOW, 4)
    x = D.initial_noise(KEY, SHAPE, grid)
    plain = D.sample(KEY, lambda x, t: 0.5 * x * (1 - t), D.solvers.heun(), grid, x)
    known = D.sample(
        KEY, D.Denoiser(lambda x, t: 0.5 * x * (1 - t.reshape(-1, 1, 1, 1)), FLOW), D.solvers.heun(), grid, x
    )
    np.testing.assert_allclose(plain, known, rtol=1e-6)


def test_edm_preconditioning():
    sigma = jnp.array([0.002, 0.5, 80.0])
    x_0 = 0.5 * jax.random.normal(KEY, (3, 64, 64, 1))
    x = x_0 + sigma.reshape(3, 1, 1, 1) * jax.random.normal(jax.random.key(1), x_0.shape)
    seen = []

    def silent(x, noise):
        seen.append((x, noise))
        return jnp.zeros_like(x)

    # For data of standard deviation sigma_data a network that says 0 is the exact denoiser, c_skip x.
    denoise = D.denoiser(silent, D.edm(D.EDM(), 0.5))
    np.testing.assert_allclose(denoise(x, sigma), D.gaussian_denoiser(EDM, 0.0, 0.5)(x, sigma), rtol=1e-5)
    np.testing.assert_allclose(seen[0][0].std(axis=(1, 2, 3)), 1, rtol=0.05)
    np.testing.assert_allclose(seen[0][1], np.log(sigma) / 4, rtol=1e-5)
    # What it has to learn has unit variance too.
    unit = D.denoiser(lambda x, noise: jnp.ones_like(x), D.edm(D.EDM(), 0.5))
    wanted = (x_0 - denoise(x, sigma)) / (unit(x, sigma) - denoise(x, sigma))
    np.testing.assert_allclose(wanted.std(axis=(1, 2, 3)), 1, rtol=0.05)
    assert np.isfinite(denoise(x, 0.0)).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.solvers.ddim(eta=1.5), "eta"),
        (lambda: D.solvers.heun(s_churn=-1), "s_churn"),
        (lambda: D.solvers.make("ddim", churn=1), "it has: eta"),
        (lambda: D.solvers.make("euler", eta=1), "none"),
        (lambda: D.image_keys(jax.random.split(KEY, 3), 2), "one key, or one per image"),
        (lambda: D.image_keys(7, 2), r"jax\.random\.key\(7\)"),
        (lambda: D.denoiser(lambda x, t: x, D.edm(VP, 0.5)), "EDM path"),
        (lambda: D.denoiser(lambda x, t: x, D.edm(D.EDM(), -0.5)), "sigma_data"),
        (
            lambda: D.sample(
                KEY, lambda x, t: x, D.solvers.heun(s_churn=1.0), D.make_grid(EDM, 3), jnp.ones(SHAPE)
            ),
            r"D\.Denoiser",
        ),
    ],
)
def test_impossible_requests_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="did you mean 'dpmpp_2m'"):
        D.solvers.make("dpmp_2m")
    with pytest.raises(UnknownNameError, match="small, large"):
        D.solvers.ddpm("medium")


def test_a_network_that_answers_in_another_shape_is_caught_before_compiling():
    grid = D.make_grid(VP, 3)
    with pytest.raises(InvalidArgumentError, match="shape"):
        D.sample(
            KEY, D.denoiser(lambda x, t: x[..., 0], D.epsilon(VP)), D.solvers.ddim(), grid, jnp.ones(SHAPE)
        )
