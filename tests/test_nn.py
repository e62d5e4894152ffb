"""The equinox wrapper."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
import reference
from models import Decoder, batch, layer_inputs, loss_fn


def test_with_lar_pools_over_a_vmapped_batch():
    model, tokens = Decoder(jax.random.key(0)), batch()
    measured = jlar.nn.with_lar(model)
    logits, lars = eqx.filter_jit(eqx.filter_vmap(measured))(tokens)
    np.testing.assert_allclose(logits, jax.vmap(model)(tokens), rtol=1e-4, atol=1e-6)
    for path, rows in layer_inputs(model, tokens).items():
        layer = model.head if path == "head" else getattr(model.blocks, path.split(".")[1])
        weights = layer.weight.reshape(len(rows), *layer.weight.shape[-2:])
        wanted = [reference.lar(W, x) for W, x in zip(weights, rows, strict=True)]
        pooled = lars[f"{path}.weight"].sum()
        np.testing.assert_allclose(np.atleast_1d(pooled.lar), wanted, rtol=1e-5)


def test_with_lar_as_aux_of_a_training_step():
    model, tokens = Decoder(jax.random.key(0)), batch()

    def loss(model, tokens):
        logits, lars = jax.vmap(jlar.nn.with_lar(model, where="head.*"))(tokens)
        labels = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
        value = -jnp.mean(jnp.sum(jax.nn.log_softmax(logits[:, :-1]) * labels, -1))
        return value, lars["head.weight"].sum()

    (value, e), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, tokens)
    plain_value, plain = eqx.filter_value_and_grad(loss_fn)(model, tokens)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    chex.assert_trees_all_close(
        eqx.filter(grads, eqx.is_array), eqx.filter(plain, eqx.is_array), rtol=1e-4, atol=1e-6
    )
    (inputs,) = layer_inputs(model, tokens)["head"]
    np.testing.assert_allclose(e.lar, reference.lar(model.head.weight, inputs), rtol=1e-5)


def test_a_choice_of_nothing_is_refused(unchecked):
    with pytest.raises(
        ValueError, match=r"where='heads' accepts none of the 10 paths .*'embedding'"
    ):
        jlar.nn.with_lar(Decoder(jax.random.key(0)), where="heads")(batch()[0])
