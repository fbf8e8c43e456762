"""Who is trained when an autoencoder is: itself, a codebook's moving averages, a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm import models
from jaxldm.exact import round_product
from jaxldm.training.adversarial import (
    LARGEST_WEIGHT,
    Adversary,
    Perceptual,
    discriminator_loss,
    image_distance,
)
from jaxldm.training.autoencoder_losses import annealed_beta, autoencoder_loss, vq_autoencoder_loss
from jaxldm.training.codebook import Codebook, codebook_entries, new_codebook, update_codebook
from jaxldm.training.equivariance import equivariance_loss
from jaxldm.training.optimizer import Optimizer, optimizer
from jaxldm.training.perceptual import PerceptualDistance, load_perceptual
from jaxldm.training.recipes import AutoencoderRecipe, DiscriminatorRecipe
from jaxldm.training.stages import Context, make_optimizer, sample_size
from jaxldm.training.state import Params
from jaxldm.training.step import LossFunction, Player

AUTOENCODER, CODEBOOK, DISCRIMINATOR = "autoencoder", "codebook", "discriminator"
LOG_VARIANCE = "log_variance"  # a trained one, next to the network's parameters
PERCEPTUAL = "perceptual"  # the frozen parameters of a perceptual distance
LEAST_LOG_VARIANCE = -30.0  # that posteriors can have
_EQUIVARIANCE_KEY = 1  # folded into the key of a loss


class Game(NamedTuple):
    """All that is trained with an autoencoder.

    Attributes:
        init: key -> parameters, of several players by their names.
        loss: the autoencoder's, or the players.
        network: the parameters of a state -> those of the autoencoder's module.
        frozen: for the state.
    """

    init: Callable[[PRNGKeyArray], Params]
    loss: LossFunction | Sequence[Player]
    network: Callable[[Params], Params]
    frozen: Any = None


class Rules(NamedTuple):
    """What the losses look at besides parameters: see `AutoencoderRecipe`.

    Attributes:
        warmup_steps: of the KL term's weight.
        start: of the discriminator, in updates.
        perceptual: (frozen parameters, images, images) -> distances; None: none.
        discriminator: its module; None: none.
    """

    warmup_steps: int = 0
    start: int = 0
    perceptual: Callable[[Any, Any, Any], Float[Array, " B"]] | None = None
    discriminator: nn.Module | None = None


def build_discriminator(recipe: AutoencoderRecipe, image_shape: tuple[int, int, int]) -> nn.Module:
    """The discriminator of a recipe. Raises `UnknownNameError`, `InvalidArgumentError`."""
    own = cast(DiscriminatorRecipe, recipe.discriminator)
    given: dict[str, Any] = {"sample_size": sample_size(image_shape), "in_channels": image_shape[-1]}
    return models.build(own.preset, **{"dtype": recipe.dtype, **given, **own.overrides})


def has_codebook(module: nn.Module) -> bool:
    """Whether the autoencoder has a codebook that is trained as moving averages."""
    return isinstance(module, models.VQModel)


def network_params(params: Params, codebook: Params | None = None) -> Params:
    """The parameters of the module, from those of the players."""
    own = {name: value for name, value in params.items() if name != LOG_VARIANCE}
    if codebook is None:
        return own
    return {**own, "quantize": {"embedding": {"embedding": codebook_entries(Codebook(**codebook))}}}


def make_loss(
    recipe: AutoencoderRecipe, module: nn.Module, warmup_steps: int = 0, rules: Rules | None = None
) -> LossFunction:
    """`loss_fn(params, state, batch, key)` of the autoencoder; `batch["image"]` is `[B, H, W, C]`.

    `params` are its own, without a codebook, which is in `state.params`, as is the discriminator.
    """
    rules = Rules(warmup_steps) if rules is None else rules

    def loss_fn(params: Params, state: Any, batch: Any, key: PRNGKeyArray) -> tuple[Any, dict[str, Any]]:
        images = batch["image"]
        codebook = state.params[CODEBOOK] if has_codebook(module) else None
        whole = codebook is None and not recipe.learn_log_variance
        network = params if whole else network_params(params, codebook)

        def apply(method: str) -> Callable[[Any], Any]:
            return lambda x: module.apply({"params": network}, x, method=method)

        encode, decode = apply("encode"), apply("decode")
        log_variance = params.get(LOG_VARIANCE, recipe.log_variance) if recipe.learn_log_variance else None
        options: dict[str, Any] = {
            "reconstruction": recipe.reconstruction,
            "perceptual": _perceptual(recipe, rules, state),
            "log_variance": recipe.log_variance if log_variance is None else log_variance,
            "adversary": _adversary(recipe, rules, module, network, state, images),
        }
        if codebook is None:
            beta = annealed_beta(recipe.beta, rules.warmup_steps, state.step)
            options |= {"beta": beta, "free_bits": recipe.free_bits}
            loss, metrics = autoencoder_loss(key, encode, decode, images, **options)
        else:
            table = network["quantize"]["embedding"]["embedding"]
            loss, metrics = vq_autoencoder_loss(
                encode, decode, table, images, commitment=recipe.commitment, **options
            )
        if log_variance is not None:
            metrics |= {"log_variance": log_variance}
        if recipe.equivariance_weight:
            encoded = encode(images)
            z = encoded.sample(key) if isinstance(encoded, models.DiagonalGaussian) else encoded
            tau_key = jax.random.fold_in(key, _EQUIVARIANCE_KEY)
            distance = _pixel_distance(recipe.reconstruction)
            of_tau = equivariance_loss(tau_key, decode, z, images, distance, recipe.equivariance_scales)
            loss, metrics = loss + recipe.equivariance_weight * of_tau, {**metrics, "equivariance": of_tau}
        return loss, metrics

    return loss_fn


def _pixel_distance(reconstruction: str) -> Callable[[Any, Any], Any]:
    return lambda decoded, images: image_distance(images, reconstruction)(decoded)[0]


def _perceptual(recipe: AutoencoderRecipe, rules: Rules, state: Any) -> Perceptual | None:
    """The weighted perceptual distance with its frozen parameters."""
    between = rules.perceptual
    if between is None:
        return None
    return lambda x, y: recipe.perceptual_weight * between(state.frozen[PERCEPTUAL], x, y)


def _adversary(
    recipe: AutoencoderRecipe, rules: Rules, module: nn.Module, network: Params, state: Any, images: Any
) -> Adversary | None:
    """The discriminator as it is now, and the kernel of the decoder's last layer, always `conv_out`."""
    critic = rules.discriminator
    if critic is None:
        return None
    decoder = network["decoder"]

    def decode(kernel: Any, z: Any) -> Any:
        changed = {**decoder, "conv_out": {**decoder["conv_out"], "kernel": kernel}}
        return module.apply({"params": {**network, "decoder": changed}}, z, method="decode")

    def logits(images: Any) -> Any:
        return critic.apply({"params": state.params[DISCRIMINATOR]}, images)

    # The bound is one of sums over the pixels of an image, but with a codebook, where theirs are means, too.
    pixels = 1 if has_codebook(module) else images.size // images.shape[0]
    weight = cast(DiscriminatorRecipe, recipe.discriminator).weight
    kernel = decoder["conv_out"]["kernel"]
    return Adversary(logits, kernel, decode, weight, state.step >= rules.start, LARGEST_WEIGHT / pixels)


