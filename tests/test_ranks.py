"""The principal dimension against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
import reference
from cases import CASES


@pytest.mark.parametrize("fraction", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("name", [name for name in CASES if name != "one token"])
def test_principal_dimension(name, fraction):
    X = jnp.asarray(CASES[name]().X, jnp.float32)
    expected = reference.principal_dimension(X, fraction)
    assert int(jlar.principal_dimension(X, fraction)) == expected
    assert int(jax.jit(jlar.principal_dimension, static_argnums=1)(X, fraction)) == expected
    assert int(jlar.principal_dimension(X + 5, fraction)) == expected  # centred


def test_principal_dimension_of_the_kept_tokens():
    X = jnp.asarray(CASES["aligned"]().X, jnp.float32)
    mask = jnp.arange(80) < 30
    value = jlar.principal_dimension(
        X.at[50].set(jnp.nan).reshape(4, 20, -1), mask=mask.reshape(4, 20)
    )
    assert int(value) == reference.principal_dimension(X, mask=mask)
    assert value <= 29  # the rank of 30 centred tokens


def test_nan_out():
    X = jnp.asarray(CASES["aligned"]().X, jnp.float32)
    with jax.debug_nans(False):
        assert jnp.isnan(jlar.principal_dimension(X.at[0, 0].set(jnp.nan)))
        assert jnp.isnan(jlar.principal_dimension(jnp.ones((5, 3))))
        assert jnp.isnan(jlar.principal_dimension(X, mask=jnp.zeros(80)))


@pytest.mark.parametrize("constant", [0.1, 1.0, 1000.1])
def test_a_constant_has_no_principal_dimension(constant):
    with jax.debug_nans(False):
        assert jnp.isnan(jlar.principal_dimension(jnp.full((1000, 3), constant)))


@pytest.mark.parametrize(("constant", "noise"), [(0.1, 1e-9), (100.1, 1e-6), (1000.1, 1e-5)])
def test_a_constant_column_hides_no_small_variance(constant, noise):
    X = np.random.default_rng(0).standard_normal((1000, 9)).astype(np.float32) * noise
    X[:, 0] = constant
    assert int(jlar.principal_dimension(X)) == reference.principal_dimension(X) == 8
