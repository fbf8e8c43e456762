"""Networks by their published architecture, one file each, with presets by name.

>>> from jaxldm import models
>>> module = models.build("mini-unet")
>>> models.count_params(module) == models.count_params("mini-unet")
True
"""

from jaxldm.models import pruning
from jaxldm.models.adapters import apply_lora, init_lora
from jaxldm.models.adaptive_depth_dit import AdaptiveDepthDiT, AdaptiveDepthDiTConfig
from jaxldm.models.autoencoder import DiagonalGaussian, decode_latents, encode_latents
from jaxldm.models.autoencoder_asym_kl import AsymmetricAutoencoderKL, AsymmetricAutoencoderKLConfig
from jaxldm.models.autoencoder_conv import ConvAutoencoder, ConvAutoencoderConfig
from jaxldm.models.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from jaxldm.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxldm.models.autoencoder_kl_flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from jaxldm.models.autoencoder_kl_qwen_image import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from jaxldm.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from jaxldm.models.bert import BertConfig, BertModel, sentence_embedding
from jaxldm.models.clip import CLIPConfig, CLIPModel
from jaxldm.models.clip_text import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextWithProjectionConfig,
)
from jaxldm.models.clip_vision import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ImageEncoding,
    clip_inputs,
    clip_pixel_values,
)
from jaxldm.models.consistency_decoder_vae import ConsistencyDecoderVAE, ConsistencyDecoderVAEConfig
from jaxldm.models.control_networks import controlled_network, controlnet_from_unet
from jaxldm.models.controlnet import ControlNetConfig, ControlNetModel
from jaxldm.models.cost import (
    compile_forward,
    count_macs,
    forward_memory,
    largest_product,
    macs_of,
    memory_of,
)
from jaxldm.models.d2it import D2iT, D2iTConfig
from jaxldm.models.denoising_network import Convention, caching_network, convention, network
from jaxldm.models.digit_classifier import DigitClassifier, DigitClassifierConfig
from jaxldm.models.dinov2 import Dinov2Config, Dinov2Model, dinov2_pixel_values
from jaxldm.models.dit import DiT, DiTConfig
from jaxldm.models.dit_transformer_2d import DiTTransformer2DConfig, DiTTransformer2DModel
from jaxldm.models.dydit import DyDiT, DyDiTConfig
from jaxldm.models.flux2_transformer_2d import Flux2Transformer2DConfig, Flux2Transformer2DModel
from jaxldm.models.flux_controlnet import FluxControlNetConfig, FluxControlNetModel
from jaxldm.models.flux_transformer_2d import FluxTransformer2DConfig, FluxTransformer2DModel
from jaxldm.models.inception_v3 import InceptionFeatures, InceptionV3
from jaxldm.models.k_unet_2d_condition import KUNet2DConditionConfig, KUNet2DConditionModel
from jaxldm.models.ldm_bert import LDMBertConfig, LDMBertModel
from jaxldm.models.look_inside import Inside, look_inside
from jaxldm.models.lpips import LPIPS, lpips_heads
from jaxldm.models.maskgit_transformer import MaskGITTransformer, MaskGITTransformerConfig
from jaxldm.models.mistral import MistralConfig, MistralModel
from jaxldm.models.ncsnpp import NCSNppConfig, NCSNppModel
from jaxldm.models.paella_vq_model import PaellaVQModel, PaellaVQModelConfig
from jaxldm.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from jaxldm.models.pixart_transformer_2d import PixArtTransformer2DConfig, PixArtTransformer2DModel
from jaxldm.models.quantization import (
    dequantize,
    how_quantized,
    param_bytes,
    param_count,
    quantization,
    quantize,
    quantized_shapes,
)
from jaxldm.models.qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
from jaxldm.models.qwen3 import Qwen3Config, Qwen3Model
from jaxldm.models.qwen_image_transformer_2d import (
    QwenImageTransformer2DConfig,
    QwenImageTransformer2DModel,
)
from jaxldm.models.registry import (
    PRESETS,
    build,
    class_name,
    config_from_dict,
    config_to_dict,
    count_params,
    from_config,
    init,
    init_from,
    shapes,
)
from jaxldm.models.sd3_controlnet import SD3ControlNetConfig, SD3ControlNetModel
from jaxldm.models.sd3_transformer_2d import SD3Transformer2DConfig, SD3Transformer2DModel
from jaxldm.models.sharding import make_mesh, sharding_of, shardings
from jaxldm.models.siglip_vision import (
    ReduxImageEncoder,
    ReduxImageEncoderConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from jaxldm.models.sit import SiT, SiTConfig
from jaxldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from jaxldm.models.t5_encoder import T5EncoderConfig, T5EncoderModel
from jaxldm.models.text_encoder import TextEncoding
from jaxldm.models.tiling import Tiling
from jaxldm.models.time_routed_dit import fix_routers, planned_groups
from jaxldm.models.token_pruning_dit import TokenPruningDiT, TokenPruningDiTConfig
from jaxldm.models.unet_2d import UNet2DConfig, UNet2DModel
from jaxldm.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from jaxldm.models.uvit_2d import UVit2DConfig, UVit2DModel
from jaxldm.models.vq_model import VQModel, VQModelConfig, decode_indices, encode_indices
from jaxldm.models.wuerstchen_diffnext import WuerstchenDiffNeXt, WuerstchenDiffNeXtConfig
from jaxldm.models.wuerstchen_prior import WuerstchenPrior, WuerstchenPriorConfig
from jaxldm.models.z_image_transformer_2d import ZImageTransformer2DConfig, ZImageTransformer2DModel
from jaxldm.nn.attention import ImagePrompts
from jaxldm.nn.embeddings import guidance_embedding, patchify, unpatchify
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.quantized import Quantization, Quantized
from jaxldm.nn.resizing import resize_linear
from jaxldm.nn.token_merging import TokenMerging

__all__ = [
    "LPIPS",
    "PRESETS",
    "AdaptiveDepthDiT",
    "AdaptiveDepthDiTConfig",
    "AsymmetricAutoencoderKL",
    "AsymmetricAutoencoderKLConfig",
    "AutoencoderDC",
    "AutoencoderDCConfig",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2",
    "AutoencoderKLFlux2Config",
    "AutoencoderKLQwenImage",
    "AutoencoderKLQwenImageConfig",
    "AutoencoderTiny",
    "AutoencoderTinyConfig",
    "BertConfig",
    "BertModel",
    "CLIPConfig",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTextWithProjectionConfig",
    "CLIPVisionConfig",
    "CLIPVisionModelWithProjection",
    "ConsistencyDecoderVAE",
    "ConsistencyDecoderVAEConfig",
    "ControlNetConfig",
    "ControlNetModel",
    "ConvAutoencoder",
    "ConvAutoencoderConfig",
    "Convention",
    "D2iT",
    "D2iTConfig",
    "DiT",
    "DiTConfig",
    "DiTTransformer2DConfig",
    "DiTTransformer2DModel",
    "DiagonalGaussian",
    "DigitClassifier",
    "DigitClassifierConfig",
    "Dinov2Config",
    "Dinov2Model",
    "DyDiT",
    "DyDiTConfig",
    "Flux2Transformer2DConfig",
    "Flux2Transformer2DModel",
    "FluxControlNetConfig",
    "FluxControlNetModel",
    "FluxTransformer2DConfig",
    "FluxTransformer2DModel",
    "ImageEncoding",
    "ImagePrompts",
    "InceptionFeatures",
    "InceptionV3",
    "Inside",
    "KUNet2DConditionConfig",
    "KUNet2DConditionModel",
    "LDMBertConfig",
    "LDMBertModel",
    "MaskGITTransformer",
    "MaskGITTransformerConfig",
    "MistralConfig",
    "MistralModel",
    "NCSNppConfig",
    "NCSNppModel",
    "PaellaVQModel",
    "PaellaVQModelConfig",
    "PatchDiscriminator",
    "PatchDiscriminatorConfig",
    "PixArtTransformer2DConfig",
    "PixArtTransformer2DModel",
    "Quantization",
    "Quantized",
    "Qwen2_5_VLTextConfig",
    "Qwen2_5_VLTextModel",
    "Qwen3Config",
    "Qwen3Model",
    "QwenImageTransformer2DConfig",
    "QwenImageTransformer2DModel",
    "ReduxImageEncoder",
    "ReduxImageEncoderConfig",
    "SD3ControlNetConfig",
    "SD3ControlNetModel",
    "SD3Transformer2DConfig",
    "SD3Transformer2DModel",
    "SiT",
    "SiTConfig",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "T2IAdapter",
    "T2IAdapterConfig",
    "T5EncoderConfig",
    "T5EncoderModel",
    "TextEncoding",
    "Tiling",
    "TokenMerging",
    "TokenPruningDiT",
    "TokenPruningDiTConfig",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
    "UNet2DConfig",
    "UNet2DModel",
    "UVit2DConfig",
    "UVit2DModel",
    "VQModel",
    "VQModelConfig",
    "WuerstchenDiffNeXt",
    "WuerstchenDiffNeXtConfig",
    "WuerstchenPrior",
    "WuerstchenPriorConfig",
    "ZImageTransformer2DConfig",
    "ZImageTransformer2DModel",
    "apply_lora",
    "build",
    "caching_network",
    "class_name",
    "clip_inputs",
    "clip_pixel_values",
    "compile_forward",
    "compute_dtype",
    "config_from_dict",
    "config_to_dict",
    "controlled_network",
    "controlnet_from_unet",
    "convention",
    "count_macs",
    "count_params",
    "decode_indices",
    "decode_latents",
    "dequantize",
    "dinov2_pixel_values",
    "encode_indices",
    "encode_latents",
    "fix_routers",
    "forward_memory",
    "from_config",
    "guidance_embedding",
    "how_quantized",
    "init",
    "init_from",
    "init_lora",
    "largest_product",
    "look_inside",
    "lpips_heads",
    "macs_of",
    "make_mesh",
    "memory_of",
    "network",
    "param_bytes",
    "param_count",
    "patchify",
    "planned_groups",
    "pruning",
    "quantization",
    "quantize",
    "quantized_shapes",
    "resize_linear",
    "sentence_embedding",
    "shapes",
    "sharding_of",
    "shardings",
    "unpatchify",
]