def make_discriminator_loss(recipe: AutoencoderRecipe, module: nn.Module, critic: nn.Module) -> LossFunction:
    """`loss_fn(params, state, batch, key)` of the discriminator: images against newly decoded ones.

    Its own batch statistics for each, as published.
    """

    def loss_fn(params: Params, state: Any, batch: Any, key: PRNGKeyArray) -> tuple[Any, dict[str, Any]]:
        images = batch["image"]
        network = network_params(state.params[AUTOENCODER], state.params.get(CODEBOOK))
        encoded = cast(Any, module.apply({"params": network}, images, method="encode"))
        z = encoded.sample(key) if isinstance(encoded, models.DiagonalGaussian) else encoded
        decoded = jax.lax.stop_gradient(module.apply({"params": network}, z, method="decode"))
        real, fake = (cast(Any, critic.apply({"params": params}, x)) for x in (images, decoded))
        return discriminator_loss(real, fake, cast(DiscriminatorRecipe, recipe.discriminator).loss)

    return loss_fn


def make_codebook_loss(recipe: AutoencoderRecipe, module: nn.Module) -> LossFunction:
    """`loss_fn(params, state, batch, key)` of the codebook: a step along its gradient is the moving average.

    It is half the squared distance from where `update_codebook` puts the averages, so that one step of
    `jump` lands there, and the codebook is a player like any other.
    """

    def loss_fn(params: Params, state: Any, batch: Any, key: PRNGKeyArray) -> tuple[Any, dict[str, Any]]:
        network = network_params(state.params[AUTOENCODER], params)
        z = cast(Any, module.apply({"params": network}, batch["image"], method="encode"))
        now, held = Codebook(**params), jax.lax.stop_gradient
        new = held(update_codebook(key, held(now), held(z), recipe.codebook_decay, recipe.restart_below))
        squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), now, new)
        entries = len(now.counts)
        return 0.5 * sum(squares), {
            "used": jnp.mean(jnp.float32(new.counts * entries > new.counts.sum() / 10))
        }

    return loss_fn


