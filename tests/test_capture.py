"""capture: a table of constructs, each against float64 NumPy; value and gradient stay f's own."""

import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

import jlar
import reference

N, M, T, L = 6, 5, 7, 3
tanh = np.tanh


def normal(seed: int, *shape: int) -> np.ndarray:
    """Far from isotropic, so that no wrong axis gives the right number."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=shape)
    for d, size in enumerate(shape):
        scale = rng.permutation((1 + np.arange(size)) ** -0.7)
        a *= scale.reshape([-1 if e == d else 1 for e in range(len(shape))])
    return a.astype(np.float32)


W, V, X = normal(0, N, M), normal(1, M, N), normal(2, T, N)
S, SQUARE = normal(3, L, N, N), normal(4, N, N)
G = normal(5, N)


class Case(NamedTuple):
    """f(weights, *args), and what is to be seen: (W, X) by name, lists of them for rows."""

    f: Callable
    weights: Any
    args: tuple
    seen: Mapping[str, Any]
    rtol: float = 1e-5
    options: Mapping[str, Any] = {}
    differentiable: bool = True
    close: float = 2e-6
    """How close the compiled gradient is to that of the plain function."""


@pytest.fixture(autouse=True, scope="module")
def compiled_fast():
    """Compiling takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


CASES: dict[str, Callable[[], Case]] = {}


def case(make):
    CASES[make.__name__.replace("_", " ")] = make
    return make


def cases(**makes):
    CASES.update({name.replace("_", " "): make for name, make in makes.items()})


def f64(*arrays):
    return tuple(np.asarray(a).astype(np.float64) for a in arrays)


def lar_of(use) -> Any:
    """LAR of (W, X), of a list one by one, nan of None."""
    if use is None:
        return np.nan
    if isinstance(use, list):
        return np.array([lar_of(each) for each in use], np.float64)
    return reference.lar(*use)


def count_of(use) -> Any:
    if use is None:
        return 0
    if isinstance(use, list):
        return np.array([count_of(each) for each in use], np.int64)
    return len(reference.kept_rows(use[1], *use[2:]))


def assert_seen(lars, wanted, rtol=1e-5):
    assert set(lars) == set(wanted)
    for name, use in wanted.items():
        got, lar = lars[name], lar_of(use)
        assert got.lar.shape == np.shape(lar), name
        np.testing.assert_array_equal(got.count, count_of(use), err_msg=name)
        np.testing.assert_allclose(got.lar, lar, rtol=rtol, err_msg=name)


def total(out) -> Any:
    """A scalar with a gradient for everything that f returns."""
    leaves = [a for a in jax.tree.leaves(out) if eqx.is_inexact_array(a)]
    return sum(jnp.sum(jnp.sin(jnp.real(a).astype(jnp.float32))) for a in leaves)


def close(a, b, rtol=2e-6):
    a, b = (eqx.filter(tree, eqx.is_array) for tree in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = (np.asarray(z.astype(jnp.float32) if z.dtype.itemsize < 4 else z) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def check(
    f, weights, args, seen, rtol=1e-5, options=None, differentiable=True, near=2e-6, eager=False
):
    weights, args = jax.tree.map(
        lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, (weights, args)
    )
    captured = jlar.capture(f, **(options or {}))

    def plain(w, *args):
        out = f(w, *args)
        return total(out), out

    def measured(w, *args):
        out, lars = captured(w, *args)
        return total(out), (out, lars)

    if differentiable:
        plain, measured = (eqx.filter_value_and_grad(g, has_aux=True) for g in (plain, measured))
        (_, wanted), gradient = eqx.filter_jit(plain)(weights, *args)
        (_, (value, lars)), got = eqx.filter_jit(measured)(weights, *args)
        close(got, gradient, near)
    else:
        _, wanted = eqx.filter_jit(plain)(weights, *args)
        _, (value, lars) = eqx.filter_jit(measured)(weights, *args)
    close(value, wanted, near)
    assert_seen(lars, seen, rtol)
    if eager:
        value, lars = captured(weights, *args)
        close(value, wanted)
        assert_seen(lars, seen, rtol)


def bf16(a):
    return np.asarray(jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32))


# --- plain products -----------------------------------------------------------------------------


@case
def two_matrices():
    def f(w, x):
        return jnp.tanh(x @ w["up"]) @ w["down"]

    w, x = f64(W, X)
    return Case(f, {"up": W, "down": V}, (X,), {"up": (W.T, X), "down": (V.T, tanh(x @ w))})


cases(
    one_array=lambda: Case(lambda w, x: x @ w, W, (X,), {"weights": (W.T, X)}),
    list_of_arrays=lambda: Case(
        lambda w, x: x @ w[0] + x @ w[1], [W, W * 2], (X,), {"0": (W.T, X), "1": (W.T, X)}
    ),
    left=lambda: Case(lambda w, x: w["w"] @ x, {"w": W.T}, (X.T,), {"w": (W.T, X)}),
    one_token=lambda: Case(lambda w, x: w["w"] @ x, {"w": W.T}, (X[0],), {"w": (W.T, X[:1])}),
    vector=lambda: Case(lambda w, x: x @ w["w"], {"w": G}, (X,), {"w": (G[None], X)}),
    vector_scalar=lambda: Case(lambda w, x: x @ w["w"], {"w": G}, (X[0],), {"w": (G[None], X[:1])}),
    scalar_outputs=lambda: Case(
        lambda w, x: x @ w["w"], {"w": W[:, :1]}, (X,), {"w": (W[:, :1].T, X)}
    ),
    many_token_axes=lambda: Case(
        lambda w, x: x @ w["w"],
        {"w": W},
        (normal(9, 2, 3, 4, N),),
        {"w": (W.T, normal(9, 2, 3, 4, N))},
    ),
    tokens_last=lambda: Case(
        lambda w, x: jnp.einsum("bnt,nm->btm", x, w["w"]),
        {"w": W},
        (normal(9, 2, N, 4),),
        {"w": (W.T, normal(9, 2, N, 4).transpose(0, 2, 1))},
    ),
    # Inputs and outputs of several axes, as flax's DenseGeneral has them.
    dense_general=lambda: Case(
        lambda w, x: jnp.einsum("btij,jicd->btcd", x, w["w"]),
        {"w": normal(8, 3, 2, 4, 5)},
        (normal(9, 2, 3, 2, 3),),
        {
            "w": (
                normal(8, 3, 2, 4, 5).transpose(2, 3, 1, 0).reshape(20, 6),
                normal(9, 2, 3, 2, 3).reshape(-1, 6),
            )
        },
    ),
    heads=lambda: Case(  # one matrix per head
        lambda w, x: jnp.einsum("bthd,hdm->bthm", x, w["w"]),
        {"w": normal(8, 2, N, M)},
        (normal(9, 3, 4, 2, N),),
        {"w": [(normal(8, 2, N, M)[h].T, normal(9, 3, 4, 2, N)[:, :, h]) for h in range(2)]},
    ),
    two_stacked_axes=lambda: Case(
        lambda w, x: jnp.einsum("tabn,banm->tabm", x, w["w"]),
        {"w": normal(8, 2, 3, N, M)},
        (normal(9, 4, 3, 2, N),),
        {
            "w": [
                [(normal(8, 2, 3, N, M)[b, a].T, normal(9, 4, 3, 2, N)[:, a, b]) for b in range(2)]
                for a in range(3)
            ]
        },
    ),
    cast=lambda: Case(
        lambda w, x: x.astype(jnp.bfloat16) @ w["w"].astype(jnp.bfloat16),
        {"w": W},
        (X,),
        {"w": (bf16(W).T, bf16(X))},
        rtol=1e-3,
        close=2e-2,
    ),
    float16=lambda: Case(
        lambda w, x: x @ w["w"],
        {"w": W.astype(np.float16)},
        (X.astype(np.float16),),
        {"w": (W.astype(np.float16).T, X.astype(np.float16))},
        rtol=1e-3,
    ),
    frozen=lambda: Case(
        lambda w, x: x @ jax.lax.stop_gradient(w["w"]) + w["b"],
        {"w": W, "b": normal(1, M)},
        (X,),
        {"w": (W.T, X)},
    ),
    scaled=lambda: Case(
        lambda w, x: x @ (w["w"] * w["s"] * 3), {"w": W, "s": G[0]}, (X,), {"w": (W.T, X)}
    ),
    gain_and_bias=lambda: Case(
        lambda w, x: (x * w["g"]) @ w["w"] + w["b"],
        {"w": W, "g": G, "b": normal(1, M)},
        (X,),
        {"w": (W.T, np.multiply(*f64(X, G)))},
    ),
    low_rank=lambda: Case(
        lambda w, x: x @ (w["w"] + w["b"] @ w["a"]),
        {"w": W, "b": normal(7, N, 2), "a": normal(8, 2, M)},
        (X,),
        {"w": ((W + np.matmul(*f64(normal(7, N, 2), normal(8, 2, M)))).T, X)},
    ),
    low_rank_apart=lambda: Case(
        lambda w, x: x @ w["w"] + (x @ w["b"]) @ w["a"],
        {"w": W, "b": normal(7, N, 2), "a": normal(8, 2, M)},
        (X,),
        {
            "w": (W.T, X),
            "b": (normal(7, N, 2).T, X),
            "a": (normal(8, 2, M).T, np.matmul(*f64(X, normal(7, N, 2)))),
        },
    ),
    int8=lambda: Case(
        lambda w, x: x @ (w["w"].astype(jnp.float32) * w["s"]),
        {"w": np.round(50 * W).astype(np.int8), "s": np.abs(normal(1, M)) / 50},
        (X,),
        {"w": ((np.round(50 * W) * np.abs(normal(1, M)).astype(np.float64)).T, X)},
    ),
    int8_both=lambda: Case(
        lambda w, x: jax.lax.dot(x, w["w"], preferred_element_type=jnp.int32),
        {"w": np.round(50 * W).astype(np.int8)},
        (np.round(50 * X).astype(np.int8),),
        {"w": (np.round(50 * W).astype(np.int8).T, np.round(50 * X).astype(np.int8))},
        differentiable=False,
    ),
    attention=lambda: attention(),
    weight_norm=lambda: Case(
        lambda w, x: x @ (w["w"] / jnp.linalg.norm(w["w"], axis=0, keepdims=True) * w["g"]),
        {"w": W, "g": normal(1, M)},
        (X,),
        {"w": ((W / np.linalg.norm(f64(W)[0], axis=0) * normal(1, M)).T, X)},
    ),
    unused_product=lambda: Case(
        lambda w, x: (x @ w["v"], x @ w["w"])[1],
        {"w": W, "v": W},
        (X,),
        {"w": (W.T, X), "v": (W.T, X)},
    ),
    position_embedding=lambda: Case(
        lambda w, x: (x + w["p"][jnp.arange(T)]) @ w["w"],
        {"w": W, "p": normal(8, 20, N)},
        (X,),
        {"w": (W.T, np.add(*f64(X, normal(8, 20, N)[:T])))},
    ),
    barrier=lambda: Case(
        lambda w, x: jnp.matmul(*jax.lax.optimization_barrier((x, w["w"]))),
        {"w": W},
        (X,),
        {"w": (W.T, X)},
    ),
)


def attention() -> Case:
    def f(w, x):
        q, k, v = (x @ w[name] for name in "qkv")
        return (jax.nn.softmax(q @ k.T) @ v) @ w["o"]

    w = {name: normal(i, N, N) for i, name in enumerate("qkvo")}
    x, q, k, v = f64(X, w["q"], w["k"], w["v"])
    s = np.exp((x @ q) @ (x @ k).T)
    out = s / s.sum(-1, keepdims=True) @ (x @ v)
    return Case(f, w, (X,), {**{n: (w[n].T, X) for n in "qkv"}, "o": (w["o"].T, out)})


# --- several uses of one array ------------------------------------------------------------------


@case
def shared():
    def f(w, x):
        return x @ w["w"] + (2 * x + 1) @ w["w"]

    return Case(f, {"w": W}, (X,), {"w": (W.T, np.concatenate([X, 2 * X + 1]))})


@case
def several_forms():
    def f(w, x, y):
        w = w["w"]
        cut = x[:, :3] @ w[:3].astype(jnp.bfloat16).astype(jnp.float32)
        return x.astype(jnp.float16) @ w.astype(jnp.float16), y @ w.T, cut

    half = W.astype(jnp.bfloat16).astype(np.float32)[:3].T
    Y = normal(6, 4, M)
    wanted = {"w": (W.T, X), "w#2": (W, Y), "w[0:3]": (half, X[:, :3])}
    return Case(f, {"w": W}, (X, Y), wanted, rtol=1e-3)


@case
def square_both_ways():
    """W and its transpose are two matrices, also where they have one shape."""

    def f(w, x):
        return x @ w["w"] + (3 * x - 1) @ w["w"].T

    return Case(f, {"w": SQUARE}, (X,), {"w": (SQUARE.T, X), "w#2": (SQUARE, 3 * X - 1)})


@case
def tied_embedding():
    def f(w, ids):
        return jnp.tanh(w["e"][ids]) @ w["e"].T

    E, ids = normal(7, 11, N), np.arange(8) % 5
    return Case(f, {"e": E}, (ids,), {"e": (E, tanh(E[ids]))})


def fused(cut) -> Case:
    def f(w, x):
        q, k, v = cut(w["qkv"])
        return x @ q, x @ k, x @ v

    A = normal(7, N, 12)
    names = [f"qkv[:, {a}:{a + 4}]" for a in (0, 4, 8)]
    return Case(
        f,
        {"qkv": A},
        (X,),
        {name: (A[:, 4 * i : 4 * i + 4].T, X) for i, name in enumerate(names)},
    )


cases(
    fused_sliced=lambda: fused(lambda a: (a[:, :4], a[:, 4:8], a[:, 8:])),
    fused_split=lambda: fused(lambda a: jnp.split(a, 3, axis=1)),
    fused_split_in_jit=lambda: fused(jax.jit(lambda a: jnp.split(a, 3, axis=1))),
    fused_dynamic_slice=lambda: fused(
        lambda a: [jax.lax.dynamic_slice_in_dim(a, 4 * i, 4, axis=1) for i in range(3)]
    ),
    fused_ellipsis=lambda: fused(lambda a: [a[..., 4 * i : 4 * i + 4] for i in range(3)]),
)


def unrolled(pick, name="w[{}]".format) -> Case:
    def f(w, h):
        for i in range(L):
            h = jnp.tanh(h @ pick(w["w"], i))
        return h

    return Case(f, {"w": S}, (X,), {name(i): row for i, row in enumerate(layers(S))})


def numbered(i: int) -> str:
    """The names of parts whose index the program computes."""
    return f"w#{i + 1}" if i else "w"


def dynamic(i: int) -> str:
    """JAX 0.10.0 writes the index of `dynamic_index_in_dim` as a number."""
    return f"w[{i}]" if jax.__version__ == "0.10.0" else numbered(i)


def layers(stack, h=X, reverse=False) -> list:
    """(W, X) of h = tanh(h W) layer by layer."""
    stack, h, rows = *f64(stack, h), []
    for w in stack[::-1] if reverse else stack:
        rows.append((w.T, h))
        h = tanh(h @ w)
    return rows[::-1] if reverse else rows


cases(
    unrolled=lambda: unrolled(lambda w, i: w[i]),
    unrolled_numpy_index=lambda: unrolled(lambda w, i: w[np.int64(i)]),
    unrolled_negative=lambda: unrolled(lambda w, i: w[i - L]),
    unrolled_iterated=lambda: unrolled(lambda w, i: list(w)[i]),
    unrolled_index_in_dim=lambda: unrolled(lambda w, i: jax.lax.index_in_dim(w, i, keepdims=False)),
    unrolled_dynamic_index=lambda: unrolled(
        lambda w, i: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), dynamic
    ),
    unrolled_take=lambda: unrolled(lambda w, i: jnp.take(w, i, axis=0), numbered),
    unrolled_computed=lambda: unrolled(lambda w, i: w[jnp.int32(i) * 1], numbered),
    unrolled_unstack=lambda: unrolled(lambda w, i: jnp.unstack(w)[i]),
)


