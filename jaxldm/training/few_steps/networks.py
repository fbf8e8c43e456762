"""The networks of a student: what it takes besides the time, an adapter in its place, and its critic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxldm import checkpoints, models
from jaxldm.checkpoints.names import Placement
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.few_steps.matching import of_student
from jaxldm.training.few_steps.method import TEACHER, named
from jaxldm.training.few_steps.methods import METHODS
from jaxldm.training.few_steps.recipe import FewStepsRecipe
from jaxldm.training.few_steps.teachers import SCALE_WIDTH, begin_as_teacher, denoiser_folder
from jaxldm.training.finetune_recipe import LoraRecipe
from jaxldm.training.runs import LORA_FILE, RunFolder
from jaxldm.training.state import Params
from jaxldm.training.step import LossFunction

SCALE, STEP = "guidance_scale", "step_size"  # of `scalar_inputs`


def scale_input_of(module: nn.Module) -> Callable[[Any], Mapping[str, Any]]:
    """Guidance scales [B] -> the arguments of the network that say them."""
    config = cast(Any, module).config
    width = getattr(config, "time_cond_proj_dim", None)
    if width is not None:
        return lambda scale: {"timestep_cond": models.guidance_embedding(scale - 1, width)}
    taken = SCALE in getattr(config, "scalar_inputs", ())
    return lambda scale: {SCALE: scale} if taken else {}


def critic_module(few: FewStepsRecipe, module: nn.Module) -> nn.Module | None:
    """The critic of a student of several steps, which takes the step besides; None: of one step, or none.

    Raises:
        InvalidArgumentError: a network that can take no further number.
    """
    if not METHODS[few.method].critic or few.num_steps == 1:
        return None
    config = cast(Any, module).config
    if hasattr(config, "scalar_inputs"):
        return models.from_config(dataclasses.replace(config, scalar_inputs=(*config.scalar_inputs, STEP)))
    if hasattr(config, "time_cond_proj_dim"):
        width = SCALE_WIDTH + (config.time_cond_proj_dim or 0)
        return models.from_config(dataclasses.replace(config, time_cond_proj_dim=width))
    raise InvalidArgumentError(
        f"the critic of {few.num_steps} steps must know which of them drew an image, and a "
        f"{models.class_name(config)} takes no further number: give --num-steps 1"
    )


def critic_network(critic: nn.Module, noisiest: float) -> Callable[..., Any]:
    """(params, x, t, condition, began) -> output, where a step began at the time `began` [B].

    Args:
        critic: of `critic_module`.
        noisiest: time of the noisy end, in whose units a `timestep_cond` has it.
    """
    network, by_name = models.network(critic), hasattr(cast(Any, critic).config, "scalar_inputs")

    def call(params: Params, x: Any, t: Any, condition: Any, began: Any) -> Any:
        given = named(condition)
        if by_name:
            return network(params, x, t, {**given, STEP: began})
        step = models.guidance_embedding(began / noisiest, SCALE_WIDTH)
        scale = [given["timestep_cond"]] if "timestep_cond" in given else []
        return network(params, x, t, {**given, "timestep_cond": jnp.concatenate([*scale, step], axis=-1)})

    return call


def first_params(
    few: FewStepsRecipe,
    module: nn.Module,
    teacher: Params | None,
    players: Sequence[str] | None,
    key: PRNGKeyArray,
    place: Placement = None,
) -> Params:
    """What is trained, at first: the teacher or a new network, of each player; or an adapter.

    What is read goes where `place` says.
    """
    params = models.init(module, key) if teacher is None else teacher
    if few.lora is not None:
        return models.init_lora(key, params, few.lora.rank, few.lora.targets)
    if players is None:
        return params
    critic = critic_module(few, module)
    others = params if critic is None else begin_as_teacher(few, critic, key, place)
    return {name: params if name == players[0] else others for name in players}


def student_of(few: FewStepsRecipe, teacher: Params | None, params: Params) -> Params:
    """The parameters of the student's network, from what is trained."""
    own = of_student(params)
    return own if few.lora is None else models.apply_lora(cast(Params, teacher), own, few.lora.scale)


def of_adapter(loss: LossFunction, lora: LoraRecipe) -> LossFunction:
    """The loss of a network as one of the adapter that changes it: only the adapter's gradient is taken."""

    def merged(state: Any, params: Params | None) -> Params | None:
        return None if params is None else models.apply_lora(state.frozen[TEACHER], params, lora.scale)

    def loss_fn(params, state, batch, key):
        whole = state.replace(params=None, ema_params=merged(state, state.ema_params))
        return loss(merged(state, params), whole, batch, key)

    return loss_fn


def save_adapter(run: RunFolder, lora: LoraRecipe, module: nn.Module, params: Params) -> None:
    """The adapter as a file of its own, for whoever has the teacher, next to the whole student."""
    name = "unet" if models.class_name(cast(Any, module).config).startswith("UNet") else "transformer"
    checkpoints.save_lora(run.path / LORA_FILE, {name: params}, lora.scale, lora.names)


def student_network(few: FewStepsRecipe | None, params: Params) -> Params:
    """The same from a checkpoint of a run; an adapter needs the folder of its teacher.

    Raises:
        CheckpointError: that is gone.
    """
    if few is None:
        return params
    teacher = None if few.lora is None else checkpoints.load(denoiser_folder(cast(str, few.teacher)))[1]
    return student_of(few, teacher, params)
