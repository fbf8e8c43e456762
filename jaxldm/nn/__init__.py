"""Layers that several models share. Channels last, parameters float32, compute dtype a string."""

from jaxldm.arguments import DTYPES
from jaxldm.nn.adaptive_norm import AdaLayerNormContinuous, Modulation, gated
from jaxldm.nn.attention import Attention2D, CrossAttention, SelfAttention, dot_product_attention
from jaxldm.nn.blocks_2d import DownBlock2D, MidBlock2D, UpBlock2D
from jaxldm.nn.convolution import (
    Conv2d,
    ConvTranspose2x2,
    ConvTranspose4x4,
    conv_of_doubled,
    conv_transpose_4x4_stride_2,
)
from jaxldm.nn.embeddings import (
    PatchProjection,
    TextProjection,
    TimestepEmbedding,
    TimestepTextEmbedding,
    guidance_embedding,
    patchify,
    sincos_position_embedding_2d,
    timestep_embedding,
    unpatchify,
)
from jaxldm.nn.joint_attention import JointAttention
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import (
    GlobalResponseNorm,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    group_norm,
    layer_norm,
    modulate,
)
from jaxldm.nn.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from jaxldm.nn.rotary import apply_rotary, rotary_embedding, rotary_embedding_of_axes
from jaxldm.nn.token_merging import match_tokens, merge_tokens, unmerge_tokens
from jaxldm.nn.transformer_2d import FeedForward, Transformer2D, TransformerOptions

__all__ = [
    "DTYPES",
    "AdaLayerNormContinuous",
    "Attention2D",
    "Conv2d",
    "ConvTranspose2x2",
    "ConvTranspose4x4",
    "CrossAttention",
    "DownBlock2D",
    "Downsample2D",
    "Embedding",
    "FeedForward",
    "GlobalResponseNorm",
    "GroupNorm",
    "JointAttention",
    "LayerNorm",
    "Linear",
    "MidBlock2D",
    "Modulation",
    "PatchProjection",
    "RMSNorm",
    "ResnetBlock2D",
    "SelfAttention",
    "TextProjection",
    "TimestepEmbedding",
    "TimestepTextEmbedding",
    "Transformer2D",
    "TransformerOptions",
    "UpBlock2D",
    "Upsample2D",
    "apply_rotary",
    "compute_dtype",
    "conv_of_doubled",
    "conv_transpose_4x4_stride_2",
    "dot_product_attention",
    "gated",
    "group_norm",
    "guidance_embedding",
    "layer_norm",
    "match_tokens",
    "merge_tokens",
    "modulate",
    "patchify",
    "rotary_embedding",
    "rotary_embedding_of_axes",
    "sincos_position_embedding_2d",
    "timestep_embedding",
    "unmerge_tokens",
    "unpatchify",
]
