"""Weights and chunks of prompts: the rules of A1111's web UI as its wiki has them, and a second program.

Here is no code of the web UI: the oracle encodes each chunk with transformers and weighs it in PyTorch.
"""

import itertools
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_checks import KEY, assert_latents_agree
from reference_pipelines import noise, open_reference, theirs, write_sd, write_sdxl

from jaxldm import pipelines
from jaxldm.errors import JaxldmError
from jaxldm.pipelines.weighted_prompts import read_chunks, read_weights

STEPS = {"num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {"sd": write_sd(root / "sd", "sd2"), "sdxl": write_sdxl(root / "sdxl")}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("un)balanced: a", [("un)balanced: a", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("[[snow]] (fox:.5)", [("snow", 1 / 1.21), (" ", 1), ("fox", 0.5)]),
        ("([red] fox:1.5)", [("red", 1.5 / 1.1), (" fox", 1.5)]),
        ("a BREAK b", [("a", 1), (None, 1), ("b", 1)]),
        ("aBREAK", [("aBREAK", 1)]),
        ("a:1.5)", [("a:1.5)", 1)]),
        ("", [("", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *(("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55)),
                *((", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
            ],
        ),
    ],
)
def test_the_weights_of_the_words(prompt, pieces):
    found = read_weights(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    np.testing.assert_allclose([piece.weight for piece in found], [weight for _, weight in pieces])


@given(st.text("ab ()[]:\\.12BREAK", max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_prompt_is_read(prompt):
    """Without brackets, colons and backslashes nothing is weighted, and no letter is lost."""
    pieces = read_weights(prompt)
    assert pieces and all(np.isfinite(piece.weight) for piece in pieces)
    letters = "".join(piece.text or "" for piece in pieces)
    if not set(prompt) & set("()[]:\\") and "BREAK" not in prompt:
        assert letters == prompt


def test_chunks_end_at_a_comma_where_one_is_near(pipes):
    tokenizer = pipes["sd"].tokenizer
    ids = tokenizer.ids_of

    def rows(prompt, syntax="weights"):
        return [
            list(chunk.ids[1 : list(chunk.ids).index(chunk.ids[-1], 1)])
            for chunk in read_chunks(tokenizer, prompt, syntax)
        ]

    words = "cat " * 60 + ", " + "bat " * 5  # "bat" has two tokens; 66 + ... stay below the chunk's end
    long = "cat " * 70 + ", " + "dog " * 10
    first, second = rows(long)
    assert first == ids("cat " * 70 + ",") and second == ids("dog " * 10)
    assert len(rows(words)) == 1
    far = "cat " * 40 + ", " + "cat " * 60  # the comma is 34 tokens before the end
    assert [len(row) for row in rows(far)] == [75, 26]
    assert rows("a BREAK cat") == [ids("a"), ids("cat")]
    assert rows("a BREAK cat", "chunks") == [ids("a BREAK cat")]
    assert rows("") == [[]] and len(rows("cat " * 150)) == 2 and len(rows("cat " * 151)) == 3


def oracle(encoder, tokenizer, chunks, state):
    """The states of chunks of [(text, weight), ...], one behind the other, and the first pooled one."""
    hidden, pooled = [], None
    for chunk in chunks:
        tokens = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in chunk]
        weights = torch.tensor([1.0] + [w for (_, w), ids in zip(chunk, tokens, strict=True) for _ in ids])
        ids = [tokenizer.bos_token_id, *itertools.chain(*tokens), tokenizer.eos_token_id]
        weights = torch.cat([weights, torch.ones(77 - len(weights))])[None, :, None]
        row = torch.tensor([ids + [tokenizer.pad_token_id] * (77 - len(ids))])
        with torch.no_grad():
            output = encoder(row, output_hidden_states=True)
        states = state(output)
        weighted = states * weights
        hidden.append(weighted * (states.mean() / weighted.mean()))
        if pooled is None:
            pooled = getattr(output, "text_embeds", None)
    return torch.cat(hidden, dim=1), pooled


PROMPT = "a (cat:1.4), [[dog]] " + "bat, " * 22 + "zoo at ((zoo)) at"
CHUNKS = [
    [("a ", 1.0), ("cat", 1.4), (", ", 1.0), ("dog", 1 / 1.21), (" " + "bat, " * 22, 1.0)],
    [("zoo at ", 1.0), ("zoo", 1.21), (" at", 1.0)],
]


def test_stable_diffusion_draws_what_the_rules_say(folders, pipes):
    reference = open_reference(StableDiffusionPipeline, folders["sd"])
    parts = reference.text_encoder, reference.tokenizer
    states, _ = oracle(*parts, CHUNKS, lambda output: output.last_hidden_state)
    negative, _ = oracle(*parts, [[("bad", 1.0)], []], lambda output: output.last_hidden_state)
    cond, uncond = pipes["sd"].encode_prompts([PROMPT], ["bad"], prompt_syntax="weights")
    np.testing.assert_allclose(cond["encoder_hidden_states"], states, atol=1e-4)
    np.testing.assert_allclose(uncond["encoder_hidden_states"], negative, atol=1e-4)
    given = dict(prompt_embeds=states, negative_prompt_embeds=negative)
    latents = reference(latents=theirs(noise()), output_type="latent", **given, **STEPS).images
    call = dict(latents=noise(), output="latents", prompt_syntax="weights", **STEPS)
    assert_latents_agree(pipes["sd"](KEY, PROMPT, "bad", **call), latents)


def test_both_encoders_of_sdxl(folders, pipes):
    """Its negative branch is zeros, as long as the prompt is; a second text may have fewer chunks."""
    reference = open_reference(StableDiffusionXLPipeline, folders["sdxl"])
    penultimate = lambda output: output.hidden_states[-2]  # noqa: E731
    first, _ = oracle(reference.text_encoder, reference.tokenizer, CHUNKS, penultimate)
    chunks = [[("a ", 1.0), ("hat", 1.1)], []]
    second, pooled = oracle(reference.text_encoder_2, reference.tokenizer_2, chunks, penultimate)
    states = torch.cat([first, second], dim=-1)
    given = dict(prompt_embeds=states, pooled_prompt_embeds=pooled)
    latents = reference(latents=theirs(noise()), output_type="latent", **given, **STEPS).images
    call = dict(latents=noise(), output="latents", prompt_2="a (hat)", prompt_syntax="weights", **STEPS)
    assert_latents_agree(pipes["sdxl"](KEY, PROMPT, **call), latents)


def test_without_weights_and_in_one_chunk_nothing_changes(pipes):
    for name, pipe in pipes.items():
        plain, chunks, weights = (
            pipe.encode_prompts(["a cat"], ["bad"], prompt_syntax=syntax)
            for syntax in ("plain", "chunks", "weights")
        )
        for argument in plain[0]:
            for other in (chunks, weights):
                for k in range(2):
                    np.testing.assert_array_equal(plain[k][argument], other[k][argument], err_msg=name)


def test_weights_that_are_read_as_text_are_warned_of(pipes):
    with pytest.warns(UserWarning, match=r"has a weight such as \(cat:1\.3\).*prompt_syntax='weights'"):
        pipes["sd"].encode_prompts(["a (cat:1.3)"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipes["sd"].encode_prompts(["a (cat), a: dog"])
        pipes["sd"].encode_prompts(["a (cat:1.3) " * 80], prompt_syntax="weights")
    with pytest.raises(JaxldmError, match=r"prompt_syntax.*plain, chunks, weights"):
        pipes["sd"](KEY, "a cat", prompt_syntax="a1111")
