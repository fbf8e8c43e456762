"""A denoising step on an accelerator: never all logits of its attention, never a copy of the weights.

The networks' programs are traced with abstract weights at their published sizes, as on an NVIDIA device.
"""

import jax
import jax.numpy as jnp
import pytest

from jaxldm import models
from jaxldm.models.cost import _jaxprs_in
from jaxldm.nn import attention_kernels


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """Traces as on an NVIDIA device, with cuDNN at hand."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_kernels, "on_cuda", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def traced(name, dtype, inputs=None, **options):
    """(module, its program: weights, then inputs) of a preset."""
    module = models.build(name, dtype=dtype, **options)
    shapes = models.shapes(module)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    method = "decode" if inputs else None
    inputs = inputs or module.example_inputs()
    forward = lambda params, *inputs: module.apply({"params": params}, *inputs, method=method)  # noqa: E731
    return module, jax.make_jaxpr(forward)(params, *inputs).jaxpr


def equations(jaxpr):
    """All equations of a program, those of the functions that it calls among them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _jaxprs_in(equation.params.values()):
            yield from equations(inner)


def attention_of(jaxpr):
    """(calls of the flash kernel, numbers in the largest softmax)."""
    found = list(equations(jaxpr))
    flash = sum(equation.primitive.name.startswith("dot_product_attention_fwd") for equation in found)
    exponents = (equation.outvars[0].aval for equation in found if equation.primitive.name == "exp")
    return flash, max((x.size for x in exponents if len(x.shape) >= 3), default=0)


VIEWS = ("reshape", "squeeze", "broadcast_in_dim", "slice", "stop_gradient")  # read where they are used


def carried_by(scan, body):
    """The positions of the carry among a scan's arguments: constants, carry, what it goes through."""
    carry = sum(own.aval == outer.aval for own, outer in zip(body.outvars, scan.outvars, strict=True))
    whole = sum(own.aval == outer.aval for own, outer in zip(body.invars, scan.invars, strict=True))
    return range(whole - carry, whole)


def prepared_from_weights(jaxpr, weights):
    """(operation, numbers) of all that is computed from weights alone: the same again in every step."""
    known = set(weights)
    for equation in jaxpr.eqns:
        arrays = [variable for variable in equation.invars if not hasattr(variable, "val")]
        alone = bool(arrays) and known.issuperset(arrays)
        inner = list(_jaxprs_in(equation.params.values()))
        for function in inner:
            given = equation.invars[len(equation.invars) - len(function.invars) :]  # a condition has one more
            carried = range(0)
            if equation.primitive.name == "scan":
                carried = carried_by(equation, function)
            passed = [
                own
                for number, (own, outer) in enumerate(zip(function.invars, given, strict=True))
                if number not in carried and not hasattr(outer, "val") and outer in known
            ]
            yield from prepared_from_weights(function, passed)
        if alone:
            known.update(equation.outvars)
            if not inner and equation.primitive.name not in VIEWS:
                yield equation.primitive.name, max(variable.aval.size for variable in equation.outvars)


# Preset -> (blocks whose attention is the flash kernel's, one in each scan; other options).
NETWORKS = {
    "flux-dev": (2, {"scan": True}),
    "sd3-medium": (2, {"scan": True}),  # the last block is of another kind
    "dit-xl-2": (1, {"scan": True}),
    "pixart-sigma": (2, {"scan": True}),  # of the image, and to the text
    "z-image": (3, {"scan": True}),  # the refiners of text and image, then all tokens
    "amused-512": (None, {"scan": True}),
    "sd15-unet": (None, {"layers_per_block": 1}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_16_bits_use_the_flash_kernel_and_weights_as_they_are(name):
    expected, options = NETWORKS[name]
    module, jaxpr = traced(name, "bfloat16", **options)
    flash, largest = attention_of(jaxpr)
    assert flash > 0 and largest <= attention_kernels.MOST_LOGITS
    assert expected is None or flash == expected
    count = len(jax.tree.leaves(models.shapes(module)))
    prepared = sum(size for _, size in prepared_from_weights(jaxpr, jaxpr.invars[:count]))
    assert prepared < 0.005 * models.count_params(module)  # norms are float32; aMUSEd's upsampling transposes


def test_float32_is_attended_in_chunks():
    flash, largest = attention_of(traced("flux-dev", "float32", scan=True)[1])
    assert flash == 0 and 0 < largest <= attention_kernels.MOST_LOGITS


def test_one_head_of_all_channels_of_an_autoencoder_is_attended_in_chunks():
    z = jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)
    flash, largest = attention_of(traced("sdxl-vae", "bfloat16", (z,))[1])
    assert flash == 0
    assert 0 < largest <= attention_kernels.MOST_LOGITS < 128**4


def test_what_is_computed_from_weights_alone_is_found():
    """In scans, in functions that are called, and after views; what depends on x is not."""

    params = {"a": jnp.ones((2, 4)), "b": jnp.ones((6, 4)), "c": jnp.ones((3, 8, 8))}
    forward = lambda params, x: (  # noqa: E731
        x @ jnp.concatenate([params["a"], params["b"]]).reshape(8, 4),
        jax.lax.scan(lambda c, w: (c @ (w * 2), None), x, params["c"])[0],
        jax.jit(jnp.negative)(params["a"]),
        jnp.exp(x),
    )
    jaxpr = jax.make_jaxpr(forward)(params, jnp.ones((1, 8))).jaxpr
    found = dict(prepared_from_weights(jaxpr, jaxpr.invars[:3]))
    assert found == {"concatenate": 32, "mul": 64, "neg": 8}