@case
def strided():
    def f(w, x):
        return x @ w["w"][:, ::2], x @ w["w"][:, 1::2], x @ w["w"]

    A = normal(7, N, 8)
    wanted = {"w": (A.T, X), "w[:, ::2]": (A[:, ::2].T, X), "w[:, 1::2]": (A[:, 1::2].T, X)}
    return Case(f, {"w": A}, (X,), wanted)


@case
def reversed_rows():
    """W with its inputs in another order is another matrix."""

    def f(w, x):
        return x @ w["w"][::-1]

    return Case(f, {"w": W}, (X,), {"w": (W[::-1].T, X)})


@case
def concatenated():
    def f(w, x):
        return x @ jnp.concatenate([w["a"], w["b"]], axis=1)

    A, B = normal(7, N, 4), normal(8, N, 3)
    return Case(f, {"a": A, "b": B}, (X,), {"a": (np.concatenate([A, B], 1).T, X)})


# --- jit, vmap, remat ---------------------------------------------------------------------------


def mlp(wrap: Callable = lambda f: f, **more) -> Case:
    """Two layers, the function around them or each of them wrapped."""
    block = wrap(lambda w, x: jnp.tanh(x @ w))

    def f(w, x):
        return block(w["down"], block(w["up"], x))

    w, x = f64(W, X)
    wanted = {"up": (W.T, X), "down": (V.T, tanh(x @ w))}
    return Case(f, {"up": W, "down": V}, (X,), wanted, **more)


POLICIES = jax.checkpoint_policies


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *a: jax.vjp(f, *a), lambda back, ct: back(ct))
    return g


def filter_custom_vjp(f):
    g = eqx.filter_custom_vjp(lambda a: f(*a))
    g.def_fwd(lambda perturbed, a: (f(*a), None))
    g.def_bwd(lambda residuals, ct, perturbed, a: jax.vjp(f, *a)[1](ct))
    return lambda w, x: g((w, x))


def custom_vmap(f):
    g = jax.custom_batching.custom_vmap(f)

    @g.def_vmap
    def _(size, batched, w, x):
        return jax.vmap(f, [0 if b else None for b in batched])(w, x), True

    return g


def closed(f):
    def g(w, x):
        converted, consts = jax.closure_convert(lambda x: f(w, x), x)
        return converted(x, *consts)

    return g


def in_scan_of_one(f):
    return lambda w, x: jax.lax.scan(lambda _, x: (None, f(w, x)), None, x[None])[1][0]


cases(
    jit_inside=lambda: mlp(jax.jit),
    jit_jit=lambda: mlp(lambda f: jax.jit(jax.jit(f))),
    jit_inline=lambda: mlp(lambda f: jax.jit(f, inline=True)),
    jit_donate=lambda: mlp(lambda f: jax.jit(lambda w, x: f(w, x), keep_unused=True)),
    filter_jit=lambda: mlp(eqx.filter_jit),
    named_call=lambda: mlp(lambda f: jax.named_call(f, name="block")),
    named_scope=lambda: mlp(jax.named_scope("block")),
    remat=lambda: mlp(jax.checkpoint),
    remat_no_cse=lambda: mlp(lambda f: jax.checkpoint(f, prevent_cse=False)),
    remat_dots=lambda: mlp(lambda f: jax.checkpoint(f, policy=POLICIES.dots_saveable)),
    remat_nothing=lambda: mlp(lambda f: jax.checkpoint(f, policy=POLICIES.nothing_saveable)),
    remat_everything=lambda: mlp(lambda f: jax.checkpoint(f, policy=POLICIES.everything_saveable)),
    remat_remat=lambda: mlp(lambda f: jax.checkpoint(jax.checkpoint(f))),
    remat_names=lambda: mlp(
        lambda f: jax.checkpoint(
            lambda w, x: checkpoint_name(f(w, x), "h"),
            policy=POLICIES.save_only_these_names("h"),
        )
    ),
    remat_offloaded=lambda: mlp(
        lambda f: jax.checkpoint(
            lambda w, x: checkpoint_name(f(w, x), "h"),
            policy=POLICIES.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["h"],
                offload_src="device",
                offload_dst="pinned_host",
            ),
        )
    ),
    filter_checkpoint=lambda: mlp(eqx.filter_checkpoint),
    custom_jvp=lambda: mlp(custom_jvp),
    custom_vjp=lambda: mlp(custom_vjp),
    custom_vjp_in_remat=lambda: mlp(lambda f: jax.checkpoint(custom_vjp(f))),
    remat_in_custom_vjp=lambda: mlp(lambda f: custom_vjp(jax.checkpoint(f))),
    custom_vjp_in_custom_jvp=lambda: mlp(lambda f: custom_jvp(custom_jvp(f))),
    custom_jvp_in_jit=lambda: mlp(lambda f: jax.jit(custom_jvp(jax.jit(f)))),
    filter_custom_vjp=lambda: mlp(filter_custom_vjp),
    custom_vmap=lambda: mlp(custom_vmap, differentiable=False),
    sequential_vmap=lambda: mlp(jax.custom_batching.sequential_vmap, differentiable=False),
    closure_convert=lambda: mlp(closed),
    scan_of_one=lambda: mlp(in_scan_of_one),
    vmap_data=lambda: mlp(lambda f: jax.vmap(f, (None, 0))),
    vmap_data_last=lambda: mlp(lambda f: lambda w, x: jax.vmap(f, (None, 1), 1)(w, x.T).T),
    vmap_remat=lambda: mlp(lambda f: jax.vmap(jax.checkpoint(f), (None, 0))),
    vmap_custom_vjp=lambda: mlp(lambda f: jax.vmap(custom_vjp(f), (None, 0))),
    vmap_custom_vmap=lambda: mlp(
        lambda f: jax.vmap(custom_vmap(f), (None, 0)), differentiable=False
    ),
    lax_map=lambda: mlp(lambda f: lambda w, x: jax.lax.map(lambda x: f(w, x), x)),
    lax_map_batched=lambda: mlp(
        lambda f: lambda w, x: jax.lax.map(lambda x: f(w, x), x, batch_size=3)
    ),
    filter_vmap=lambda: mlp(lambda f: eqx.filter_vmap(f, in_axes=(None, 0))),
    vectorize=lambda: mlp(lambda f: jnp.vectorize(f, signature="(n,m),(n)->(m)")),
    while_once=lambda: mlp(lambda f: lambda w, x: looped(f, w, x), differentiable=False),
    cond=lambda: mlp(
        lambda f: lambda w, x: jax.lax.cond(x[0, 0] < 9, f, lambda w, x: 2 * f(w, x), w, x)
    ),
    noinline=lambda: mlp(lambda f: jax.jit(f, compiler_options={})),
    remat_static=lambda: mlp(
        lambda f: lambda w, x: jax.checkpoint(lambda s, w, x: f(w, x), static_argnums=0)(1, w, x)
    ),
)


