"""The fused cross-entropy against NumPy, against the plain loss, and what it must never build."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jaxtyping import Float
from numpy import ndarray

import jlar
from jlar.losses import cross_entropy

TOLERANCE = {"float32": 2e-6, "float64": 1e-12, "bfloat16": 2e-6, "float16": 2e-6}
# What the gradient of a logit loses when it becomes the operand of a product in that dtype.
GRADIENT = {"float32": 5e-6, "float64": 1e-12, "bfloat16": 1e-2, "float16": 2e-3}

# (leading token axes, V, n, chunk)
SHAPES = {
    "one chunk": ((12,), 20, 8, None),
    "divides": ((12,), 20, 8, 4),
    "does not divide": ((13,), 20, 8, 5),
    "V odd, batch of sequences": ((3, 7), 31, 6, 4),
    "chunk exceeds tokens": ((5,), 9, 4, 100),
    "chunk of one": ((4,), 9, 4, 1),
    "one token, no axis": ((), 9, 4, 3),
    "two classes, three axes": ((2, 3, 2), 2, 16, 5),
    "one class": ((6,), 1, 4, 4),
}
OPTIONS = {
    "plain": {},
    "soft-cap": {"soft_cap": 1.5},
    "z-loss": {"z_loss": 0.1},
    "both": {"soft_cap": 1.5, "z_loss": 0.1},
}
# Every shape with all options, every option on one shape.
CASES = [(shape, "both") for shape in SHAPES] + [
    ("V odd, batch of sequences", options) for options in OPTIONS if options != "both"
]


def data(shape: str, dtype: str = "float32", seed: int = 0):
    tokens, V, n, chunk = SHAPES[shape]
    rng = np.random.default_rng(seed)
    W, X = (
        jnp.asarray(rng.normal(size=(V, n)), dtype),
        jnp.asarray(rng.normal(size=(*tokens, n)), dtype),
    )
    return W, X, jnp.asarray(rng.integers(0, V, tokens), jnp.int32), chunk


def dropped(labels, seed: int = 1):
    """A mask and labels to ignore, of which at least one token is kept."""
    rng = np.random.default_rng(seed)
    mask = rng.random(labels.shape) < 0.7
    ignored = np.where(rng.random(labels.shape) < 0.2, -100, labels)
    if labels.ndim:
        mask.flat[0], ignored.flat[0] = True, np.asarray(labels).flat[0]
    else:
        mask, ignored = np.asarray(True), np.asarray(labels)
    return jnp.asarray(mask), jnp.asarray(ignored, jnp.int32)


def reference(
    W, X, labels, mask=None, soft_cap=None, z_loss=0.0, ignore=-100
) -> Float[ndarray, "*t"]:
    """One loss per token in float64, token by token."""
    W, X = np.asarray(W).astype(np.float64), np.asarray(X).astype(np.float64)
    out = np.zeros(X.shape[:-1])
    for token in np.ndindex(out.shape):
        label = int(np.asarray(labels)[token])
        if label == ignore or (mask is not None and not np.asarray(mask)[token]):
            continue
        z = W @ X[token]
        if soft_cap is not None:
            z = soft_cap * np.tanh(z / soft_cap)
        top = z.max()
        log_sum = top + np.log(np.exp(z - top).sum())
        out[token] = log_sum - z[label] + z_loss * log_sum**2
    return out


def plain(W, X, labels, keep, soft_cap=None, z_loss=0.0) -> Float[jax.Array, "*t"]:
    """The textbook loss per token, with all its logits, differentiable by JAX alone."""
    acc = jnp.float64 if W.dtype == jnp.float64 else jnp.float32
    z = X.astype(acc) @ W.astype(acc).T
    if soft_cap is not None:
        z = soft_cap * jnp.tanh(z / soft_cap)
    log_p = jax.nn.log_softmax(z)
    log_sum = jax.nn.logsumexp(z, axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.where(keep, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(keep, z_loss * log_sum**2 - picked, 0)


def close(actual, expected, tolerance: float):
    """Equal up to the tolerance relative to the largest entry."""
    actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "options"), CASES)
def test_definition(shape, options, masked):
    W, X, labels, chunk = data(shape)
    mask, labels = dropped(labels) if masked else (None, labels)
    arguments = {"mask": mask, "chunk": chunk, **OPTIONS[options]}
    kept = (labels != -100) & (True if mask is None else mask)
    expected = reference(W, X, labels, mask, **OPTIONS[options])
    for reduction, value in (
        ("none", expected),
        ("sum", expected.sum()),
        ("mean", expected.sum() / int(kept.sum())),
    ):
        loss, energies = cross_entropy(W, X, labels, reduction=reduction, **arguments)
        assert loss.dtype == jnp.float32 and loss.shape == np.shape(value)
        np.testing.assert_allclose(loss, value, rtol=TOLERANCE["float32"], atol=2e-6)
        chex.assert_trees_all_close(energies, jlar.energies(W, X, mask=kept), rtol=2e-6)
        assert int(energies.count) == int(kept.sum())


@pytest.mark.parametrize("options", ["plain", "both"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_definition_in_other_dtypes(dtype, options, x64):
    W, X, labels, chunk = data("V odd, batch of sequences", dtype)
    loss, energies = cross_entropy(W, X, labels, chunk=chunk, **OPTIONS[options])
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert loss.dtype == energies.y.dtype == wide
    # Of the rounded inputs: products and sums are float32 at least.
    expected = reference(W, X, labels, **OPTIONS[options]).mean()
    np.testing.assert_allclose(loss, expected, rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(energies.lar, jlar.lar(W, X), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("shape", "options"), CASES)
def test_gradients_with_any_cotangent(shape, options, reduction):
    W, X, labels, chunk = data(shape)
    mask, labels = dropped(labels)
    keep = mask & (labels != -100)
    cotangent = jnp.float32(-3.5)
    if reduction == "none":
        cotangent = jnp.asarray(np.random.default_rng(5).normal(size=labels.shape), jnp.float32)

    def fused(W, X):
        arguments = {"mask": mask, "chunk": chunk, **OPTIONS[options]}
        loss, _ = cross_entropy(W, X, labels, reduction=reduction, **arguments)
        return jnp.sum(loss * cotangent)

    def textbook(W, X):
        loss = jnp.sum(plain(W, X, labels, keep, **OPTIONS[options]) * cotangent)
        return loss / keep.sum().astype(loss.dtype) if reduction == "mean" else loss

    actual = jax.jit(jax.grad(fused, (0, 1)))(W, X)
    expected = jax.jit(jax.grad(textbook, (0, 1)))(W, X)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=5e-6)
    assert not np.asarray(actual[1])[~np.asarray(keep)].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_gradients_in_other_dtypes(dtype, reduction, x64):
    W, X, labels, _ = data("V odd, batch of sequences", dtype)
    keep = jnp.ones(labels.shape, bool)

    def fused(W, X):
        return jnp.mean(cross_entropy(W, X, labels, chunk=4, z_loss=0.1, reduction=reduction)[0])

    actual = jax.grad(fused, (0, 1))(W, X)
    expected = jax.grad(lambda W, X: plain(W, X, labels, keep, z_loss=0.1).mean(), (0, 1))(W, X)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        close(a, b, GRADIENT[dtype])


def test_gradient_sums_over_chunks_are_float32():
    # 4,096 equal parts of one gradient: a sum held in bfloat16 would stop at 256 of them.
    W = jnp.zeros((4, 2), jnp.bfloat16)
    X, labels = jnp.ones((4096, 2), jnp.bfloat16), jnp.zeros(4096, jnp.int32)
    dW = jax.grad(lambda W: cross_entropy(W, X, labels, chunk=1, reduction="sum")[0])(W)
    np.testing.assert_array_equal(dW.astype(jnp.float32)[:, 0], [-3072, 1024, 1024, 1024])


def test_small_cotangents_survive_half_precision():
    W, X, labels, _ = data("divides", "float16")

    def dW(scale):
        return jax.grad(lambda W: scale * cross_entropy(W, X, labels)[0] / scale)(W)

    close(dW(2.0**-20), dW(1.0), 1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", ["plain", "both"])
def test_gradients_by_finite_differences(options, reduction, x64):
    W, X, labels, _ = data("V odd, batch of sequences", "float64")
    mask, labels = dropped(labels)

    def loss(W, X):
        arguments = {"mask": mask, "chunk": 4, **OPTIONS[options]}
        return jnp.sin(cross_entropy(W, X, labels, reduction=reduction, **arguments)[0])

    check_grads(loss, (W, X), order=1, modes=["rev"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_right_and_forward_mode_is_refused(reduction, x64):
    W, X, labels, _ = data("divides", "float64")
    keep = jnp.ones(labels.shape, bool)

    def fused(W):
        losses, _ = cross_entropy(W, X, labels, chunk=5, soft_cap=2.0, reduction=reduction)
        return jnp.mean(losses)

    def textbook(W):
        return plain(W, X, labels, keep, soft_cap=2.0).mean()

    V = jnp.cos(W)

    def reverse_twice(f):
        return jax.jit(jax.grad(lambda W: jnp.vdot(jax.grad(f)(W), V)))(W)

    def forward_over_reverse(f):
        return jax.jit(lambda W: jax.jvp(jax.grad(f), (W,), (V,))[1])(W)

    for twice in (reverse_twice, forward_over_reverse):
        close(twice(fused), twice(textbook), 1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(fused, (W,), (W,))


@pytest.mark.parametrize("chunk", [1, 5, 12, 13, 64])
def test_chunking_changes_nothing(chunk):
    W, X, labels, _ = data("does not divide")
    loss = jax.value_and_grad(cross_entropy, (0, 1), has_aux=True)
    whole, parts = loss(W, X, labels, chunk=13), loss(W, X, labels, chunk=chunk)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_mixed_dtypes_meet_in_float32():
    W, X, labels, _ = data("divides")
    X = X.astype(jnp.bfloat16)
    value = jax.value_and_grad(lambda W, X: cross_entropy(W, X, labels)[0], (0, 1))
    loss, (dW, dX) = value(W, X)
    assert (loss.dtype, dW.dtype, dX.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    wide, (dW_wide, _) = value(W, X.astype(jnp.float32))
    np.testing.assert_array_equal(loss, wide)
    np.testing.assert_array_equal(dW, dW_wide)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_any_integer_labels(dtype):
    W, X, labels, chunk = data("divides")
    expected = cross_entropy(W, X, labels, chunk=chunk)[0]
    assert cross_entropy(W, X, labels.astype(dtype), chunk=chunk)[0] == expected


def test_a_class_may_be_the_one_ignored():
    W, X, labels, chunk = data("divides")
    ignore = int(labels[3])
    loss, energies = cross_entropy(W, X, labels, chunk=chunk, ignore=ignore, reduction="none")
    np.testing.assert_allclose(loss, reference(W, X, labels, ignore=ignore), rtol=2e-6, atol=2e-6)
    assert int(energies.count) == int((labels != ignore).sum()) < 12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dropped_tokens_contaminate_nothing(reduction):
    W, X, labels, _ = data("does not divide")
    mask = jnp.ones(13, bool).at[jnp.array([2, 7])].set(False)

    def step(X, labels):
        def loss(W, X):
            loss, e = cross_entropy(W, X, labels, mask=mask, chunk=4, reduction=reduction)
            return jnp.sum(loss), (loss, e)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(W, X)

    clean = step(X, labels)
    bad = step(X.at[2].set(jnp.nan).at[7].set(jnp.inf), labels.at[2].set(999).at[7].set(-5))
    chex.assert_trees_all_equal(bad, clean)
    if reduction == "none":
        assert clean[0][1][0][2] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_tokens(reduction):
    W, X, labels, _ = data("does not divide")
    mask = jnp.ones(13, bool).at[2].set(False)
    weights = jnp.linspace(-0.5, 2, 13).at[5].set(0)

    def weighted(W, X, weights):
        loss, e = cross_entropy(
            W, X, labels, mask=mask, weights=weights, chunk=4, reduction=reduction
        )
        return jnp.sum(jnp.sin(loss)), e

    def textbook(W, X, weights):
        losses = plain(W, X, labels, mask) * weights
        if reduction != "none":
            losses = jnp.sum(losses) / (jnp.sum(weights, where=mask) if reduction == "mean" else 1)
        return jnp.sum(jnp.sin(losses))

    gradient = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)
    (value, e), actual = gradient(W, X, weights)
    expected = jax.value_and_grad(textbook, (0, 1, 2))(W, X, weights)
    chex.assert_trees_all_close(
        (value, actual[:2]), (expected[0], expected[1][:2]), rtol=1e-4, atol=5e-6
    )
    kept = mask & (weights != 0)
    close(actual[2][kept], expected[1][2][kept], 1e-4)
    chex.assert_trees_all_close(e, jlar.energies(W, X, mask=kept), rtol=2e-6)


@pytest.mark.parametrize("label", [20, 10**6, -1, -99, -101])
def test_a_label_out_of_range_is_nan(label):
    W, X, labels, _ = data("divides")
    labels = labels.at[5].set(label)
    losses, energies = cross_entropy(W, X, labels, chunk=4, reduction="none")
    assert jnp.isnan(losses).tolist() == [t == 5 for t in range(12)]
    np.testing.assert_allclose(energies.lar, jlar.lar(W, X), rtol=2e-6)
    for reduction in ("mean", "sum"):
        (loss, _), (dW, dX) = jax.value_and_grad(cross_entropy, (0, 1), has_aux=True)(
            W, X, labels, chunk=4, reduction=reduction
        )
        assert jnp.isnan(loss) and jnp.isnan(dW).all()
        assert jnp.isnan(dX).all(axis=1).tolist() == [t == 5 for t in range(12)]


@pytest.mark.parametrize("by", ["mask", "ignore", "no tokens"])
def test_the_mean_of_nothing_is_nan_and_its_sum_zero(by):
    W, X, labels, _ = data("divides")
    mask = None
    if by == "mask":
        mask = jnp.zeros(12, jnp.int32)
    elif by == "ignore":
        labels = jnp.full_like(labels, -100)
    else:
        X, labels = X[:0], labels[:0]
    step = jax.value_and_grad(cross_entropy, (0, 1), has_aux=True)
    (loss, energies), (dW, _) = step(W, X, labels, mask=mask, chunk=4)
    assert jnp.isnan(loss) and jnp.isnan(dW).all() and jnp.isnan(energies.lar)
    assert int(energies.count) == 0
    (loss, _), gradients = step(W, X, labels, mask=mask, chunk=4, reduction="sum")
    assert loss == 0 and not any(g.any() for g in gradients)
    losses, _ = cross_entropy(W, X, labels, mask=mask, chunk=4, reduction="none")
    assert losses.shape == labels.shape and not losses.any()


def test_large_logits_do_not_overflow():
    W, X, labels, chunk = data("divides")
    value, gradient = jax.value_and_grad(lambda X: cross_entropy(W, X, labels, chunk=chunk)[0])(
        1e4 * X
    )
    np.testing.assert_allclose(value, reference(W, 1e4 * X, labels).mean(), rtol=2e-6)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("size", [1e4, 1e6, 1e7, 1e8, 1e30])
def test_large_logits_do_not_round_their_difference(size):
    W, X = jnp.array([[size, 0.0], [size, 0.0], [0.0, 0.0]]), jnp.array([[1.0, 0.0]])
    loss, _ = cross_entropy(W, X, jnp.array([0]))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_a_small_z_loss_of_large_logits():
    W, X = jnp.array([[1e20, 0.0], [0.0, 0.0]]), jnp.array([[1.0, 0.0]])
    for weight in (1e-30, 1e-4):
        loss, _ = cross_entropy(W, X, jnp.array([0]), z_loss=weight)
        np.testing.assert_allclose(loss, weight * 1e40, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e5, 1e36])
def test_the_mean_does_not_depend_on_the_size_of_the_weights(scale, dtype):
    W, X, labels, _ = data("divides", dtype)
    weights = jnp.linspace(0.5, 2, 12)

    def step(weights):
        return jax.value_and_grad(lambda W: cross_entropy(W, X, labels, weights=weights)[0])(W)

    # The gradient of each logit is rounded to float16.
    tolerance = {"float32": {"rtol": 2e-5, "atol": 1e-7}, "float16": {"rtol": 1e-2, "atol": 3e-4}}
    chex.assert_trees_all_close(step(scale * weights), step(weights), **tolerance[dtype])
    if scale == 1e-20:  # beside much larger ones the loss and its gradient are kept too
        wide = weights.at[2].set(1e-30)
        one = jax.grad(lambda w: cross_entropy(W, X, labels, weights=w, reduction="sum")[0])(wide)
        each, _ = cross_entropy(W, X, labels, reduction="none")
        np.testing.assert_allclose(one[2], each[2], rtol=1e-4)
    if scale < 1e36:
        total = cross_entropy(W, X, labels, weights=scale * weights, reduction="sum")[0]
        losses, _ = cross_entropy(W, X, labels, weights=scale * weights, reduction="none")
        np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)


def test_labels_of_64_bits_are_not_wrapped():
    loss, _ = cross_entropy(jnp.eye(2), jnp.array([[1.0, 0.0]]), np.array([2**32]))
    assert jnp.isnan(loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_every_transformation(reduction):
    W, X, labels, _ = data("V odd, batch of sequences")
    mask, labels = dropped(labels)

    def loss(W, X, labels, mask):
        loss, e = cross_entropy(W, X, labels, mask=mask, chunk=3, z_loss=0.1, reduction=reduction)
        return jnp.sum(jnp.cos(loss)), e

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected = step(W, X, labels, mask)
    close_to = {"rtol": 1e-5, "atol": 1e-6}
    chex.assert_trees_all_close(jax.jit(step)(W, X, labels, mask), expected, **close_to)

    remat = jax.value_and_grad(jax.checkpoint(loss), (0, 1), has_aux=True)
    chex.assert_trees_all_close(jax.jit(remat)(W, X, labels, mask), expected, **close_to)

    Ws, rows = jnp.stack([W, 2 * W, W + 1]), (X, labels, mask)
    each = [step(w, *(a[i] for a in rows)) for i, w in enumerate(Ws)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
    chex.assert_trees_all_close(jax.jit(jax.vmap(step))(Ws, *rows), stacked, **close_to)

    # One W, a batch under vmap inside the gradient.
    def batch(W, X, labels, mask):
        losses, e = jax.vmap(loss, (None, 0, 0, 0))(W, X, labels, mask)
        return jnp.sum(losses), e

    (total, e), (dW, dX) = jax.value_and_grad(batch, (0, 1), has_aux=True)(W, *rows)
    each = [step(W, *(a[i] for a in rows)) for i in range(3)]
    np.testing.assert_allclose(total, sum(value for (value, _), _ in each), rtol=1e-5)
    np.testing.assert_allclose(dW, sum(g[0] for _, g in each), **close_to)
    np.testing.assert_allclose(dX, jnp.stack([g[1] for _, g in each]), **close_to)
    chex.assert_trees_all_close(e.sum(), sum(e for (_, e), _ in each), rtol=1e-5)


def test_gradient_of_a_sum_of_two_losses():
    W, X, labels, chunk = data("does not divide")

    def both(W, X, f):
        return 2 * f(W, X, labels) - 0.3 * f(W, jnp.sin(X), labels[::-1]) + jnp.sum(W**2)

    fused = jax.grad(both, (0, 1))(W, X, lambda *a: cross_entropy(*a, chunk=chunk)[0])
    textbook = jax.grad(both, (0, 1))(W, X, lambda W, X, y: plain(W, X, y, y >= 0).mean())
    chex.assert_trees_all_close(fused, textbook, rtol=1e-4, atol=5e-6)


def test_micro_batches_in_a_scan_equal_the_whole_batch():
    W, X, labels, _ = data("V odd, batch of sequences")
    mask, labels = dropped(labels)

    def loss(W, X, labels, mask, reduction="sum"):
        return cross_entropy(W, X, labels, mask=mask, chunk=2, reduction=reduction)

    def micro(total, batch):
        (value, e), dW = jax.value_and_grad(loss, has_aux=True)(W, *batch)
        return jax.tree.map(jnp.add, total, (value, e, dW)), None

    start = jnp.zeros(()), jlar.Energies.zeros(W.shape[1]), jnp.zeros_like(W)
    (value, pooled, dW), _ = jax.jit(lambda *b: jax.lax.scan(micro, start, b))(X, labels, mask)
    (mean, e), gradient = jax.value_and_grad(loss, has_aux=True)(W, X, labels, mask, "mean")
    count = pooled.count.astype(jnp.float32)
    np.testing.assert_allclose(value / count, mean, rtol=1e-6)
    np.testing.assert_allclose(dW / count, gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled.lar, e.lar, rtol=1e-6)
    assert int(pooled.count) == int(e.count)


def test_permuting_tokens_permutes_losses():
    W, X, labels, _ = data("does not divide")
    order = np.random.default_rng(0).permutation(13)
    losses = cross_entropy(W, X, labels, chunk=4, reduction="none")[0]
    shuffled = cross_entropy(W, X[order], labels[order], chunk=4, reduction="none")[0]
    np.testing.assert_allclose(shuffled, losses[order], rtol=1e-6)


def test_energies_carry_no_gradient_and_have_no_soft_cap():
    W, X, labels, _ = data("divides")

    def lar(W, X):
        return cross_entropy(W, X, labels, chunk=4, soft_cap=0.1)[1].lar

    np.testing.assert_allclose(lar(W, X), jlar.lar(W, X), rtol=2e-6)
    assert not any(g.any() for g in jax.grad(lar, (0, 1))(W, X))


def test_no_retrace():
    W, X, labels, _ = data("divides")
    traced = jax.jit(chex.assert_max_traces(lambda *a: cross_entropy(*a, chunk=4), n=1))
    traced(W, X, labels)
    traced(W + 1, X, labels - 1)


def sizes(jaxpr) -> set[int]:
    """Elements of every array of a jaxpr and of the jaxprs within."""
    found = {v.aval.size for v in jaxpr.invars + jaxpr.constvars if hasattr(v.aval, "size")}
    for equation in jaxpr.eqns:
        found |= {v.aval.size for v in equation.outvars if hasattr(v.aval, "size")}
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= sizes(inner)
    return found


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_logits_never_exist(reduction, differentiate):
    t, V, n, chunk = 64, 130, 4, 6
    W, X, labels = jnp.ones((V, n)), jnp.ones((t, n)), jnp.zeros(t, jnp.int32)

    def loss(W, X):
        options = {"chunk": chunk, "soft_cap": 3.0, "z_loss": 0.1, "reduction": reduction}
        loss, e = cross_entropy(W, X, labels, **options)
        return jnp.sum(loss), e

    step = jax.value_and_grad(loss, (0, 1), has_aux=True) if differentiate else loss
    largest = max(sizes(jax.make_jaxpr(step)(W, X).jaxpr))
    # The walk sees into the scan (a chunk's logits are the largest array), and finds them all.
    assert largest == chunk * V
    everything = jax.make_jaxpr(lambda W, X: plain(W, X, labels, labels == 0))(W, X)
    assert max(sizes(everything.jaxpr)) == t * V
    compiled = jax.jit(step).lower(W, X).compile().as_text() or ""
    assert f"[{chunk},{V}]" in compiled and f"[{t},{V}]" not in compiled


def test_no_gradient_is_computed_for_the_value_alone():
    W, X, labels, _ = data("divides")

    def products(f):
        return str(jax.make_jaxpr(f)(W, X)).count("dot_general")

    def loss(W, X, reduction="mean"):
        return jnp.sum(cross_entropy(W, X, labels, chunk=4, reduction=reduction)[0])

    assert products(loss) == 1
    assert products(jax.grad(loss, (0, 1))) == 3
    assert products(jax.grad(lambda *a: loss(*a, reduction="none"), (0, 1))) == 4


ERRORS = {
    r"W must have shape \(m, n\)": lambda W, X, y: cross_entropy(W[0], X, y),
    "input width n": lambda W, X, y: cross_entropy(W[:, :1], X[:, :1], y),
    r"X must have shape \(..., 8\)": lambda W, X, y: cross_entropy(W, X[:, :5], y),
    r"kernel\.T": lambda W, X, y: cross_entropy(W.T, X, y),
    "tokens first": lambda W, X, y: cross_entropy(W, jnp.float32(1), y[0]),
    r"labels must have one entry per token, shape \(12,\).*got shape \(11,\)": (
        lambda W, X, y: cross_entropy(W, X, y[1:])
    ),
    "labels must be integers.*float32.*argmax": (
        lambda W, X, y: cross_entropy(W, X, jnp.ones((12, 20)))
    ),
    "labels must be integers.*bool": lambda W, X, y: cross_entropy(W, X, y > 3),
    "mask must have one entry per token": lambda W, X, y: cross_entropy(W, X, y, mask=X),
    "W must be real": lambda W, X, y: cross_entropy(W.astype(jnp.complex64), X, y),
    "chunk must be at least 1 token.*got 0": lambda W, X, y: cross_entropy(W, X, y, chunk=0),
    r"soft_cap must be positive.*got 0\.0": lambda W, X, y: cross_entropy(W, X, y, soft_cap=0.0),
    "soft_cap must be positive.*got nan": (
        lambda W, X, y: cross_entropy(W, X, y, soft_cap=float("nan"))
    ),
    r"z_loss must be a finite weight.*got -0\.1": (
        lambda W, X, y: cross_entropy(W, X, y, z_loss=-0.1)
    ),
    "reduction must be .*; got 'average'": (
        lambda W, X, y: cross_entropy(W, X, y, reduction="average")
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_misuse_is_named_at_trace_time(message, unchecked):
    W, X, labels, _ = data("divides")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message], W, X, labels)
