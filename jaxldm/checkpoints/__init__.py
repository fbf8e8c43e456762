"""Weights on disk: folders in the layout of diffusers, original single files, LoRA files and tokenizers."""

from jaxldm.checkpoints.embedding_file import WordEmbedding, load_embedding, save_embedding, with_word
from jaxldm.checkpoints.folder import load, module_in, read_config, save
from jaxldm.checkpoints.inception_weights import LoadedNetwork, hash_of_files, load_inception, read_weights
from jaxldm.checkpoints.ip_adapter_file import IPAdapter, load_ip_adapter
from jaxldm.checkpoints.lora import load_lora, merge_lora
from jaxldm.checkpoints.lora_file import save_lora
from jaxldm.checkpoints.lpips_weights import load_lpips
from jaxldm.checkpoints.names import from_state_dict, published, to_state_dict
from jaxldm.checkpoints.original import (
    dit_from_diffusers,
    dit_to_diffusers,
    load_dit_file,
    load_single_file,
    load_taesd_files,
    save_dit_file,
    save_single_file,
    save_taesd_files,
)
from jaxldm.checkpoints.pipeline_folder import load_components, read_model_index, save_components
from jaxldm.checkpoints.tokenizer import Tokenizer, Tokens, load_tokenizer

__all__ = [
    "IPAdapter",
    "LoadedNetwork",
    "Tokenizer",
    "Tokens",
    "WordEmbedding",
    "dit_from_diffusers",
    "dit_to_diffusers",
    "from_state_dict",
    "hash_of_files",
    "load",
    "load_components",
    "load_dit_file",
    "load_embedding",
    "load_inception",
    "load_ip_adapter",
    "load_lora",
    "load_lpips",
    "load_single_file",
    "load_taesd_files",
    "load_tokenizer",
    "merge_lora",
    "module_in",
    "published",
    "read_config",
    "read_model_index",
    "read_weights",
    "save",
    "save_components",
    "save_dit_file",
    "save_embedding",
    "save_lora",
    "save_single_file",
    "save_taesd_files",
    "to_state_dict",
    "with_word",
]