def looped(f, w, x):
    """f once, by a while loop whose trip count is not known."""
    shape = jax.eval_shape(f, w, x)
    zero = jnp.zeros(shape.shape, shape.dtype)
    once = lambda state: (state[0] + 1, f(w, x))  # noqa: E731
    return jax.lax.while_loop(lambda s: s[0] < 1 + jnp.int32(0 * x[0, 0]), once, (0, zero))[1]


@case
def vmap_inside_over_weights():
    """Every token axis beside its own matrix: a stack."""

    def f(w, x):
        return jax.vmap(lambda w, x: x @ w)(w["w"], x)

    A, Y = normal(7, 4, N, M), normal(8, 4, T, N)
    return Case(f, {"w": A}, (Y,), {"w": [(a.T, y) for a, y in zip(A, Y, strict=True)]})


@case
def vmap_inside_over_weights_alone():
    def f(w, x):
        return jax.vmap(lambda w: x @ w)(w["w"])

    A = normal(7, 4, N, M)
    return Case(f, {"w": A}, (X,), {"w": (A.transpose(0, 2, 1).reshape(-1, N), X)})


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_vmap_outside(jit):
    A, Y = jnp.asarray(normal(7, 4, N, M)), jnp.asarray(normal(8, 4, T, N))
    f = jlar.capture(lambda w, x: jnp.tanh(x @ w["w"]))
    rows = [(a.T, y) for a, y in zip(A, Y, strict=True)]
    _, lars = jit(jax.vmap(f))({"w": A}, Y)
    assert_seen(lars, {"w": rows})
    _, lars = jit(jax.vmap(f, (None, 0)))({"w": A[0]}, Y)
    assert_seen(lars, {"w": [(A[0].T, y) for y in Y]})
    _, lars = jit(jax.vmap(f, (0, None)))({"w": A}, Y[0])
    assert_seen(lars, {"w": [(a.T, Y[0]) for a in A]})
    _, lars = jit(jax.vmap(jax.vmap(f, (None, 0)), (0, None)))({"w": A}, Y)
    assert_seen(lars, {"w": [[(a.T, y) for y in Y] for a in A]})
    _, lars = jit(jax.vmap(f, axis_size=4, in_axes=({"w": 2}, 1)))(
        {"w": A.transpose(1, 2, 0)}, Y.transpose(1, 0, 2)
    )
    assert_seen(lars, {"w": rows})


# --- loops --------------------------------------------------------------------------------------


def stack(f, wanted=None, **more) -> Case:
    return Case(f, {"w": S}, (X,), {"w": layers(S)} if wanted is None else wanted, **more)


def layer(h, w):
    return jnp.tanh(h @ w), None


cases(
    scan_rows=lambda: stack(lambda w, h: jax.lax.scan(layer, h, w["w"])[0]),
    scan_reverse=lambda: stack(
        lambda w, h: jax.lax.scan(layer, h, w["w"], reverse=True)[0], {"w": layers(S, X, True)}
    ),
    scan_unroll=lambda: stack(lambda w, h: jax.lax.scan(layer, h, w["w"], unroll=2)[0]),
    scan_unroll_all=lambda: stack(lambda w, h: jax.lax.scan(layer, h, w["w"], unroll=True)[0]),
    scan_remat=lambda: stack(lambda w, h: jax.lax.scan(jax.checkpoint(layer), h, w["w"])[0]),
    scan_jit=lambda: stack(lambda w, h: jax.lax.scan(jax.jit(layer), h, w["w"])[0]),
    scan_custom_vjp=lambda: stack(
        lambda w, h: jax.lax.scan(
            lambda h, w: (custom_vjp(lambda h, w: jnp.tanh(h @ w))(h, w), None), h, w["w"]
        )[0]
    ),
    scan_in_remat=lambda: stack(
        lambda w, h: jax.checkpoint(lambda h, w: jax.lax.scan(layer, h, w)[0])(h, w["w"])
    ),
    scan_in_jit=lambda: stack(jax.jit(lambda w, h: jax.lax.scan(layer, h, w["w"])[0])),
    scan_by_counter=lambda: stack(
        lambda w, h: jax.lax.scan(lambda h, i: layer(h, w["w"][i]), h, jnp.arange(L))[0]
    ),
    scan_by_carried_counter=lambda: stack(
        lambda w, h: jax.lax.scan(
            lambda c, _: ((c[0] + 1, layer(c[1], w["w"][c[0]])[0]), None), (0, h), length=L
        )[0][1]
    ),
    fori_by_counter=lambda: stack(
        lambda w, h: jax.lax.fori_loop(0, L, lambda i, h: layer(h, w["w"][i])[0], h)
    ),
    fori_by_counter_unrolled=lambda: stack(
        lambda w, h: jax.lax.fori_loop(0, L, lambda i, h: layer(h, w["w"][i])[0], h, unroll=True),
    ),
    scan_emitted=lambda: stack(
        lambda w, h: jax.lax.scan(
            layer, h, jax.lax.scan(lambda _, w: (None, 2 * w), None, w["w"])[1]
        )[0],
        {"w": layers(2 * S)},
    ),
    scan_carried_weights=lambda: stack(
        lambda w, h: jax.lax.scan(
            lambda c, w: ((c[0], layer(c[1], w)[0] @ c[0]), None), (w["v"], h), w["w"]
        )[0][1],
    )._replace(weights={"w": S, "v": SQUARE}, seen=carried()),
    scan_carried_weights_jit=lambda: stack(
        lambda w, h: jax.lax.scan(
            jax.jit(lambda c, w: ((c[0], layer(c[1], w)[0] @ c[0]), None)), (w["v"], h), w["w"]
        )[0][1],
    )._replace(weights={"w": S, "v": SQUARE}, seen=carried()),
    scan_carried_weights_remat=lambda: stack(
        lambda w, h: jax.lax.scan(
            jax.checkpoint(lambda c, w: ((c[0], layer(c[1], w)[0] @ c[0]), None)),
            (w["v"], h),
            w["w"],
        )[0][1],
    )._replace(weights={"w": S, "v": SQUARE}, seen=carried()),
    scan_closed_over_jit=lambda: stack(
        lambda w, h: jax.lax.scan(jax.jit(lambda h, u: (layer(h, u)[0] @ w["v"], None)), h, w["w"])[
            0
        ],
    )._replace(weights={"w": S, "v": SQUARE}, seen=carried()),
    scan_empty=lambda: stack(
        lambda w, h: jax.lax.scan(lambda h, w: (h @ w, None), h @ w["v"], w["w"][:0])[0]
    )._replace(weights={"w": S, "v": SQUARE}, seen={"v": (SQUARE.T, X), "w[0:0]": []}),
    scan_empty_pooled=lambda: stack(
        lambda w, h: jax.lax.scan(lambda h, _: (h @ w["v"], None), h, None, length=0)[0]
    )._replace(weights={"v": SQUARE}, seen={"v": None}),
    scan_slices=lambda: stack(
        lambda w, h: jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w[:, :N]) + h @ w[:, N:], None), h, w["w"]
        )[0]
    )._replace(weights={"w": np.concatenate([S, S], 2)}, seen=sliced()),
)


def carried():
    h, v = f64(X, SQUARE)
    rows, pooled = [], []
    for w in f64(S)[0]:
        rows.append((w.T, h))
        pooled.append(tanh(h @ w))
        h = pooled[-1] @ v
    return {"w": rows, "v": (v.T, np.concatenate(pooled))}


def sliced():
    (h,), rows = f64(X), []
    for w in f64(S)[0]:
        rows.append((w.T, h))
        h = tanh(h @ w) + h @ w
    return {"w[:, 0:6]": rows, "w[:, 6:12]": rows}


@case
def recurrent():
    """One matrix of the carry and one of the inputs, pooled over time."""

    def f(w, xs):
        def step(h, x):
            h = jnp.tanh(x @ w["x"] + h @ w["h"])
            return h, h

        return jax.lax.scan(step, jnp.zeros((2, M)), xs)[1]

    Y, U = normal(8, T, 2, N), normal(9, M, M)
    h, hs = np.zeros((2, M)), []
    for x in f64(Y)[0]:
        hs.append(h)
        h = tanh(x @ W + h @ U)
    return Case(f, {"x": W, "h": U}, (Y,), {"x": (W.T, Y), "h": (U.T, np.stack(hs))})


@case
def learned_initial_state():
    def f(w, xs):
        def step(h, x):
            return jnp.tanh(x @ w["x"] + h @ w["h"]), None

        return jax.lax.scan(step, w["h0"], xs)[0]

    Y, U, h0 = normal(8, T, 2, N), normal(9, M, M), normal(10, 2, M)
    h, hs = f64(h0)[0], []
    for x in f64(Y)[0]:
        hs.append(h)
        h = tanh(x @ W + h @ U)
    weights = {"x": W, "h": U, "h0": h0}
    return Case(f, weights, (Y,), {"x": (W.T, Y), "h": (U.T, np.stack(hs))})


def nest(w, h, inner=lambda f: f):
    def outer(h, ws):
        block, shared = ws

        def one(h, w):
            return jnp.tanh(h @ w @ shared), None

        return jax.lax.scan(inner(one), h, block)[0] @ w["all"], None

    return jax.lax.scan(outer, h, (w["both"], w["outer"]))[0]


def nested():
    both, outer, every = normal(11, 2, 3, N, N), normal(12, 2, N, N), normal(13, N, N)
    (h,), seen = f64(X), {"both": [], "outer": [], "all": []}
    for block, shared in zip(*f64(both, outer), strict=True):
        rows, pooled = [], []
        for w in block:
            rows.append((w.T, h))
            pooled.append(h @ w)
            h = tanh(h @ w @ shared)
        seen["both"].append(rows)
        seen["outer"].append((shared.T, np.concatenate(pooled)))
        seen["all"].append(h)
        h = h @ every
    seen["all"] = (every.T, np.concatenate(seen["all"]))
    return {"both": both, "outer": outer, "all": every}, seen


