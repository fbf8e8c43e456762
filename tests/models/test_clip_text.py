import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_reference import assert_agrees
from transformers_reference import saved_pair

from jaxldm.models.clip_text import pooled_at_eos


@pytest.mark.parametrize(
    ("eos_token_id", "input_ids", "position"),
    [
        (9, [1, 9, 9, 9], 1),  # padded with the end of text: the first of them
        (9, [1, 12, 9, 0], 2),  # not the largest number: a word added later
        (2, [1, 12, 9, 0], 1),  # 2 stands for the largest number
        (9, [1, 5, 6, 7], 0),  # none at all
    ],
)
def test_the_pooled_state_is_that_of_the_end_of_text(eos_token_id, input_ids, position):
    states = jnp.arange(4.0)[None, :, None]
    assert pooled_at_eos(states, jnp.asarray([input_ids]), eos_token_id).tolist() == [[position]]


def test_skipped_layers_can_be_normalised(tmp_path):
    """As Stable Diffusion 1 is used with clip_skip."""
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    theirs, module, params = saved_pair(transformers.CLIPTextModel, config, tmp_path)
    input_ids = np.arange(2, 7, dtype=np.int32)[None]
    states = module.apply({"params": params}, input_ids).hidden_states
    ours = module.apply({"params": params}, states[-2], method="final_layer_norm")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(input_ids).long(), output_hidden_states=True).hidden_states[-2]
        assert_agrees(ours, theirs.final_layer_norm(expected))
