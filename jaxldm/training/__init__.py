"""Training: state, step, loop, and the stages built from them.

    from jaxldm import training

    run = training.train(training.RECIPES["mini-ldm"], "runs/mini-ldm")

`make_train_step` and `fit` train any network on any loss; see their docstrings.
"""

from jaxldm.training.adversarial import Adversary, adaptive_weight, discriminator_loss
from jaxldm.training.autoencoder import latent_scale
from jaxldm.training.autoencoder_losses import (
    annealed_beta,
    autoencoder_loss,
    kl_per_channel,
    vq_autoencoder_loss,
)
from jaxldm.training.codebook import (
    Codebook,
    Quantized,
    codebook_entries,
    new_codebook,
    quantization_losses,
    update_codebook,
)
from jaxldm.training.denoiser_terms import alignment_loss, kept_tokens
from jaxldm.training.dynamic_recipe import DynamicRecipe
from jaxldm.training.equivariance import equivariance_loss
from jaxldm.training.few_steps.recipe import FewStepsRecipe
from jaxldm.training.few_steps.teachers import distill_recipe
from jaxldm.training.finetune_recipe import (
    ControlRecipe,
    FinetuneRecipe,
    LoraRecipe,
    PriorRecipe,
    WordRecipe,
)
from jaxldm.training.finetune_source import finetune_recipe
from jaxldm.training.freezing import freeze, merge
from jaxldm.training.kept import KeptParams, kept_steps, post_hoc_ema, read_kept
from jaxldm.training.known_recipes import RECIPES
from jaxldm.training.log import read_log
from jaxldm.training.loop import Plan, fit
from jaxldm.training.mesh import local_examples, make_mesh
from jaxldm.training.optimizer import Optimizer, optimizer, warmup_cosine
from jaxldm.training.recipes import (
    AlignmentRecipe,
    AutoencoderRecipe,
    ClassifierRecipe,
    DiffusionRecipe,
    DiscriminatorRecipe,
    MaskedTokensRecipe,
    Recipe,
    TextRecipe,
)
from jaxldm.training.report import write_report
from jaxldm.training.runs import (
    STAGES,
    RunFolder,
    StageFolder,
    read_config,
    read_data,
    read_recipe,
    recipe_to_resume,
)
from jaxldm.training.state import TrainState, create_train_state
from jaxldm.training.step import Player, compile_train_step, make_train_step
from jaxldm.training.train import check_recipe, stages_of, train

__all__ = [
    "RECIPES",
    "STAGES",
    "Adversary",
    "AlignmentRecipe",
    "AutoencoderRecipe",
    "ClassifierRecipe",
    "Codebook",
    "ControlRecipe",
    "DiffusionRecipe",
    "DiscriminatorRecipe",
    "DynamicRecipe",
    "FewStepsRecipe",
    "FinetuneRecipe",
    "KeptParams",
    "LoraRecipe",
    "MaskedTokensRecipe",
    "Optimizer",
    "Plan",
    "Player",
    "PriorRecipe",
    "Quantized",
    "Recipe",
    "RunFolder",
    "StageFolder",
    "TextRecipe",
    "TrainState",
    "WordRecipe",
    "adaptive_weight",
    "alignment_loss",
    "annealed_beta",
    "autoencoder_loss",
    "check_recipe",
    "codebook_entries",
    "compile_train_step",
    "create_train_state",
    "discriminator_loss",
    "distill_recipe",
    "equivariance_loss",
    "finetune_recipe",
    "fit",
    "freeze",
    "kept_steps",
    "kept_tokens",
    "kl_per_channel",
    "latent_scale",
    "local_examples",
    "make_mesh",
    "make_train_step",
    "merge",
    "new_codebook",
    "optimizer",
    "post_hoc_ema",
    "quantization_losses",
    "read_config",
    "read_data",
    "read_kept",
    "read_log",
    "read_recipe",
    "recipe_to_resume",
    "stages_of",
    "train",
    "update_codebook",
    "vq_autoencoder_loss",
    "warmup_cosine",
    "write_report",
]