cases(
    scan_nested=lambda: Case(nest, nested()[0], (X,), nested()[1]),
    scan_nested_remat=lambda: Case(
        partial(nest, inner=jax.checkpoint), nested()[0], (X,), nested()[1]
    ),
)


def repeated(times: int, weights=SQUARE) -> tuple:
    h, w, xs = *f64(X, weights), []
    for _ in range(times):
        xs.append(h)
        h = tanh(h @ w)
    return w.T, np.concatenate(xs)


def pooled(f, times=4, **more) -> Case:
    return Case(f, {"w": SQUARE}, (X,), {"w": repeated(times)}, **more)


def eqx_loop(kind, **more):
    def f(w, x):
        return eqxi.while_loop(
            lambda s: s[0] < 4,
            lambda s: (s[0] + 1, layer(s[1], w["w"])[0]),
            (jnp.int32(0), x),
            kind=kind,
            **more,
        )[1]

    return f


cases(
    scan_pooled=lambda: pooled(
        lambda w, h: jax.lax.scan(lambda h, _: layer(h, w["w"]), h, None, length=4)[0]
    ),
    fori_static=lambda: pooled(
        lambda w, h: jax.lax.fori_loop(0, 4, lambda _, h: layer(h, w["w"])[0], h)
    ),
    fori_dynamic=lambda: Case(
        lambda w, h, n: jax.lax.fori_loop(0, n, lambda _, h: layer(h, w["w"])[0], h),
        {"w": SQUARE},
        (X, jnp.int32(4)),
        {"w": repeated(4)},
        differentiable=False,
    ),
    fori_never=lambda: Case(
        lambda w, h, n: jax.lax.fori_loop(0, n, lambda _, h: layer(h, w["w"])[0], h),
        {"w": SQUARE},
        (X, jnp.int32(0)),
        {"w": None},
        differentiable=False,
    ),
    while_loop=lambda: pooled(
        lambda w, h: jax.lax.while_loop(
            lambda s: s[0] < 4, lambda s: (s[0] + 1, layer(s[1], w["w"])[0]), (0, h)
        )[1],
        differentiable=False,
    ),
    while_weights_carried=lambda: pooled(
        lambda w, h: jax.lax.while_loop(
            lambda s: s[0] < 4,
            lambda s: (s[0] + 1, layer(s[1], s[2])[0], s[2]),
            (0, h, w["w"]),
        )[1],
        differentiable=False,
    ),
    while_in_scan=lambda: Case(
        lambda w, h: jax.lax.scan(
            lambda h, u: (
                jax.lax.fori_loop(0, jnp.int32(h[0, 0] * 0) + 2, lambda _, h: layer(h, u)[0], h),
                None,
            ),
            h,
            w["w"],
        )[0],
        {"w": S},
        (X,),
        {"w": twice_each()},
        differentiable=False,
    ),
    eqx_checkpointed=lambda: pooled(eqx_loop("checkpointed", checkpoints=2)),
    eqx_checkpointed_bounded=lambda: pooled(eqx_loop("checkpointed", max_steps=8)),
    eqx_bounded=lambda: pooled(eqx_loop("bounded", max_steps=8)),
    eqx_lax=lambda: pooled(eqx_loop("lax"), differentiable=False),
)


@pytest.mark.parametrize(
    "f",
    [
        lambda w, h: jax.lax.while_loop(
            lambda s: s[0] < L, lambda s: (s[0] + 1, layer(s[1], w["w"][s[0]])[0]), (0, h)
        )[1],
        lambda w, h: eqxi.scan(layer, h, w["w"], kind="checkpointed", checkpoints="all")[0],
    ],
    ids=["while", "eqx scan"],
)
def test_while_over_a_stack_pools_its_layers(f):
    """As rows are of unknown number there, the layers are one sum, of their mean ||W||^2."""
    _, lars = jax.jit(jlar.capture(f))({"w": jnp.asarray(S)}, jnp.asarray(X))
    uses = layers(S)
    y, x = sum(np.sum((h @ w.T) ** 2) for w, h in uses), sum(np.sum(h**2) for _, h in uses)
    w = np.mean([np.sum(w**2) for w, _ in uses])
    assert lars["w"].lar.shape == () and lars["w"].count == L * T
    wanted = 1 + np.log(y / (x * w)) / np.log(N) / 2
    np.testing.assert_allclose(lars["w"].lar, wanted, rtol=1e-5)


def twice_each():
    (h,), rows = f64(X), []
    for w in f64(S)[0]:
        rows.append((w.T, np.concatenate([h, tanh(h @ w)])))
        h = tanh(tanh(h @ w) @ w)
    return rows


# --- branches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch_with_other_sites_in_each_branch(index, jit):
    def f(w, i, x):
        branches = [
            lambda x: jnp.sum(x @ w["a"]),
            lambda x: jnp.sum(jnp.tanh(x @ w["a"]) @ w["b"]),
            lambda x: jnp.sum(x),
        ]
        return jax.lax.switch(i, branches, x)

    w, (x, a) = {"a": jnp.asarray(W), "b": jnp.asarray(V)}, f64(X, W)
    seen = {"a": (W.T, X) if index < 2 else None, "b": (V.T, tanh(x @ a)) if index == 1 else None}
    (value, lars), grad = jit(jax.value_and_grad(jlar.capture(f), has_aux=True))(
        w, jnp.int32(index), jnp.asarray(X)
    )
    assert_seen(lars, seen)
    close((value, grad), jit(jax.value_and_grad(f))(w, jnp.int32(index), jnp.asarray(X)))


@case
def cond_in_scan():
    """Layers that are skipped, and one of two stacks."""

    def f(w, h):
        def step(h, xs):
            w, v, skip = xs
            return jax.lax.cond(skip, lambda h: h @ v, lambda h: jnp.tanh(h @ w), h), None

        return jax.lax.scan(step, h, (w["w"], w["v"], jnp.asarray([False, True, False])))[0]

    B = normal(14, L, N, N)
    x, s, b = f64(X, S, B)
    h1 = tanh(x @ s[0])
    seen = {
        "w": [(S[0].T, X), None, (S[2].T, h1 @ b[1])],
        "v": [None, (B[1].T, h1), None],
    }
    return Case(f, {"w": S, "v": B}, (X,), seen)


@case
def switch_of_stacked_sites():
    def f(w, h):
        def many(h):
            return jax.lax.scan(layer, h, w["w"])[0]

        return jax.lax.switch(jnp.int32(h[0, 0] * 0) + 1, [lambda h: h, many], h)

    return Case(f, {"w": S}, (X,), {"w": layers(S)})


@case
def cond_chooses_a_weight_by_number():
    def f(w, x):
        return x @ jax.lax.cond(True, lambda: w["a"], lambda: w["b"])

    return Case(f, {"a": W, "b": W}, (X,), {"a": (W.T, X)})


@pytest.mark.parametrize("index", [0, 1])
def test_cond_under_vmap(index):
    """Outside: by example; what was not chosen counts nothing."""

    def f(w, i, x):
        return jax.lax.cond(i == 0, lambda x: x @ w["a"], lambda x: 2 * x @ w["b"], x)

    w = {"a": jnp.asarray(W), "b": jnp.asarray(W)}
    Y = jnp.asarray(normal(8, 2, T, N))
    i = jnp.array([index, 1 - index])
    _, lars = jax.vmap(jlar.capture(f), (None, 0, 0))(w, i, Y)
    uses = [(W.T, Y[0]), None], [None, (W.T, 2 * Y[1])]
    seen = dict(zip("ab", uses, strict=True))
    if index:
        seen = {"a": [None, (W.T, Y[1])], "b": [(W.T, 2 * Y[0]), None]}
    assert_seen(lars, seen)


# --- experts ------------------------------------------------------------------------------------

EXPERTS = normal(15, 4, N, M)


@case
def experts_by_einsum():
    D = normal(16, 4, 3, N)
    return Case(
        lambda w, x: jnp.einsum("ecn,enm->ecm", x, w["w"]),
        {"w": EXPERTS},
        (D,),
        {"w": [(w.T, x) for w, x in zip(EXPERTS, D, strict=True)]},
    )


def ragged_case(sizes, transposed=False, **more) -> Case:
    def f(w, x, sizes):
        if transposed:
            numbers = jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((1,), (2,)), ((), ())),
                lhs_ragged_dimensions=[0],
                rhs_group_dimensions=[0],
            )
            return jax.lax.ragged_dot_general(x, w["w"], sizes, numbers)
        return jax.lax.ragged_dot(x, w["w"], sizes)

    D, ends = normal(17, 10, N), np.cumsum([0, *sizes])
    seen = [
        (w.T, D[a:b]) if b > a else None
        for w, a, b in zip(EXPERTS, ends[:-1], ends[1:], strict=True)
    ]
    weights = EXPERTS.transpose(0, 2, 1) if transposed else EXPERTS
    return Case(f, {"w": weights}, (D, np.asarray(sizes, np.int32)), {"w": seen}, **more)


cases(
    ragged=lambda: ragged_case([3, 2, 4, 1]),
    ragged_empty=lambda: ragged_case([3, 0, 7, 0]),
    ragged_first_empty=lambda: ragged_case([0, 0, 10, 0]),
    ragged_not_all=lambda: ragged_case([3, 0, 2, 1]),
    ragged_transposed=lambda: ragged_case([3, 0, 2, 1], transposed=True, differentiable=False),
)


# --- convolutions -------------------------------------------------------------------------------


