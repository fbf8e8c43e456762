"""The matrix products of a step, counted, and the peak of the devices, measured."""

import jax
import jax.numpy as jnp
import pytest

from jaxldm.training.mesh import make_mesh
from jaxldm.training.peak import matrix_peak, seconds_at_peak


def test_the_products_of_a_step_are_counted_and_it_is_traced_once():
    traced = []

    def step(state, batch):
        traced.append(1)
        return state + jnp.mean(batch @ state), {}

    state, batch, mesh = jnp.ones((30, 30)), jnp.ones((20, 30)), make_mesh(1)
    compiled = jax.jit(step)
    seconds = seconds_at_peak(compiled, state, batch, mesh)
    compiled(state, batch)
    assert len(traced) == 1
    assert seconds * matrix_peak(tuple(mesh.devices.flat)) == pytest.approx(2 * 20 * 30 * 30)


def test_a_step_with_a_loop_of_unknown_length_has_no_share_of_the_peak():
    def step(state, batch):
        return jax.lax.while_loop(lambda x: x.sum() < 10, lambda x: x + x @ batch, state), {}

    assert seconds_at_peak(jax.jit(step), jnp.ones((3, 3)), jnp.ones((3, 3)), make_mesh(1)) is None


def test_the_peak_is_measured_once():
    devices = tuple(make_mesh(1).devices.flat)
    assert matrix_peak(devices) == matrix_peak(devices) > 1e8