def jump() -> Optimizer:
    """Gradient descent with a step of 1."""

    def init(params: Params) -> Any:
        return {"count": jnp.zeros((), jnp.int32)}

    def update(gradients: Params, state: Any, params: Params) -> tuple[Params, Any]:
        return jax.tree.map(jnp.negative, gradients), {"count": state["count"] + 1}

    return Optimizer(init, update, lambda step: jnp.float32(1.0))


def make_game(context: Context, recipe: AutoencoderRecipe, module: nn.Module, num_examples: int) -> Game:
    """All that is trained with the autoencoder of a recipe, and how its parameters begin."""
    steps_per_epoch = num_examples // recipe.batch_size
    adam, plan = make_optimizer(recipe, num_examples, context.mesh)
    perceptual: PerceptualDistance | None = None
    if recipe.perceptual_weight:
        perceptual = load_perceptual(context, recipe)
    own, critic, start = recipe.discriminator, None, 0
    if own is not None:
        critic = build_discriminator(recipe, context.dataset.image_shape)
        start = min(round_product(own.start_epochs, steps_per_epoch), plan.num_steps)
    warmup_steps = round_product(recipe.beta_warmup_epochs, steps_per_epoch)
    between = None if perceptual is None else perceptual.between
    loss = make_loss(recipe, module, rules=Rules(warmup_steps, start, between, critic))
    frozen = None if perceptual is None else {PERCEPTUAL: perceptual.params}
    if critic is None and not has_codebook(module):
        return Game(lambda key: _new_network(recipe, module, key), loss, network_params, frozen)
    players = [Player(AUTOENCODER, loss, adam, recipe.ema_decay)]
    if has_codebook(module):
        players.append(Player(CODEBOOK, make_codebook_loss(recipe, module), jump(), recipe.ema_decay))
    if critic is not None:
        moves = _discriminator_optimizer(recipe, steps_per_epoch, plan.num_steps - start)
        players.append(
            Player(DISCRIMINATOR, make_discriminator_loss(recipe, module, critic), moves, start=start)
        )

    def init(key: PRNGKeyArray) -> Params:
        params = _new_network(recipe, module, key)
        split = {AUTOENCODER: {name: value for name, value in params.items() if name != "quantize"}}
        if has_codebook(module):
            split[CODEBOOK] = new_codebook(params["quantize"]["embedding"]["embedding"])._asdict()
        if critic is not None:
            split[DISCRIMINATOR] = models.init(critic, jax.random.fold_in(key, 1))
        return split

    return Game(
        init, tuple(players), lambda params: network_params(params[AUTOENCODER], params.get(CODEBOOK)), frozen
    )


def _new_network(recipe: AutoencoderRecipe, module: nn.Module, key: PRNGKeyArray) -> Params:
    extra = {LOG_VARIANCE: jnp.float32(recipe.log_variance)} if recipe.learn_log_variance else {}
    return {**models.init(module, key), **extra}


def _discriminator_optimizer(recipe: AutoencoderRecipe, steps_per_epoch: int, num_steps: int) -> Optimizer:
    own, total = cast(DiscriminatorRecipe, recipe.discriminator), max(1, num_steps)
    return optimizer(
        recipe.learning_rate if own.learning_rate is None else own.learning_rate,
        min(round_product(recipe.warmup_epochs, steps_per_epoch), total),
        total,
        max_grad_norm=recipe.max_grad_norm,
        b1=own.b1,
        b2=own.b2,
        final_scale=recipe.final_scale,
    )
