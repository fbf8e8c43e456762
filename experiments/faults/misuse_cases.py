"""The valid calls that `misuse` starts from, one of each public function of `jaxldm.diffusion`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D

KEY = jax.random.key(0)
FLOW, VP = D.Flow(), D.VP.named("linear")
IMAGES = np.zeros((2, 4, 4, 1), np.float32)
ONES = np.ones(2, np.float32)
TOKENS = np.zeros((2, 4), np.int32)


class Case(NamedTuple):
    """A valid call, of which each argument is replaced in turn.

    Attributes:
        name: of the function, as people write it.
        function: called with the arguments by name.
        arguments: valid ones, or () -> valid ones.
        cheap: the valid call, and with it wrong values that turn out to be allowed, takes milliseconds.
        words: argument -> another word for it in messages.
        refusal: a word of the error of the valid call itself, where what it needs would be too large, or
            nothing is to be written. Any other valid call works.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    cheap: bool = True
    words: Mapping[str, str] = MappingProxyType({})
    refusal: str = ""


def halve(x, t):
    """A network."""
    return 0.5 * x


def conditional(x, t, condition):
    """A network with a condition."""
    return 0.5 * x


def logits(tokens, condition=None):
    """A network of token ids."""
    return jnp.zeros((*tokens.shape, 4), jnp.float32)


def accept(*values):
    """A callback."""


def cases_of_diffusion() -> list[Case]:
    """Of `jaxldm.diffusion`."""
    return [
        *paths(),
        *betas(),
        *predictions(),
        *grids(),
        *solvers(),
        *guidance(),
        *sampling(),
        *training(),
        *tokens(),
    ]


def of_d(at: str, call: Any = None, /, *, cheap: bool = True, words: Any = None, **arguments: Any) -> Case:
    """The case of a public function of `D`."""
    return Case(f"D.{at}", getattr(D, at) if call is None else call, arguments, cheap, words or {})


def paths() -> list[Case]:
    """The constructors of paths, and their methods."""
    return [
        of_d("VP", betas=[0.1, 0.2], words={"betas": "beta"}),
        of_d(
            "VP.named",
            D.VP.named,
            betas="linear",
            num_train_timesteps=10,
            beta_start=0.1,
            beta_end=0.2,
            zero_terminal_snr=False,
            words={"beta_start": "beta", "beta_end": "beta"},
        ),
        of_d("ContinuousVP", beta_min=0.1, beta_max=20.0, t_min=1e-3),
        of_d("EDM", sigma_min=0.002, sigma_max=80.0),
        of_d("Flow", shift=1.0, t_min=1e-3),
        of_d("Interpolant", kind="linear", gamma=None, t_min=1e-3),
        of_d("Cosine", offset=0.008, scaler=1.0),
        of_d("Flow.alpha", FLOW.alpha, t=0.5),
        of_d("VP.sigma", VP.sigma, t=0.5),
        of_d("VP.time", VP.time, sigma_over_alpha=0.5, words={"sigma_over_alpha": "t must"}),
        of_d("VP.derivatives", FLOW.derivatives, t=0.5),
        of_d(
            "resolution_shift",
            num_image_tokens=4096,
            base_tokens=256,
            max_tokens=4096,
            base_shift=0.5,
            max_shift=1.15,
            kind="exponential",
            words={
                "num_image_tokens": "tokens",
                "max_shift": "shift",
                "base_shift": "shift",
                "max_tokens": "tokens",
                "base_tokens": "tokens",
            },
        ),
        of_d(
            "convert_time",
            t=0.5,
            from_path=FLOW,
            to_path=D.EDM(),
            words={"t": "times", "to_path": "path", "from_path": "path"},
        ),
        of_d("on_path", denoise=D.gaussian_denoiser(FLOW), path=D.EDM()),
        of_d("path_from_dict", entries={"type": "flow"}),
        of_d("path_to_dict", path=FLOW),
        of_d("interpolant_gamma", t=0.5, smin=0.0, smax=0.1),
    ]