def patches(x, kernel, strides, padding, x_dilation, w_dilation):
    """x (b, c, *space) as (tokens, c x kernel), one loop per output."""
    (x,), rank = f64(x), len(kernel)
    dilated = [d * (s - 1) + 1 for s, d in zip(x.shape[2:], x_dilation, strict=True)]
    big = np.zeros((*x.shape[:2], *dilated))
    big[(..., *(slice(None, None, d) for d in x_dilation))] = x
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, w_dilation, strict=True)]
    if padding == "SAME":
        out = [-(-s // t) for s, t in zip(dilated, strides, strict=True)]
        need = [
            max((o - 1) * t + r - s, 0)
            for o, t, r, s in zip(out, strides, reach, dilated, strict=True)
        ]
        padding = [(p // 2, p - p // 2) for p in need]
    elif padding == "VALID":
        padding = [(0, 0)] * rank
    big = np.pad(big, [(0, 0), (0, 0), *padding])
    out = [(s - r) // t + 1 for s, r, t in zip(big.shape[2:], reach, strides, strict=True)]
    rows = []
    for b in range(big.shape[0]):
        for at in np.ndindex(*out):
            window = tuple(
                slice(i * t, i * t + r, d)
                for i, t, r, d in zip(at, strides, reach, w_dilation, strict=True)
            )
            rows.append(big[(b, slice(None), *window)])
    return np.stack(rows)


def convolution(
    rank=2,
    layout="first",
    strides=1,
    padding="VALID",
    x_dilation=1,
    w_dilation=1,
    groups=1,
    channels=4,
    out=6,
    **more,
) -> Case:
    space, kernel = (9, 8)[:rank], (3, 2)[:rank]
    full = lambda a: (a,) * rank if isinstance(a, int) else a  # noqa: E731
    strides, x_dilation, w_dilation = map(full, (strides, x_dilation, w_dilation))
    x, w = normal(20, 2, channels, *space), normal(21, out, channels // groups, *kernel)
    letters = "HW"[:rank]
    names = ("NC" + letters, "OI" + letters, "NC" + letters)
    if layout == "last":
        names = ("N" + letters + "C", letters + "IO", "N" + letters + "C")

    def arranged(a, to, base):
        return np.transpose(a, [base.index(c) for c in to])

    def f(weights, x):
        return jax.lax.conv_general_dilated(
            x, weights["w"], strides, padding, x_dilation, w_dilation, names, groups
        )

    P = patches(x, kernel, strides, padding, x_dilation, w_dilation)
    P = P.reshape(len(P), groups, -1)
    A = w.reshape(groups, out // groups, -1)
    rows = [(A[g], P[:, g]) for g in range(groups)]
    return Case(
        f,
        {"w": arranged(w, names[1], "OI" + letters)},
        (arranged(x, names[0], "NC" + letters),),
        {"w": rows if groups > 1 else rows[0]},
        **more,
    )


CONVOLUTIONS = dict(
    conv=dict(),
    conv_last=dict(layout="last"),
    conv_strides=dict(strides=(2, 3)),
    conv_same=dict(padding="SAME"),
    conv_same_strides=dict(padding="SAME", strides=2, layout="last"),
    conv_padding=dict(padding=[(2, 0), (1, 3)]),
    conv_dilated=dict(w_dilation=(2, 3)),
    conv_transposed=dict(x_dilation=(2, 3), padding=[(2, 2), (1, 1)]),
    conv_groups=dict(groups=2),
    conv_groups_last=dict(groups=2, layout="last", strides=2),
    conv_depthwise=dict(groups=4, out=4),
    conv_depthwise_multiplier=dict(groups=4, out=8, layout="last"),
    conv_1d=dict(rank=1),
    conv_1d_last=dict(rank=1, layout="last", padding="SAME", strides=2),
    conv_1d_causal_depthwise=dict(rank=1, groups=4, out=4, padding=[(2, 0)]),
)
cases(**{name: partial(convolution, **options) for name, options in CONVOLUTIONS.items()})


@case
def conv_eqx():
    conv = eqx.nn.Conv2d(4, 6, 3, stride=2, padding=1, key=jax.random.key(0))
    x = normal(20, 2, 4, 9, 8)
    P = patches(x, (3, 3), (2, 2), [(1, 1), (1, 1)], (1, 1), (1, 1))
    seen = {"weight": (np.asarray(conv.weight).reshape(6, -1), P.reshape(len(P), -1))}
    return Case(lambda conv, x: jax.vmap(conv)(x), conv, (x,), seen)


@case
def conv_flax():
    import flax.linen as nn

    conv = nn.Conv(6, (3, 3), strides=2, padding="SAME")
    x = normal(20, 2, 9, 8, 4)
    with jax.numpy_dtype_promotion("standard"):
        weights = conv.init(jax.random.key(0), jnp.asarray(x))
    P = patches(x.transpose(0, 3, 1, 2), (3, 3), (2, 2), "SAME", (1, 1), (1, 1))
    kernel = np.asarray(weights["params"]["kernel"])
    seen = {"params.kernel": (kernel.transpose(3, 2, 0, 1).reshape(6, -1), P.reshape(len(P), -1))}
    return Case(conv.apply, weights, (x,), seen)


@case
def conv_per_example_kernels():
    """vmap over kernels and images, which JAX makes groups of."""

    def f(w, x):
        one = lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), "VALID")  # noqa: E731
        return jax.vmap(one)(w["w"], x)

    x, w = normal(20, 3, 2, 4, 9, 8), normal(21, 3, 6, 4, 3, 2)
    P = [patches(a, (3, 2), (1, 1), "VALID", (1, 1), (1, 1)) for a in x]
    seen = [(w[i].reshape(6, -1), P[i].reshape(len(P[i]), -1)) for i in range(3)]
    return Case(f, {"w": w}, (x,), {"w": seen})


@case
def conv_scanned():
    def f(w, x):
        def step(x, w):
            return jnp.tanh(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME")), None

        return jax.lax.scan(step, x, w["w"])[0]

    x, w = normal(20, 2, 4, 5, 6), normal(21, 2, 4, 4, 3, 3)
    rows, h = [], f64(x)[0]
    for a in f64(w)[0]:
        P = patches(h, (3, 3), (1, 1), "SAME", (1, 1), (1, 1))
        P = P.reshape(len(P), -1)
        rows.append((a.reshape(4, -1), P))
        h = tanh(P @ a.reshape(4, -1).T).reshape(2, 5, 6, 4).transpose(0, 3, 1, 2)
    return Case(f, {"w": w}, (x,), {"w": rows})


# --- the table itself ---------------------------------------------------------------------------


EAGER = (
    "two matrices",
    "cond",
    "custom jvp",
    "custom vjp",
    "eqx checkpointed",
    "remat dots",
    "scan nested remat",
    "while loop",
    "ragged not all",
    "conv groups",
)


# Of constructs that differ in shapes alone, one is differentiated.
FORWARD = {
    *(name for name in CASES if name.startswith(("conv ", "unrolled", "fused", "ragged "))),
    *("one array", "left", "one token", "vector", "vector scalar", "scalar outputs"),
    *("many token axes", "tokens last", "heads", "two stacked axes", "float16", "scaled"),
    *("jit jit", "jit inline", "jit donate", "filter jit", "named call", "named scope", "noinline"),
    *("vmap data last", "vectorize", "filter vmap", "lax map batched", "scan unroll all"),
} - {"conv groups", "unrolled", "fused split", "ragged empty", "conv flax"}


@pytest.mark.parametrize("name", CASES)
def test_construct(name):
    case = CASES[name]()
    if name in FORWARD:
        case = case._replace(differentiable=False)
    check(*case, eager=name in EAGER)


# --- measures -----------------------------------------------------------------------------------

KINDS = {
    "dot": "two matrices",
    "conv": "conv last",
    "groups": "conv groups last",
    "ragged": "ragged empty",
    "stacked": "experts by einsum",
    "many axes": "dense general",
    "rows": "scan rows",
    "pooled": "scan pooled",
    "nested": "scan nested",
    "branches": "cond in scan",
    "remat": "remat dots",
    "custom": "custom vjp",
}


def arrays(tree):
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, tree)


def leaves_of(use):
    """The uses of a nested list, with the row of each."""
    if not isinstance(use, list):
        return [((), use)]
    return [((i, *row), u) for i, each in enumerate(use) for row, u in leaves_of(each)]


@pytest.mark.parametrize("kind", KINDS)
def test_grams(kind):
    case = CASES[KINDS[kind]]()
    f = jlar.capture(case.f, measure=jlar.grams)
    _, seen = jax.jit(f)(arrays(case.weights), *arrays(case.args))
    assert set(seen) == set(case.seen)
    for name, uses in case.seen.items():
        for row, use in leaves_of(uses):
            grams = jax.tree.map(lambda a, row=row: a[row], seen[name])
            assert grams.count == count_of(use)
            if use is None:
                continue
            w, x = f64(use[0], reference.kept_rows(use[1]))
            calls = float(grams.calls)
            np.testing.assert_allclose(grams.w / calls, w.T @ w, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(grams.x, x.T @ x, rtol=1e-4, atol=1e-5)
            wanted, got = reference.spectra(*use), grams.spectra()
            np.testing.assert_allclose(got.p, wanted.p, rtol=2e-3, atol=2e-6)
            if len(w) >= w.shape[1]:  # else the basis of the null space is arbitrary
                np.testing.assert_allclose(got.q, wanted.q, rtol=2e-3, atol=2e-5)


def third_moments(W, X, Y, mask):
    """Sums over tokens that know which row of X belongs to which of Y."""
    keep = jnp.ones(len(X), X.dtype) if mask is None else mask.astype(X.dtype)
    assert W.shape == (Y.shape[1], X.shape[1]) and len(X) == len(Y) == len(keep)
    return {
        "xy": jnp.einsum("t,tn,tm->nm", keep, X, Y),
        "tokens": jnp.sum(keep),
        "calls": 1,
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("remat", "custom")])
def test_a_measure_of_ones_own(kind):
    case = CASES[KINDS[kind]]()
    f = jlar.capture(case.f, measure=third_moments)
    _, seen = jax.jit(f)(arrays(case.weights), *arrays(case.args))
    assert set(seen) == set(case.seen)
    for name, uses in case.seen.items():
        for row, use in leaves_of(uses):
            if use is None:
                assert seen[name]["tokens"][row] == 0
                continue
            w, x = f64(use[0], reference.kept_rows(use[1]))
            np.testing.assert_allclose(seen[name]["xy"][row], x.T @ x @ w.T, rtol=1e-4, atol=1e-5)
            assert seen[name]["tokens"][row] == len(x)


def test_a_measure_that_returns_numbers_and_nothing():
    def measure(W, X, Y, mask):
        return {"n": 1, "s": 2.0, "none": None}

    def f(w, x, steps):
        x = jax.lax.scan(lambda x, _: (x @ w["a"], None), x, None, length=3)[0]
        x = jax.lax.fori_loop(0, steps, lambda _, x: x @ w["b"], x)
        return jax.lax.cond(steps > 0, lambda x: x @ w["c"], lambda x: x, x)

    w = {name: jnp.asarray(SQUARE) for name in "abc"}
    _, seen = jlar.capture(f, measure=measure)(w, jnp.asarray(X), jnp.int32(2))
    for name, times in {"a": 3, "b": 2, "c": 1}.items():
        assert seen[name]["n"] == times and seen[name]["s"] == 2 * times


# --- masks --------------------------------------------------------------------------------------

KEEP = np.arange(T) % 3 > 0


@pytest.mark.parametrize("measure", [jlar.energies, jlar.grams])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("dot", bool),
        ("dot", np.float32),
        ("dot", np.int32),
        ("dot", np.uint8),
        ("pooled", bool),
        ("rows", bool),
        ("ragged", bool),
        ("ragged", np.float32),
    ],
)
def test_mask(kind, dtype, measure):
    name = {"dot": "two matrices", "ragged": "ragged empty"}.get(kind, f"scan {kind}")
    case = CASES[name]()
    x = np.array(case.args[0])
    keep = np.arange(len(x)) % 3 > 0
    x[~keep] = np.nan
    f = jlar.capture(case.f, mask=jnp.asarray(keep.astype(dtype)), measure=measure)
    args = arrays((x, *case.args[1:]))
    _, seen = jax.jit(f)(arrays(case.weights), *args)
    if kind == "ragged":
        ends = np.cumsum([0, 3, 0, 7, 0])
        masks = [keep[a:b] for a, b in itertools.pairwise(ends)]
        uses = case.seen["w"]
        wanted = {
            "w": [u and (u[0], u[1][k]) for u, k in zip(uses, masks, strict=True)],
        }
    else:
        times = len(case.seen["w"][1]) // T if kind == "pooled" else 1
        kept = lambda u: (u[0], np.asarray(u[1])[np.tile(keep, times)])  # noqa: E731
        wanted = {
            n: list(map(kept, u)) if isinstance(u, list) else kept(u) for n, u in case.seen.items()
        }
    if measure is jlar.grams:
        seen = {name: grams.energies for name, grams in seen.items()}
    assert_seen(seen, wanted)
    rates = np.concatenate([np.ravel(e.keep_rate) for e in seen.values()])
    rates = rates[np.isfinite(rates)]
    if kind != "ragged":
        np.testing.assert_allclose(rates, keep.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((2, 6), (2, 6)), ((2, 6), (12,)), ((2, 2, 3), (2, 6)), ((12, 1), (12,)), ((12,), (1, 12))],
)
def test_mask_of_merged_axes(shape, tokens):
    x, keep = normal(8, *tokens, N), np.arange(12) % 5 > 1
    f = jlar.capture(lambda w, x: x @ w["w"], mask=jnp.asarray(keep.reshape(shape)))
    _, lars = f({"w": jnp.asarray(W)}, jnp.asarray(x))
    assert_seen(lars, {"w": (W.T, x.reshape(12, N)[keep])})


@pytest.mark.parametrize("shape", [(3,), (2, 3), (7, 2), (), (14,)])
def test_mask_that_does_not_fit(shape, unchecked):
    f = jlar.capture(lambda w, x: x @ w["deep"]["w"], mask=jnp.ones(shape))
    with pytest.raises(ValueError, match=r"'deep\.w'.*tokens have shape \(7,\).*where="):
        f({"deep": {"w": jnp.asarray(W)}}, jnp.asarray(X))


def test_mask_that_fits_only_what_is_chosen():
    def f(w, x):
        return jnp.sum(x @ w["a"], axis=0) @ w["b"]

    w = {"a": jnp.asarray(W), "b": jnp.asarray(V)}
    with pytest.raises(ValueError, match=r"'b'"):
        jlar.capture(f, mask=jnp.asarray(KEEP))(w, jnp.asarray(X))
    _, lars = jlar.capture(f, mask=jnp.asarray(KEEP), where="a")(w, jnp.asarray(X))
    assert_seen(lars, {"a": (W.T, X[KEEP])})


def test_all_masked():
    f = jlar.capture(lambda w, x: x @ w, mask=jnp.zeros(T))
    _, lars = f(jnp.asarray(W), jnp.asarray(X))
    assert np.isnan(lars["weights"].lar) and lars["weights"].count == 0


@pytest.mark.parametrize("name", ["conv last", "conv groups", "conv depthwise", "conv transposed"])
def test_mask_of_a_convolution(name):
    """One entry per output position."""
    case = CASES[name]()
    shape = jax.eval_shape(case.f, arrays(case.weights), *arrays(case.args)).shape
    last = name.endswith("last")
    tokens = shape[:-1] if last else (shape[0], *shape[2:])
    keep = np.random.default_rng(0).random(tokens) > 0.4
    f = jlar.capture(case.f, mask=jnp.asarray(keep))
    _, lars = f(arrays(case.weights), *arrays(case.args))
    keep = keep.reshape(-1)
    use = case.seen["w"]
    one = lambda u: (u[0], u[1][keep])  # noqa: E731
    assert_seen(lars, {"w": list(map(one, use)) if isinstance(use, list) else one(use)})


# --- arguments ----------------------------------------------------------------------------------


def block(w, x):
    return jnp.tanh(x @ w["mlp"]["up"] + w["bias"]) @ w["mlp"]["down"] + x @ w["out"]


BLOCK = {
    "mlp": {"up": jnp.asarray(W), "down": jnp.asarray(V)},
    "bias": jnp.asarray(normal(3, M)),
    "out": jnp.asarray(SQUARE),
}


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, {"mlp.up", "mlp.down", "out"}),
        ("mlp.*", {"mlp.up", "mlp.down"}),
        (["*.up", "out"], {"mlp.up", "out"}),
        (("out",), {"out"}),
        (lambda path: path.endswith("down"), {"mlp.down"}),
        ("*", {"mlp.up", "mlp.down", "out"}),
    ],
)
def test_where(where, names):
    value, lars = jlar.capture(block, where=where)(BLOCK, jnp.asarray(X))
    assert set(lars) == names
    close(value, block(BLOCK, jnp.asarray(X)))


