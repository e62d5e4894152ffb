"""The equinox wrappers."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
import reference
from models import Decoder, batch, layer_inputs, loss_fn


def test_linear_returns_its_output_and_energies():
    layer = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (10, 8))
    y, e = jax.vmap(jlar.nn.Linear(layer))(x)
    np.testing.assert_allclose(y, jax.vmap(layer)(x), rtol=1e-6)
    np.testing.assert_allclose(e.sum().lar, reference.lar(layer.weight, x), rtol=1e-5)
    y, _ = jlar.nn.Linear(eqx.nn.Linear(8, "scalar", key=jax.random.key(0)))(x[0])
    assert y.shape == ()


def test_with_lar_pools_over_a_vmapped_batch():
    model, tokens = Decoder(jax.random.key(0)), batch()
    measured = jlar.nn.with_lar(model)
    logits, lars = eqx.filter_jit(eqx.filter_vmap(measured))(tokens)
    np.testing.assert_allclose(logits, jax.vmap(model)(tokens), rtol=1e-4, atol=1e-6)
    for path, rows in layer_inputs(model, tokens).items():
        layer = model.head if path == "head" else getattr(model.blocks, path.split(".")[1])
        weights = layer.weight.reshape(len(rows), *layer.weight.shape[-2:])
        wanted = [reference.lar(W, x) for W, x in zip(weights, rows, strict=True)]
        pooled = lars[path].sum()
        np.testing.assert_allclose(np.atleast_1d(pooled.lar), wanted, rtol=1e-5)


def test_with_lar_as_aux_of_a_training_step():
    model, tokens = Decoder(jax.random.key(0)), batch()

    def loss(model, tokens):
        seen = {}

        def call(t):
            logits, lars = measured(t)
            return logits, lars

        measured = jlar.nn.with_lar(model, where=lambda m: m.head)
        logits, lars = jax.vmap(call)(tokens)
        labels = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
        value = -jnp.mean(jnp.sum(jax.nn.log_softmax(logits[:, :-1]) * labels, -1))
        return value, lars["head"].sum() if not seen else None

    (value, e), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, tokens)
    plain_value, plain = eqx.filter_value_and_grad(loss_fn)(model, tokens)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    chex.assert_trees_all_close(
        eqx.filter(grads, eqx.is_array), eqx.filter(plain, eqx.is_array), rtol=1e-4, atol=1e-6
    )
    (inputs,) = layer_inputs(model, tokens)["head"]
    np.testing.assert_allclose(e.lar, reference.lar(model.head.weight, inputs), rtol=1e-5)


def test_a_choice_of_nothing_is_refused_at_once(unchecked):
    with pytest.raises(ValueError, match="where= chose none"):
        jlar.nn.with_lar(Decoder(jax.random.key(0)), where=lambda m: m.embedding)
