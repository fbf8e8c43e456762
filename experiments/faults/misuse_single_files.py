"""The valid calls that `misuse` starts from, of what reads and writes original files."""

from __future__ import annotations

from experiments.faults.misuse_cases import Case
from experiments.faults.misuse_files import THERE, case, of, place
from experiments.faults.readers import DIT, VAE
from jaxldm import checkpoints, models

TINY = models.AutoencoderTinyConfig(
    encoder_block_out_channels=(2,),
    decoder_block_out_channels=(2,),
    num_encoder_blocks=(1,),
    num_decoder_blocks=(1,),
)


def single_files() -> list[Case]:
    """Original files of one network or of all."""
    c, here = checkpoints, place()
    module, params = of(DIT)
    theirs = c.dit_to_diffusers(module, params)
    return [
        *taesd_files(),
        case("checkpoints.load_single_file", c.load_single_file, path=here / "vae.safetensors", dtype=None),
        case(
            "checkpoints.save_single_file",
            c.save_single_file,
            path=here / "saved.safetensors",
            components={"vae": of(VAE)},
            words={"components": "component"},
        ),
        case(
            "checkpoints.load_dit_file",
            c.load_dit_file,
            path=here / "dit.safetensors",
            architecture="DiT",
            num_heads=2,
            dtype=None,
            sharding=None,
            words={"num_heads": "heads"},
        ),
        case(
            "checkpoints.save_dit_file",
            c.save_dit_file,
            path=here / "saved-dit.safetensors",
            module=module,
            params=params,
        ),
        case(
            "checkpoints.dit_to_diffusers",
            c.dit_to_diffusers,
            module=module,
            params=params,
            words={"params": "params|weights|tensor"},
        ),
        case(
            "checkpoints.dit_from_diffusers",
            c.dit_from_diffusers,
            module=theirs[0],
            params=theirs[1],
            freq_shift=0,
            words={"params": "params|weights|tensor"},
        ),
    ]


def taesd_files() -> list[Case]:
    """The encoder and the decoder apart."""
    c, here = checkpoints, place()
    halves = {side: here / f"taesd_{side}.safetensors" for side in ("encoder", "decoder")}
    tiny, weights = of(TINY)
    c.save_taesd_files(*halves.values(), tiny, weights)
    return [
        case(
            "checkpoints.load_taesd_files",
            c.load_taesd_files,
            **halves,
            dtype=None,
            words={"encoder": THERE, "decoder": THERE},
        ),
        case(
            "checkpoints.save_taesd_files",
            c.save_taesd_files,
            encoder=here / "saved_encoder.safetensors",
            decoder=here / "saved_decoder.safetensors",
            module=tiny,
            params=weights,
            words={"encoder": THERE, "decoder": THERE, "params": "params|weights|tensor"},
        ),
    ]