def betas() -> list[Case]:
    """Beta schedules."""
    ends = {"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.2}
    beta = {
        name: "beta"
        for name in (
            "beta_start",
            "beta_end",
            "max_beta",
            "s",
            "rate",
            "mu",
            "b",
            "tau",
            "start",
            "end",
            "alpha_bar",
            "betas",
        )
    }
    return [
        of_d("linear_betas", words=beta, **ends),
        of_d("scaled_linear_betas", words=beta, **ends),
        of_d("sigmoid_betas", words=beta, **ends),
        of_d("cosine_betas", words=beta, num_train_timesteps=10, s=0.008, max_beta=0.999),
        of_d(
            "sigmoid_alphas_betas",
            words=beta,
            num_train_timesteps=10,
            start=-3.0,
            end=3.0,
            tau=1.0,
            max_beta=0.999,
        ),
        of_d("exponential_betas", words=beta, num_train_timesteps=10, rate=12.0),
        of_d(
            "laplace_betas",
            words=beta,
            num_train_timesteps=10,
            mu=0.0,
            b=0.5,
            max_beta=0.999,
            square_root=False,
        ),
        of_d(
            "betas_from_alpha_bar",
            words=beta,
            alpha_bar=lambda t: 1 - t,
            num_train_timesteps=10,
            max_beta=0.9,
        ),
        of_d("rescale_zero_terminal_snr", words=beta, betas=[0.1, 0.2]),
    ]


def predictions() -> list[Case]:
    """Makers of predictions and denoisers."""
    makers = [
        of_d(name, path=D.EDM() if name == "edm" else VP) for name in ("epsilon", "x0", "v", "flow", "edm")
    ]
    return [
        *makers,
        of_d("velocity", path=FLOW),
        of_d("edm", path=D.EDM(), sigma_data=0.5),
        of_d("prediction", name="v_prediction", path=VP, words={"name": "prediction"}),
        of_d("linear_prediction", name="mine", path=VP, coefficients=lambda t: (0, 1)),
        of_d("from_x0", prediction=D.v(VP), x_0=IMAGES, x_t=IMAGES, t=5.0),
        of_d("prediction_to_dict", prediction=D.v(VP)),
        of_d("prediction_of_0_1", entries={"path": "flow", "prediction": "flow"}, words={"entries": "entry"}),
        of_d("denoiser", network=halve, prediction=D.v(VP), learned_variance=False),
        of_d("Denoiser", function=halve, path=VP),
        of_d("gaussian_denoiser", path=FLOW, mean=0.0, std=1.0),
        of_d(
            "gaussian_solution", cheap=False, path=FLOW, mean=0.0, std=1.0, x=IMAGES, t_start=1.0, t_end=0.0
        ),
        of_d("gaussian_mixture_denoiser", path=FLOW, weights=ONES, means=np.zeros((2, 4, 4, 1)), stds=ONES),
        of_d(
            "gaussian_mixture_log_density",
            path=FLOW,
            weights=ONES,
            means=np.zeros((2, 4, 4, 1)),
            stds=ONES,
            x=IMAGES,
            t=0.5,
            cheap=False,
        ),
        of_d(
            "consistency_function", denoise=D.denoiser(halve, D.v(VP)), timestep_scaling=10.0, sigma_data=0.5
        ),
        of_d("change_x0", denoise=halve, change=lambda x_0, x, t: x_0),
        of_d("static_threshold", denoise=halve, low=-1.0, high=1.0),
        of_d("dynamic_threshold", denoise=halve, percentile=0.995, max_value=None),
        of_d(
            "classifier_guidance",
            denoise=D.gaussian_denoiser(FLOW),
            log_probability=halve,
            guidance_scale=1.0,
        ),
    ]


def grids() -> list[Case]:
    """Spacings and what cuts grids."""
    grid = D.make_grid(FLOW, 8)
    steps = {"num_inference_steps": 4, "final": "clean"}
    shifted = {"path": FLOW, "shift": 1.0, **steps}
    return [
        of_d(
            "make_grid", path=FLOW, num_inference_steps=4, spacing="trailing", shift=1.0, shift_terminal=None
        ),
        of_d("trailing", **shifted, shift_terminal=0.1),
        of_d("leading", path=VP, offset=1, **steps, words={"offset": "times"}),
        of_d("linspace", **shifted),
        of_d("linspace_fractional", **shifted),
        of_d("beta", **shifted, shape=(0.6, 0.6)),
        of_d("stage_c", **shifted),
        of_d("lcm", path=VP, original_steps=50, **steps, words={"original_steps": "steps"}),
        of_d("karras", path=D.EDM(), rho=7.0, **steps),
        of_d("exponential", path=D.EDM(), **steps),
        of_d("beta_sigmas", path=D.EDM(), shape=(0.6, 0.6), **steps),
        of_d("align_your_steps", path=VP, table="sd15", **steps),
        of_d("at_times", path=FLOW, t=[1.0, 0.5], shift=None, final="clean", words={"t": "times|steps"}),
        of_d(
            "at_sigmas",
            path=FLOW,
            sigmas=[1.0, 0.5],
            shift=None,
            final="clean",
            words={"sigmas": "times|steps"},
        ),
        of_d(
            "lcm_timesteps",
            num_inference_steps=4,
            num_train_timesteps=1000,
            original_inference_steps=50,
            strength=1.0,
        ),
        of_d("pad", grid=grid, max_steps=20),
        of_d("cut", grid=grid, first=0, last=4, words={"first": "rows", "last": "rows"}),
        of_d("reverse", grid=grid),
        of_d("steps_in", grid=grid),
        of_d("cut_by_strength", grid=grid, strength=0.5, round_up=False),
        of_d("split_at_snr", grid=grid, snr=1.0),
        of_d("split_at_fraction", grid=grid, path=FLOW, fraction=0.5),
        of_d("resampling_grid", grid=grid, jump_length=2, resamplings=2),
        of_d(
            "restart_grid",
            path=D.EDM(),
            grid=D.make_grid(D.EDM(), 8),
            restarts=[D.Restart(2.0, 4.0, 1, 2)],
            rho=7.0,
        ),
        of_d("evaluation_counter", solver=D.solvers.ddim(), path=VP, max_steps=4),
    ]


def solvers() -> list[Case]:
    """Every solver with every option, and what wraps solvers."""
    rows = []
    for name, function in D.solvers.SOLVERS.items():
        options = {
            key: parameter.default for key, parameter in inspect.signature(function).parameters.items()
        }
        if options:
            rows.append(Case(f"D.solvers.{name}", function, options, True, {"last_step": "last step"}))
    return [
        *rows,
        Case("D.solvers.make", D.solvers.make, {"name": "ddim", "eta": 0.0}, True, {"name": "solver"}),
        Case("D.solvers.ddim_inverse", D.solvers.ddim_inverse, {"iterations": 2}),
        of_d("with_momentum", solver=D.solvers.ddim()),
        of_d("inpaint", solver=D.solvers.ddim(), image=np.zeros((4, 4, 1)), mask=np.zeros((4, 4, 1))),
    ]


def guidance() -> list[Case]:
    """Guidance and its schedules."""
    labels, grid = np.zeros(2, np.int32), D.make_grid(FLOW, 4)
    branches = D.condition_branches(conditional, labels, 9)
    scales = {"guidance_scale": 2.0, "rescale": 0.0}
    null = {"condition": labels, "null_condition": 9, "words": {"condition": "condition|null"}}
    return [
        of_d(
            "guide",
            unconditional=IMAGES,
            conditional=IMAGES,
            guidance_scale=2.0,
            words={"guidance_scale": "one number"},
        ),
        of_d(
            "guide_chain",
            outputs=(IMAGES, IMAGES, IMAGES),
            guidance_scales=(1.5, 7.0),
            words={"guidance_scales": "one number|one fewer|a list"},
        ),
        of_d(
            "rescale_guidance",
            guided=IMAGES,
            conditional=IMAGES,
            rescale=0.5,
            words={"rescale": "one number"},
        ),
        of_d("condition_branches", network=conditional, **null),
        of_d("network_branches", network=halve, weak=halve),
        of_d("guide_branches", branches=branches, guided_channels=None, **scales),
        of_d("classifier_free_guidance", network=conditional, **null, **scales, guided_channels=None),
        of_d("autoguidance", network=halve, weak=halve, **scales),
        of_d("guidance_schedule", grid=grid, scales=[1.0, 2.0, 3.0, 1.0]),
        of_d("guidance_interval", path=FLOW, guidance_scale=2.0, low=0.0, high=1.0),
        of_d("cfg_plus_plus", cheap=False, grid=grid, scale=0.5, eta=0.0),
        of_d(
            "project_guidance",
            conditional=IMAGES,
            difference=IMAGES,
            guidance_scale=2.0,
            eta=0.0,
            norm_threshold=1.0,
            words={"guidance_scale": "one number"},
        ),
        of_d(
            "adaptive_projected_guidance",
            branches=branches.map(lambda p: D.denoiser(p, D.v(VP))),
            guidance_scale=2.0,
            eta=0.0,
            norm_threshold=None,
            momentum=None,
        ),
    ]


def sampling() -> list[Case]:
    """The sampling loop. What turns out to be allowed is compiled, so the grid is short."""
    grid = D.make_grid(FLOW, 1)
    x_T = np.ones((1, 4, 4, 1), np.float32)
    keys = D.image_keys(KEY, 1)
    return [
        of_d("image_keys", key=KEY, batch_size=2),
        of_d("initial_noise", key=KEY, shape=(2, 4, 4, 1), grid=grid, cheap=False),
        of_d(
            "sample",
            key=KEY,
            denoise=D.gaussian_denoiser(FLOW),
            solver=D.solvers.ddim(),
            grid=grid,
            x_T=x_T,
            return_trajectory=False,
            return_predictions=False,
            callback=None,
            progress=None,
            cheap=False,
        ),
        of_d(
            "sample_step",
            keys=keys,
            denoise=D.gaussian_denoiser(FLOW),
            solver=D.solvers.ddim(),
            grid=grid,
            state=D.solvers.ddim().init(x_T),
            i=0,
            cheap=False,
        ),
        of_d(
            "bar_progress",
            bar=SimpleNamespace(n=0, total=1, update=accept, refresh=accept),
        ),
        of_d("listening", lambda function: D.listening(function).__enter__(), function=accept),
    ]


def training() -> list[Case]:
    """The loss and its parts."""
    return [
        of_d(
            "diffusion_loss",
            key=KEY,
            network=conditional,
            prediction=D.v(VP),
            x_0=IMAGES,
            condition=ONES,
            weight=None,
            time=None,
            log_variance=None,
            noise_offset=0.0,
            null_condition=0.0,
            condition_dropout=0.5,
            words={"weight": "weight", "condition": "condition", "log_variance": "log_variance|log-variance"},
            cheap=False,
        ),
        of_d("min_snr", gamma=5.0),
        of_d("p2", k=1.0, gamma=1.0),
        of_d("drop_condition", key=KEY, condition=ONES, null_condition=0.0, probability=0.5, cheap=False),
        of_d("logit_normal", mean=0.0, std=1.0),
        of_d("log_normal", mean=0.0, std=1.0),
        of_d("mode", scale=1.29),
        of_d("training_times", name="mode", scale=1.29, words={"name": "time distribution"}),
        of_d("default_training_times", path=FLOW),
    ]


def tokens() -> list[Case]:
    """Masked tokens."""
    loss = {
        "key": KEY,
        "network": logits,
        "tokens": TOKENS,
        "condition": None,
        "mask_token": 4,
        "schedule": "cosine",
        "label_smoothing": 0.1,
        "null_condition": None,
        "condition_dropout": 0.0,
    }
    return [
        of_d("mask_fraction", schedule="cosine", r=0.5),
        of_d("mask_tokens", key=KEY, tokens=TOKENS, mask_token=4, schedule="cosine", cheap=False),
        of_d("mask_by_chance", key=KEY, tokens=TOKENS, share=0.5, mask_token=4, cheap=False),
        of_d("masked_token_loss", cheap=False, **loss),
        of_d(
            "make_unmasking",
            num_inference_steps=4,
            schedule="cosine",
            temperature=(2.0, 0.0),
            max_steps=None,
            strength=1.0,
            words={"num_inference_steps": "steps", "strength": "steps"},
        ),
        of_d(
            "guided_logits",
            network=logits,
            condition=ONES,
            null_condition=0.0,
            guidance_scale=2.0,
            cond_only_at_1=True,
            words={"condition": "condition|null"},
        ),
        of_d(
            "sample_tokens",
            key=KEY,
            logits=logits,
            tokens=TOKENS,
            unmasking=D.make_unmasking(1),
            mask_token=4,
            total=None,
            return_trajectory=False,
            callback=None,
            progress=None,
            cheap=False,
        ),
    ]