@pytest.mark.parametrize("where", ["nothing", [], lambda path: False, "MLP.*"])
def test_where_that_accepts_nothing(where, unchecked):
    with pytest.raises(ValueError, match=r"where=.* accepts none of the 4 paths.*'mlp.up'"):
        jlar.capture(block, where=where)(BLOCK, jnp.asarray(X))


def test_where_that_accepts_no_matrix(unchecked):
    with pytest.raises(ValueError, match=r"nothing to measure(.|\n)*added to data"):
        jlar.capture(block, where="bias")(BLOCK, jnp.asarray(X))


def test_has_aux(unchecked):
    f = jlar.capture(lambda w, x: (jnp.sum(x @ w), {"extra": x}), has_aux=True)
    value, (aux, lars) = f(jnp.asarray(W), jnp.asarray(X))
    assert value.shape == () and aux["extra"].shape == X.shape and set(lars) == {"weights"}
    (value, (aux, lars)), grad = jax.value_and_grad(f, has_aux=True)(jnp.asarray(W), jnp.asarray(X))
    assert grad.shape == W.shape
    for wrong in (lambda w, x: x @ w, lambda w, x: (x @ w,), lambda w, x: [x @ w, x]):
        with pytest.raises(ValueError, match="must return a pair"):
            jlar.capture(wrong, has_aux=True)(jnp.asarray(W), jnp.asarray(X))


def test_paths_that_read_alike():
    """Two leaves whose dotted paths are one string are two matrices."""
    w = {"a": {"b": jnp.asarray(W)}, "a.b": jnp.asarray(normal(9, N, 4)), "c": jnp.asarray(W)}

    def f(w, x):
        return x @ w["a"]["b"], (x + 1) @ w["a.b"], (x + 2) @ w["c"]

    _, lars = jlar.capture(f)(w, jnp.asarray(X))
    assert len(lars) == 3
    got = sorted(float(e.lar) for e in lars.values())
    wanted = [(W.T, X), (normal(9, N, 4).T, X + 1), (W.T, X + 2)]
    np.testing.assert_allclose(got, sorted(map(lar_of, wanted)), rtol=1e-5)


def test_anything_in_the_first_argument():
    w = {
        "w": W,  # a numpy array
        "act": jnp.tanh,
        "scale": 3.0,
        "number": 3,
        "none": None,
        "name": "gelu",
        "flag": True,
        "scalar": jnp.float32(2),
        "numpy scalar": np.float32(2),
        "ids": np.arange(3),
        "key": jax.random.key(0),
        "old key": jax.random.PRNGKey(0),
        "many keys": jax.random.split(jax.random.key(0), 3),
        "empty": jnp.zeros((0, 3)),
        "bool": jnp.ones(M, bool),
    }

    def f(w, x):
        assert w["name"] == "gelu" and w["flag"] is True and w["none"] is None
        noise = jax.random.normal(w["key"], (M,)) + jax.random.normal(w["old key"], (M,))
        noise += jax.random.normal(w["many keys"][1], (M,))
        y = w["act"](x @ w["w"]) * w["scale"] * w["scalar"] + noise
        return {"y": jnp.where(w["bool"], y, 0.0), "fn": w["act"], "number": w["number"], "n": None}

    value, lars = jlar.capture(f)(w, jnp.asarray(X))
    assert_seen(lars, {"w": (W.T, X)})
    assert value["fn"] is jnp.tanh and value["number"] == 3 and value["n"] is None
    close(value, f({**w, "w": jnp.asarray(W)}, jnp.asarray(X)))


def test_keyword_arguments():
    def f(w, x, *, y, double=False, mode="a"):
        assert mode == "b"
        return (x + y) @ w["w"] * (2 if double else 1)

    value, lars = jlar.capture(f)(
        {"w": jnp.asarray(W)}, x=jnp.asarray(X), y=jnp.asarray(2 * X), double=True, mode="b"
    )
    close(value, 2 * jnp.asarray(3 * X) @ jnp.asarray(W), rtol=1e-5)
    assert_seen(lars, {"w": (W.T, 3 * X)})


def test_numpy_data():
    f = jlar.capture(lambda w, x: x @ w)
    assert_seen(f(W, X)[1], {"weights": (W.T, X)})
    closed = jlar.capture(lambda w: jnp.asarray(X) @ w)
    assert_seen(closed(W)[1], {"weights": (W.T, X)})


def test_other_arguments_are_data():
    """Also where their arrays are what is usually called weights."""
    f = jlar.capture(lambda w, v, x: (x @ v) @ w)
    _, lars = f(jnp.asarray(V), jnp.asarray(W), jnp.asarray(X))
    assert_seen(lars, {"weights": (V.T, np.matmul(*f64(X, W)))})


def test_many_tokens_are_counted():
    """2^25 and some more tokens, which float32 cannot count one by one."""
    tokens, times = 2**19 + 1, 64

    def f(w, x):
        return jax.lax.scan(lambda c, i: (c + jnp.sum((x + i) @ w), None), 0.0, jnp.arange(64.0))[0]

    x = jnp.tile(jnp.asarray([[1.0, -1.0]], jnp.bfloat16), (tokens, 1)).astype(jnp.float32)
    _, lars = jax.jit(jlar.capture(f))(jnp.ones((2, 1)), x)
    assert int(lars["weights"].count) == tokens * times


