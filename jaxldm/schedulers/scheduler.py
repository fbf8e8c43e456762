"""What a scheduler_config.json stands for, as values: a sampler (solver and denoiser) and a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax.numpy as jnp

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.schedulers.grids import GridRule
from jaxldm.schedulers.runs import PLAIN, Runs


class Sampler(NamedTuple):
    """Solver and denoiser of a run, without its grid: what is compiled. Hashable, equal when equal.

    Attributes:
        prediction: what the network's output means, and the path that it was trained on.
        solver: from `D.solvers`.
        learned_variance: the network has 2C output channels, and the solver uses its variance.
        timestep_scaling: of the boundary condition of a consistency model, or None for other models.
        threshold: (percentile, max_value) of `D.dynamic_threshold`, (low, high) of `D.static_threshold` where
            `clips`, or None.
        clips: which of the two.
        network_times: None, or (t of the rows, the t that the network gets there), where that is another.
        initial_scale: the standard deviation of the noise that a run starts from; None is the first row's.
        num_steps: the number of steps that it is for; None: any.
    """

    prediction: D.Prediction
    solver: D.Solver
    learned_variance: bool = False
    timestep_scaling: float | None = None
    threshold: tuple[float, float] | None = None
    clips: bool = False
    network_times: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    initial_scale: float | None = None
    num_steps: int | None = None

    @property
    def path(self) -> D.Path:
        """Where the network was trained."""
        return self.prediction.path

    def denoiser(self, network: Callable[[Any, Any], Any]) -> D.Denoiser:
        """`denoise(x, t) -> x_0` of a network.

        Args:
            network: (x [N, h, w, c], t [N]) -> output [N, h, w, c], or 2c channels with learned variance.
        """
        network = network if self.network_times is None else _at_times(network, *self.network_times)
        denoise = D.denoiser(network, self.prediction, learned_variance=self.learned_variance)
        if self.timestep_scaling is not None:
            denoise = D.consistency_function(denoise, self.timestep_scaling)
        if self.threshold is None:
            return denoise
        return (D.static_threshold if self.clips else D.dynamic_threshold)(denoise, *self.threshold)

    def initial_noise(self, keys: Any, shape: tuple[int, ...], grid: D.Grid) -> Any:
        """`D.initial_noise` [B, H, W, C], in `initial_scale` where there is one."""
        noise = D.initial_noise(keys, shape, grid)
        return noise if self.initial_scale is None else noise * (self.initial_scale / grid.sigma[0])


def _at_times(
    network: Callable[[Any, Any], Any], rows: tuple[float, ...], network_times: tuple[float, ...]
) -> Callable[[Any, Any], Any]:
    """The network that gets, at the t of each row, another time."""

    def call(x, t):
        times, others = jnp.asarray(rows, t.dtype), jnp.asarray(network_times, t.dtype)
        return network(x, others[jnp.argmin(jnp.abs(times[None] - t[:, None]), axis=1)])

    return call


class DynamicShift(NamedTuple):
    """A shift of a flow path that grows with the image, see `D.resolution_shift`.

    Attributes:
        base_shift, max_shift: at `base_tokens` and at `max_tokens` image tokens.
        kind: "exponential" or "linear".
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    kind: str = "exponential"

    def shift(self, num_image_tokens: int) -> float:
        """The shift for an image of so many tokens."""
        return D.resolution_shift(num_image_tokens, **self._asdict())


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A sampler, and the grid that it runs on: all that a scheduler of diffusers knows.

    Attributes:
        sampler: solver and denoiser.
        grid: how the rows are spaced.
        dynamic_shift: None, or the shift by the size of the image, in place of the path's own.
        quirks: None, or how its runs are made instead: as diffusers does (`Quirks`), backwards (`Inverse`).
    """

    sampler: Sampler
    grid: GridRule = dataclasses.field(default_factory=GridRule)
    dynamic_shift: DynamicShift | None = None
    quirks: Runs | None = None

    def __post_init__(self):
        if self.dynamic_shift is not None and not isinstance(self.path, D.Flow):
            raise InvalidArgumentError(
                f"a dynamic shift needs a flow path, but this is a {self.path.name} path"
            )

    @property
    def path(self) -> D.Path:
        """Where the network was trained."""
        return self.sampler.path

    @property
    def prediction(self) -> D.Prediction:
        """What the network's output means."""
        return self.sampler.prediction

    @property
    def solver(self) -> D.Solver:
        """The solver."""
        return self.sampler.solver

    @property
    def runs(self) -> Runs:
        """How runs and their parts are made."""
        return PLAIN if self.quirks is None else self.quirks

    def path_for(self, num_image_tokens: int | None = None) -> D.Path:
        """The path, with the shift for an image of so many tokens where the shift is dynamic."""
        if self.dynamic_shift is None or num_image_tokens is None:
            return self.path
        return dataclasses.replace(cast(Any, self.path), shift=self.dynamic_shift.shift(num_image_tokens))

    def make_grid(self, num_inference_steps: int, num_image_tokens: int | None = None) -> D.Grid:
        """The rows of a run of that many steps."""
        return self.run(num_inference_steps, num_image_tokens)[1]

    def run(self, num_inference_steps: int, num_image_tokens: int | None = None) -> tuple[Sampler, D.Grid]:
        """(sampler, rows) of a run of that many steps."""
        return self.runs.run(self.sampler, self.grid, self.path_for(num_image_tokens), num_inference_steps)

    def with_grid(self, **changes: Any) -> Scheduler:
        """The same with other options of its `GridRule`.

        >>> from jaxldm import schedulers
        >>> scheduler = schedulers.from_config({"_class_name": "DDIMScheduler"})
        >>> scheduler.grid.spacing, scheduler.with_grid(spacing="trailing").grid.spacing
        ('leading', 'trailing')
        """
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, **changes))
