"""In 16 bits every family is as near to the exact result as its reference, on the same weights and inputs."""

import pytest

from experiments.benchmarks.sixteen_bits_errors import measure

# The errors of two programs that round equally often are two draws of the same size: over the seeds of the
# benchmark their ratio moves by up to a tenth. A rounding too many in each block is a sixth and more.
LUCK = 1.1
# One of each kind: convolutions and group norms, joint attention with adaptive norms, layer norms, RMS norms.
KINDS = {
    "AutoencoderKL, decoding": "bfloat16",
    "FLUX.1-dev": "bfloat16",
    "CLIP's text encoder": "bfloat16",
    "T5": "bfloat16",
}


@pytest.mark.parametrize("name", KINDS)
def test_errors_are_those_of_the_reference(name):
    errors = measure(name, KINDS[name], range(2))
    assert 0 < errors.ours <= LUCK * errors.theirs, errors