def test_many_calls_are_counted():
    """More calls than the smaller part of a count holds in float32, 1023 tokens each."""
    x = jnp.ones((1023, 2))

    def f(w, x):
        step = lambda c, _: (c + jnp.sum(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, None, length=2**15 + 1)[0]

    _, lars = jax.jit(jlar.capture(f))(jnp.ones((2, 1)), x)
    assert int(lars["weights"].count) == 1023 * (2**15 + 1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_sums(dtype):
    """Sums far above what float16 holds, and entries of 300, whose squares it does not hold."""
    w, x = jnp.full((64, 8), 10, dtype), jnp.full((4096, 64), 300, dtype)
    _, lars = jax.jit(jlar.capture(lambda w, x: jnp.tanh(x @ (w / 8))))(w, x)
    e = lars["weights"]
    assert e.x.dtype == jnp.float32
    np.testing.assert_allclose(e.x, 4096 * 64 * 300.0**2, rtol=1e-6)
    np.testing.assert_allclose(e.lar, 1, rtol=1e-2)


def test_float8():
    w = jnp.asarray(W).astype(jnp.float8_e4m3fn)

    def f(w, x):
        return x @ (w["w"].astype(jnp.float32) * w["s"])

    _, lars = jax.jit(jlar.capture(f))({"w": w, "s": jnp.float32(0.1)}, jnp.asarray(X))
    assert_seen(lars, {"w": (np.asarray(w.astype(jnp.float32)).T, X)})

    def g(w, x):
        return jax.lax.dot(x.astype(w.dtype), w, preferred_element_type=jnp.float32)

    _, lars = jax.jit(jlar.capture(g))(w, jnp.asarray(X))
    x = jnp.asarray(X).astype(w.dtype).astype(jnp.float32)
    assert_seen(lars, {"weights": (np.asarray(w.astype(jnp.float32)).T, x)})


# --- what cannot be measured --------------------------------------------------------------------

REASONS = {
    "n = 1": (lambda w, x: x[:, :1] * 2 @ w[:1], "n = 1 inputs"),
    "outer": (lambda w, x: jnp.einsum("t,m->tm", x[:, 0], w[0]), "n = 1 inputs"),
    "gain": (lambda w, x: x * w[:, 0], "entry by entry"),
    "bias": (lambda w, x: x + w[:, 0], "a bias"),
    "subtracted": (lambda w, x: x - w[:, 0], "a bias"),
    "embedding": (lambda w, x: w[x[:, 0].astype(jnp.int32)], "embedding"),
    "take": (lambda w, x: jnp.take(w, x[:, 0].astype(jnp.int32), axis=0), "embedding"),
    "complex": (lambda w, x: x.astype(complex) @ w.astype(complex), "complex"),
    "empty": (lambda w, x: x[:0] @ w, "empty"),
    "no outputs": (lambda w, x: x @ w[:, :0], "empty"),
    "not used": (lambda w, x: x, "not used"),
    "never meets data": (lambda w, x: (x, w @ w.T), "never meets data"),
    "callback": (
        lambda w, x: jax.pure_callback(
            lambda w, x: np.asarray(x) @ np.asarray(w),
            jax.ShapeDtypeStruct((T, M), jnp.float32),
            w,
            x,
        ),
        "pure_callback",
    ),
    "pallas": (lambda w, x: pallas(w, x), "Pallas"),
    "solve": (lambda w, x: jnp.linalg.solve(w[:5], x[:5, :1]), "triangular_solve|solve"),
    "condition": (
        lambda w, x: jax.lax.while_loop(
            lambda s: jnp.sum(s @ w) < 0, lambda s: s + jnp.float32(1), x
        ),
        "condition of a while_loop",
    ),
    "batch groups": (
        lambda w, x: jax.lax.conv_general_dilated(
            x[:6, None, :4], w[:, None, :3], (1,), "VALID", batch_group_count=2
        ),
        "batch_group_count",
    ),
    "image": (
        lambda w, x: jax.lax.conv_general_dilated(
            w[None], x[:, :, None][:, :, [0, 0]], (1,), "VALID"
        ),
        "not its kernel",
    ),
    "data chooses": (lambda w, x: jnp.where(x[0, 0] > 0, w, 2 * w).T @ x.T, "select_n"),
    "cond chooses": (
        lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, w),
        "cond",
    ),
    "masked weights": (lambda w, x: x @ (w * jnp.asarray(np.eye(N, M, dtype="f"))), "entry by"),
}


def pallas(w, x):
    from jax.experimental import pallas as pl

    def kernel(w, x, y):
        y[...] = jnp.dot(x[...], w[...])

    out = jax.ShapeDtypeStruct((T, M), jnp.float32)
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(w, x)


@pytest.mark.parametrize("name", REASONS)
def test_reason(name, unchecked):
    f, reason = REASONS[name]
    shapes = {"w": jax.ShapeDtypeStruct((N, M), jnp.float32)}
    g = lambda w, x: f(w["w"], x)  # noqa: E731
    (row,) = jlar.sites(g)(shapes, jax.ShapeDtypeStruct((T, N), jnp.float32))
    assert row.path == "w" and row.name == ""
    assert re.search(reason, row.why), row.why
    with pytest.raises(ValueError, match=f"nothing to measure(.|\\n)*({reason})"):
        jlar.capture(g)({"w": jnp.asarray(W)}, jnp.asarray(X))


def test_sites_keep_what_is_measured_apart_from_what_is_not():
    """An array with a product that is measured and a use that is not has both listed."""

    def f(w, x):
        y = jax.pure_callback(
            lambda w, x: np.asarray(x) @ np.asarray(w),
            jax.ShapeDtypeStruct((T, M), jnp.float32),
            w["w"],
            x,
        )
        return x @ w["w"], y

    table = jlar.sites(f)({"w": jnp.asarray(W)}, jnp.asarray(X))
    assert any(row.name == "w" for row in table)
    assert any("pure_callback" in row.why for row in table), f"dropped silently:\n{table}"


def test_sites():
    def f(w, tokens):
        h = w["e"][tokens] * w["gain"] + w["pos"][: tokens.shape[1]]
        h, _ = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), h, w["layers"])
        h = jax.lax.cond(jnp.sum(h) > 0, lambda h: h @ w["a"], lambda h: h, h)
        return h @ w["e"].T, h[..., :3] @ w["a"][:3]

    shapes = dict(e=(50, N), gain=(N,), pos=(9, N), layers=(3, N, N), a=(N, N), unused=(2, 2))
    w = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    w["key"] = jax.eval_shape(lambda: jax.random.key(0))
    table = jlar.sites(f)(w, jax.ShapeDtypeStruct((4, 7), jnp.int32))
    rows = {row.name: row for row in table if row.name}
    reasons = {row.path: row.why for row in table if row.why}
    assert rows["e"][3:7] == (50, N, (4, 7), ())
    assert rows["layers"][3:8] == (N, N, (4, 7), (3,), ("scan of 3", "remat"))
    assert rows["a"][3:8] == (N, N, (4, 7), (), ("branch 1",))
    assert rows["a[0:3]"][3:7] == (N, 3, (4, 7), ())
    assert "gain" in reasons["gain"] and "bias" in reasons["pos"]
    assert reasons["unused"] == "not used" and "key" in reasons["key"]
    chosen = jlar.sites(f, where="layers")(w, jax.ShapeDtypeStruct((4, 7), jnp.int32))
    assert {row.path: row.why for row in chosen}["a"] == "not chosen by where="
    assert str(table).splitlines()[0].split()[:2] == ["array", "shape"]
    with pytest.raises(ValueError, match="accepts none"):
        jlar.sites(f, where="zz")(w, jax.ShapeDtypeStruct((4, 7), jnp.int32))


# --- effects ------------------------------------------------------------------------------------


def printed(run, capsys) -> int:
    capsys.readouterr()
    run({"w": jnp.asarray(SQUARE)}, jnp.asarray(X))
    jax.effects_barrier()
    return capsys.readouterr().out.count("here")


def prints(w, x):
    jax.debug.print("here")
    return x @ w


def prints_in_jit(w, x):
    return jax.jit(prints)(w, x) @ w


def prints_in_jit_without_site(w, x):
    def show(x):
        jax.debug.print("here")
        return 2 * x

    return jax.jit(show)(x) @ w


def prints_in_scan(w, x):
    return jax.lax.scan(lambda x, _: (prints(w, x), None), x, None, length=2)[0]


def prints_in_scan_without_site(w, x):
    def show(x, _):
        jax.debug.print("here")
        return 2 * x, None

    return jax.lax.scan(show, x, None, length=2)[0] @ w


def prints_in_cond_without_site(w, x):
    def show(x):
        jax.debug.print("here")
        return 2 * x

    return jax.lax.cond(x[0, 0] < 9, show, lambda x: x, x) @ w


PRINTS = (
    prints,
    prints_in_jit,
    prints_in_jit_without_site,
    prints_in_scan,
    prints_in_scan_without_site,
    prints_in_cond_without_site,
)


@pytest.mark.parametrize("wrap", [lambda f: f, custom_jvp, custom_vjp], ids=["", "jvp", "vjp"])
@pytest.mark.parametrize("body", PRINTS, ids=lambda f: f.__name__)
def test_prints_as_often_as_without(body, wrap, capsys):
    def plain(w, x):
        return wrap(body)(w["w"], x)

    measured = jlar.capture(plain)
    for around in (lambda f: f, jax.jit):
        assert printed(around(measured), capsys) == printed(around(plain), capsys) > 0
    slope = jax.grad(lambda w, x: jnp.sum(plain(w, x)))
    assert printed(jax.grad(lambda w, x: jnp.sum(measured(w, x)[0])), capsys) == printed(
        slope, capsys
    )


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, custom_jvp], ids=["", "jvp"])
def test_callbacks_that_return_something(ordered, wrap):
    calls = []

    def count(x):
        calls.append(1)
        return np.asarray(x)

    def f(w, x):
        def body(w, x):
            like = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return io_callback(count, like, x, ordered=ordered) @ w

        return wrap(body)(w, x)

    w, x = jnp.asarray(W), jnp.asarray(X)
    for run in (jlar.capture(f), jax.jit(jlar.capture(f))):
        calls.clear()
        _, lars = run(w, x)
        jax.effects_barrier()
        # The statistics inside of a custom_jvp need the result of its callback as well.
        assert len(calls) == (2 if wrap is custom_jvp else 1)
        assert_seen(lars, {"weights": (W.T, X)})


def test_ordered_effects_keep_their_order(capsys):
    def f(w, x):
        jax.debug.print("1", ordered=True)
        x = x @ w["a"]
        jax.debug.print("2", ordered=True)
        x = jax.jit(lambda x: (jax.debug.print("3", ordered=True), x @ w["b"])[1])(x)
        jax.debug.print("4", ordered=True)
        return x

    w = {"a": jnp.asarray(SQUARE), "b": jnp.asarray(SQUARE)}
    for run in (jlar.capture(f), jax.jit(jlar.capture(f))):
        capsys.readouterr()
        run(w, jnp.asarray(X))
        jax.effects_barrier()
        assert capsys.readouterr().out.split() == list("1234")


def test_references():
    """Arrays that are written to."""

    def f(w, x):
        state = jax.new_ref(x)
        state[...] = jnp.tanh(state[...] @ w["w"])

        def step(_, i):
            state[...] = jnp.tanh(state[...] @ w["w"])
            return None, i

        jax.lax.scan(step, None, jnp.arange(3))
        return state[...]

    _, lars = jax.jit(jlar.capture(f))({"w": jnp.asarray(SQUARE)}, jnp.asarray(X))
    assert_seen(lars, {"w": repeated(4)})


# --- compositions -------------------------------------------------------------------------------


def scalar(w, x):
    h, _ = jax.lax.scan(jax.checkpoint(layer), x, w["w"])
    return jnp.sum(jnp.sin(h @ w["v"]))


DEEP = {"w": jnp.asarray(S), "v": jnp.asarray(W)}


def deep():
    rows = layers(S)
    w, h = rows[-1]
    return {"w": rows, "v": (W.T, tanh(h @ w.T))}


def test_jvp_linearize_and_hessian():
    x, tangent = jnp.asarray(X), jax.tree.map(jnp.ones_like, DEEP)
    f = lambda w: jlar.capture(scalar)(w, x)  # noqa: E731
    wanted = jax.jvp(lambda w: scalar(w, x), (DEEP,), (tangent,))
    (value, lars), (slope, zero) = jax.jvp(f, (DEEP,), (tangent,))
    close((value, slope), wanted, rtol=1e-5)
    assert_seen(lars, deep())
    assert all(not np.any(np.asarray(a)) for a in jax.tree.leaves(zero))
    (value, lars), push = jax.linearize(f, DEEP)
    close(push(tangent)[0], wanted[1], rtol=1e-5)
    assert_seen(lars, deep())
    value, pull, lars = jax.vjp(f, DEEP, has_aux=True)
    close(pull(jnp.float32(1))[0], jax.grad(scalar)(DEEP, x), rtol=1e-5)
    hessian, lars = jax.hessian(f, has_aux=True)(DEEP)
    close(hessian, jax.hessian(lambda w: scalar(w, x))(DEEP), rtol=1e-4)
    assert_seen(lars, deep())


def test_gradient_of_data():
    f = lambda x: jlar.capture(scalar)(DEEP, x)  # noqa: E731
    grad, lars = jax.grad(f, has_aux=True)(jnp.asarray(X))
    close(grad, jax.grad(lambda x: scalar(DEEP, x))(jnp.asarray(X)), rtol=1e-5)
    assert_seen(lars, deep())


def test_capture_in_a_scan_of_training_steps():
    def step(w, x):
        grad, lars = jax.grad(jlar.capture(scalar), has_aux=True)(w, x)
        return jax.tree.map(lambda w, g: w - 0.01 * g, w, grad), lars

    xs = jnp.stack([jnp.asarray(X), 2 * jnp.asarray(X)])
    _, lars = jax.jit(lambda w: jax.lax.scan(step, w, xs))(DEEP)
    assert lars["w"].lar.shape == (2, L) and lars["v"].lar.shape == (2,)
    assert_seen(jax.tree.map(lambda a: a[0], lars), deep())


@pytest.mark.parametrize("measure", [jlar.energies, jlar.grams])
@pytest.mark.parametrize("name", ["scan rows", "conv last", "ragged empty", "custom vjp"])
def test_capture_of_capture(name, measure):
    """Statistics are no products of weights."""
    case = CASES[name]()
    twice = jlar.capture(jlar.capture(case.f, measure=measure))
    (_, inner), lars = jax.jit(twice)(arrays(case.weights), *arrays(case.args))
    assert_seen(lars, case.seen)
    assert set(inner) == set(case.seen)


def test_gradient_penalty_inside():
    """A derivative taken inside of f is walked like anything else."""

    def f(w, x):
        slope = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w["w"])))(x)
        return jnp.sum(slope**2)

    x, w = f64(X, W)
    _, lars = jax.jit(jlar.capture(f))({"w": jnp.asarray(W)}, jnp.asarray(X))
    back = 1 - tanh(x @ w) ** 2
    assert_seen(lars, {"w": (W, back), "w#2": (W.T, X)})


@pytest.mark.parametrize("name", ["two matrices", "scan rows", "conv groups", "fused sliced"])
def test_no_retrace(name):
    case, traces = CASES[name](), []

    def f(w, *args):
        traces.append(1)
        return case.f(w, *args)

    step = jax.jit(jlar.capture(f))
    for _ in range(3):
        step(arrays(case.weights), *arrays(case.args))
    assert len(traces) == 1


# --- configurations -----------------------------------------------------------------------------

CONFIGURED = (
    "two matrices",
    "remat dots",
    "custom vjp",
    "scan rows",
    "scan pooled",
    "while loop",
    "cond in scan",
    "ragged empty",
    "experts by einsum",
    "conv groups",
    "eqx bounded",
)


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        *((name, jlar.energies) for name in CONFIGURED),
        *((name, jlar.grams) for name in CONFIGURED[-4:]),
    ],
)
def test_configuration(name, measure):
    """Under everything that a careful user switches on."""
    case = CASES[name]()
    with (
        jax.debug_nans(True),
        jax.numpy_rank_promotion("raise"),
        jax.enable_checks(True),
        jax.check_tracer_leaks(True),
    ):
        f = jlar.capture(case.f, measure=measure)
        _, seen = jax.jit(f)(arrays(case.weights), *arrays(case.args))
    with jax.numpy_rank_promotion("raise"):
        rates = [e.keep_rate for e in seen.values()]
        assert all(
            rate.shape == e.calls.shape for rate, e in zip(rates, seen.values(), strict=True)
        )
        lars = {k: (e.energies if measure is jlar.grams else e).lar for k, e in seen.items()}
    for key, use in case.seen.items():
        np.testing.assert_allclose(lars[key], lar_of(use), rtol=1e-4)
        np.testing.assert_array_equal(seen[key].count, count_of(use))


@pytest.mark.parametrize("measure", [jlar.energies, jlar.grams, third_moments])
@pytest.mark.parametrize("name", ["remat dots", "scan rows", "while loop", "ragged empty", "conv"])
def test_x64(name, measure, x64):
    case = CASES[name]()
    wide = lambda a: a.astype(np.float64) if np.issubdtype(np.asarray(a).dtype, np.floating) else a  # noqa: E731
    weights, args = jax.tree.map(wide, (case.weights, case.args))
    if "while" in name or "eqx" in name or name == "scan rows":
        args = arrays(args)
    f = jlar.capture(case.f, measure=measure)
    _, seen = jax.jit(f)(arrays(weights), *arrays(args))
    if measure is third_moments:
        return
    if measure is jlar.grams:
        seen = {key: grams.energies for key, grams in seen.items()}
    assert all(e.y.dtype == jnp.float64 for e in seen.values())
    uses = jax.tree.map(lambda a: a, case.seen)
    for key, use in uses.items():
        np.testing.assert_allclose(seen[key].lar, lar_of(use), rtol=1e-6)


def test_x64_of_float32(x64):
    """Single precision stays single where x64 is merely allowed."""
    _, lars = jax.jit(jlar.capture(block))(BLOCK, jnp.asarray(X))
    assert all(e.lar.dtype == jnp.float32 for e in lars.values())


@pytest.mark.parametrize("name", ["two matrices", "remat dots", "custom vjp", "cond", "ragged"])
def test_without_jit(name):
    case = CASES[name]()
    with jax.disable_jit():
        value, lars = jlar.capture(case.f)(arrays(case.weights), *arrays(case.args))
        wanted = case.f(arrays(case.weights), *arrays(case.args))
    close(value, wanted)
    assert_seen(lars, case.seen)


@pytest.mark.parametrize("name", ["scan rows", "scan reverse"])
def test_loops_without_jit(name):
    """JAX then unrolls the loop, so that each iteration has its own part of the stack."""
    case = CASES[name]()
    with jax.disable_jit():
        _, lars = jlar.capture(case.f)(arrays(case.weights), *arrays(case.args))
    rows = {f"w[{i}]": row for i, row in enumerate(case.seen["w"])}
    assert_seen(lars, rows)


def test_a_weight_times_numbers_of_the_program_is_a_weight():
    """As x @ (W I), which is measured where x multiplies it, and not against I."""
    _, lars = jlar.capture(lambda w, x: x @ (w["w"] @ jnp.eye(M)))({"w": jnp.asarray(W)}, X)
    assert_seen(lars, {"w": (W.T, X)})


def test_one_leaf_carried_and_closed_over():
    """The first is another matrix in each iteration, the second the same one."""

    def f(w, xs):
        return jax.lax.scan(lambda v, x: (0.9 * v, x @ v + x @ w), w, xs)[1]

    xs = np.stack([X, X + 1])
    _, lars = jlar.capture(f)(jnp.asarray(SQUARE), jnp.asarray(xs))
    rows, once = sorted(lars.values(), key=lambda e: -e.lar.ndim)
    assert rows.count.tolist() == [T, T] and once.count == 2 * T
    np.testing.assert_allclose(once.lar, reference.lar(SQUARE.T, xs.reshape(-1, N)), rtol=1e-5)


def test_two_lookups_in_one_loop():
    """Each layer has two of four matrices."""
    B = np.stack([SQUARE, SQUARE.T, SQUARE + 1, SQUARE - 1])

    def f(w, h):
        return jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ w[2 * i]) @ w[2 * i + 1], h)

    _, lars = jlar.capture(f)({"b": jnp.asarray(B)}["b"], jnp.asarray(X))
    assert [e.lar.shape for e in lars.values()] == [(2,), (2,)]
    first = reference.lar(B[0].T, X)
    assert any(np.isclose(e.lar[0], first, rtol=1e-5) for e in lars.values())


def test_a_field_named_value_keeps_its_name():
    class Attention(eqx.Module):
        query: jax.Array
        value: jax.Array

    model = Attention(jnp.asarray(W), jnp.asarray(W))
    _, lars = jlar.capture(lambda m, x: (x @ m.query, x @ m.value))(model, jnp.asarray(X))
    assert sorted(lars) == ["query", "value"]


def test_nested_custom_derivatives_print_once(capsys):
    @jax.custom_jvp
    def inner(w, x):
        jax.debug.print("here")
        return x @ w

    inner.defjvp(lambda p, t: (p[1] @ p[0], p[1] @ t[0] + t[1] @ p[0]))
    outer = jax.custom_jvp(lambda w, x: inner(w, x) * 2)
    outer.defjvp(lambda p, t: (2 * p[1] @ p[0], 2 * (p[1] @ t[0] + t[1] @ p[0])))
    capsys.readouterr()
    _, lars = jlar.capture(outer)(jnp.asarray(W), jnp.asarray(X))
    jax.effects_barrier()
    assert capsys.readouterr().out.count("here") == 1
    assert_seen(lars, {"weights": (W.T, X)})


def test_without_the_private_name(monkeypatch):
    """Where JAX has it no longer, the equations are traced again, to the same numbers."""
    wanted = jax.jit(jax.value_and_grad(jlar.capture(summed_block), has_aux=True))(BLOCK, X)
    monkeypatch.setattr(jlar._stage, "eval_jaxpr_p", None)
    got = jax.jit(jax.value_and_grad(jlar.capture(summed_block), has_aux=True))(BLOCK, X)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)


def summed_block(w, x):
    return jnp.sum(jnp.sin(block(w, x)))


def test_a_scalar_on_data_is_a_gain():
    f = lambda w, x: w["s"] * x @ w["w"]  # noqa: E731
    table = {row.path: row for row in jlar.sites(f)({"w": W, "s": jnp.float32(2)}, X)}
    assert "gain" in table["s"].why and table["w"].n == N


def test_results_are_arrays():
    """Of JAX, all of them, also where they do not depend on the input."""
    _, lars = jlar.capture(block)(BLOCK, jnp.asarray(X))
    for leaf in jax.tree.leaves(lars):
        assert isinstance(leaf, jax.Array), type(leaf)


@pytest.mark.parametrize("axes", [{"tokens": "data"}, {"n": "nowhere"}, {"t": "data"}])
def test_axes_that_mean_nothing(axes, unchecked):
    """Under jit axes are to be left out, and inside shard_map there are no others than these."""
    with pytest.raises(ValueError, match="axes"):
        jlar.capture(block, axes=axes)(BLOCK, jnp.asarray(X))
