"""capture on eight devices: under jit with shardings, with shard_map inside and outside of it."""

import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlar
import reference

N, M, T, L = 8, 16, 16, 3
KINDS = [AxisType.Auto, AxisType.Explicit]


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def normal(seed: int, *shape: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=shape)
    for d, size in enumerate(shape):  # no two parts alike
        scale = rng.permutation((1 + np.arange(size)) ** -0.7)
        a *= scale.reshape([-1 if e == d else 1 for e in range(len(shape))])
    return jnp.asarray(a, jnp.float32)


X = normal(0, T, N)
UP, DOWN, S = normal(1, N, M), normal(2, M, N), normal(3, L, N, N)
EXPERTS, DISPATCHED = normal(4, 8, N, M), normal(5, 8, 6, N)


WHOLE = P()


def on_mesh(f, specs, out=WHOLE, **options):
    options = {"mesh": mesh_of(), **options}
    return jax.shard_map(f, in_specs=specs, out_specs=out, **options)


def readings(statistics):
    """What is the same however many calls the devices make of it."""
    if isinstance(statistics, jlar.Energies):
        e = statistics
        return e.lar, e.count, e.keep_rate, e.y, e.x, e.w / e.calls, e.n
    if isinstance(statistics, jlar.Grams):
        g = statistics
        return g.lar, g.count, g.x, g.w / g.calls[..., None, None]
    return statistics


def same(a, b, rtol=2e-5):
    """The statistics of both are equal but for rounding, and so are rows and counts."""
    assert set(a) == set(b)
    for name in a:
        # On one device, whatever the devices that they come from.
        both = [readings(jax.tree.map(jnp.asarray, jax.device_get(e[name]))) for e in (a, b)]
        assert len(set(map(jax.tree.structure, both))) == 1
        for x, y in zip(*map(jax.tree.leaves, both), strict=True):
            assert np.shape(x) == np.shape(y), name
            np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.fixture(autouse=True, scope="module")
def compiled_fast():
    """Compiling takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# --- under jit ----------------------------------------------------------------------------------


def mlp(w, x):
    return jnp.tanh(x @ w["up"]) @ w["down"]


def scanned(w, x):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return jax.lax.scan(layer, x, w["layers"])[0]


def unembedding(w, x):
    logits = mlp(w, x) @ w["head"].T
    return jax.nn.logsumexp(logits, axis=-1)


def experts(w, x):
    return jnp.einsum("etn,enm->etm", x, w["experts"])


def pooled(w, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(mlp(w, h)), None), x, None, length=3)[0]


def transformed(w, x):
    return jax.lax.cond(jnp.sum(x) < 1e9, mlp, lambda w, x: x, w, x)


MLP = {"up": UP, "down": DOWN}
JITTED = {
    "data": (mlp, MLP, {"up": P(), "down": P()}, X, P("data")),
    "all data": (mlp, MLP, {"up": P(), "down": P()}, X, P(("data", "model"))),
    "tensor": (mlp, MLP, {"up": P(None, "model"), "down": P("model")}, X, P("data")),
    "head": (
        unembedding,
        {**MLP, "head": normal(6, 32, N)},
        {"up": P(), "down": P(), "head": P("model")},
        X,
        P("data"),
    ),
    "scan": (scanned, {"layers": S}, {"layers": P(None, None, None)}, X, P("data")),
    "pooled": (pooled, MLP, {"up": P(None, "model"), "down": P("model")}, X, P("data")),
    "cond": (transformed, MLP, {"up": P(None, "model"), "down": P("model")}, X, P("data")),
    "experts": (experts, {"experts": EXPERTS}, {"experts": P("model")}, DISPATCHED, P("model")),
}
# What Explicit meshes refuse by themselves is given to Auto ones alone.
AUTO = {
    "fsdp": (mlp, MLP, {"up": P("data"), "down": P("data")}, X, P("data")),
    "scan fsdp": (scanned, {"layers": S}, {"layers": P(None, "data", "model")}, X, P("data")),
    "scan stack": (
        scanned,
        {"layers": normal(7, 4, N, N)},
        {"layers": P("model")},
        X,
        P("data"),
    ),
}


def placed(tree, specs, mesh):
    return jax.tree.map(
        lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)),
        tree,
        specs,
        is_leaf=lambda a: isinstance(a, P),
    )


def collectives(program, *args) -> Counter:
    """How often each (kind, number of elements) is exchanged."""
    text, found = jax.jit(program).lower(*args).compile().as_text(), Counter()
    kinds = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for line in text.splitlines():
        if (match := re.search(kinds, line)) and " = " in line:
            shapes = re.findall(r"\w+\[([\d,]*)\]", line[line.index(" = ") : match.start()])
            for shape in shapes:
                size = int(np.prod([int(d) for d in shape.split(",") if d] or [1]))
                found[match.group(1), size] += 1
    return found


@pytest.mark.parametrize("measure", [jlar.energies, jlar.grams])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("name", [*JITTED, *AUTO])
def test_under_jit(name, kind, measure):
    f, w, w_specs, x, x_spec = {**JITTED, **AUTO}[name]
    if name in AUTO and kind == AxisType.Explicit:
        return
    mesh = mesh_of(kind)
    g = jlar.capture(f, measure=measure)
    value, seen = jax.jit(g)(w, x)
    with jax.set_mesh(mesh):
        parts = placed(w, w_specs, mesh), placed(x, x_spec, mesh)
        if kind == AxisType.Explicit and name in ("tensor", "pooled", "cond"):
            f = partial(with_out_sharding, f)
            g = jlar.capture(f, measure=measure)
        value_, seen_ = jax.jit(g)(*parts)
        np.testing.assert_allclose(value, value_, rtol=2e-5, atol=1e-6)
        same(jax.device_get(seen), jax.device_get(seen_))
        if measure is jlar.energies and kind == AxisType.Auto:
            more = collectives(g, *parts) - collectives(f, *parts)
            sizes = Counter({key: n for key, n in more.items() if key[0] != "all-reduce"})
            assert not sizes, more
            assert all(size <= 8 * 8 for _, size in more), more


def with_out_sharding(f, w, x):
    """The inputs of the second matrix are sharded, which in Explicit mode asks for a word."""

    def explicit(w, x):
        return jnp.einsum("tm,mn->tn", jnp.tanh(x @ w["up"]), w["down"], out_sharding=P("data"))

    if f is mlp:
        return explicit(w, x)
    if f is transformed:
        return jax.lax.cond(jnp.sum(x) < 1e9, explicit, lambda w, x: x, w, x)
    return jax.lax.scan(lambda h, _: (jnp.tanh(explicit(w, h)), None), x, None, length=3)[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["data", "head", "scan"])
def test_gradients_under_jit(name, kind):
    f, w, w_specs, x, x_spec = JITTED[name]
    mesh = mesh_of(kind)
    g = jlar.capture(lambda w, x: jnp.sum(jnp.sin(f(w, x))))
    (_, seen), grad = jax.jit(jax.value_and_grad(g, has_aux=True))(w, x)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(g, has_aux=True))
        (_, seen_), grad_ = step(placed(w, w_specs, mesh), placed(x, x_spec, mesh))
        same(jax.device_get(seen), jax.device_get(seen_))
        same(jax.device_get(grad), jax.device_get(grad_), rtol=1e-4)


def test_convolution_under_jit():
    mesh = mesh_of()
    w, x = normal(8, 8, 4, 3), normal(9, 4, 4, 10)

    def f(w, x):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME")

    g = jax.jit(jlar.capture(f))
    parts = placed(w, P("model"), mesh), placed(x, P("data"), mesh)
    same(g(w, x)[1], jax.device_get(g(*parts)[1]))


def test_ragged_under_jit():
    mesh, sizes = mesh_of(), jnp.array([3, 0, 4, 2, 5, 0, 1, 1], jnp.int32)

    def f(w, x, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    g = jax.jit(jlar.capture(f))
    for spec in (P("model"), P(None, None, "model"), P(None, "model")):
        parts = placed(EXPERTS, spec, mesh), placed(X, P(), mesh), placed(sizes, P(), mesh)
        same(g(EXPERTS, X, sizes)[1], jax.device_get(g(*parts)[1]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_mask_under_jit(kind):
    mesh, keep = mesh_of(kind), jnp.arange(T) % 3 > 0

    def f(w, x, keep):
        return jlar.capture(mlp, mask=keep)(w, x)[1]

    with jax.set_mesh(mesh):
        w = placed(MLP, {"up": P(), "down": P()}, mesh)
        got = jax.jit(f)(w, placed(X, P("data"), mesh), placed(keep, P("data"), mesh))
        got = jax.device_get(got)
    same(jax.jit(f)(MLP, X, keep), got)


# --- shard_map inside of f ----------------------------------------------------------------------


def column(w, x):
    return x @ w["up"]


def one_layer(w, x):
    return layers(jax.checkpoint, {"layers": w["up"][None, :, :N]}, x)


def column_row(w, x):
    return jax.lax.psum(jnp.tanh(x @ w["up"]) @ w["down"], "model")


def column_row_scattered(w, x):
    y = jnp.tanh(x @ w["up"]) @ w["down"]
    return jax.lax.psum_scatter(y, "model", scatter_dimension=1, tiled=True)


def sequence_parallel(w, x):
    y = jnp.tanh(jax.lax.all_gather(x, "model", tiled=True) @ w["up"]) @ w["down"]
    return jax.lax.psum_scatter(y, "model", scatter_dimension=0, tiled=True)


def gathered(w, x):
    up = jax.lax.all_gather(w["up"], "data", tiled=True)
    down = jax.lax.all_gather(w["down"], "data", axis=1, tiled=True)
    return jnp.tanh(x @ up) @ down


def layers(body, w, x):
    return jax.lax.scan(body(lambda h, w: (jnp.tanh(h @ w), None)), x, w["layers"])[0]


def blocks(body, w, x):
    step = body(lambda h, w: (jnp.tanh(jax.lax.psum(jnp.tanh(h @ w[0]) @ w[1], "model")), None))
    return jax.lax.scan(step, x, (w["up"], w["down"]))[0]


def blocks_plain(body, w, x):
    step = lambda h, w: (jnp.tanh(jnp.tanh(h @ w[0]) @ w[1]), None)  # noqa: E731
    return jax.lax.scan(step, x, (w["up"], w["down"]))[0]


def shared(body, w, x):
    step = body(lambda h, _: (jnp.tanh(column_row(w, h)), None))
    return jax.lax.scan(step, x, None, length=3)[0]


def looped(w, x):
    """As many times as the data say, equally on all devices."""
    n = jnp.int32(0 * jax.lax.pmax(jnp.max(x), "data")) + 3
    return jax.lax.fori_loop(0, n, lambda _, h: jnp.tanh(h @ w["w"]), x)


def looped_plain(w, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w["w"]), None), x, None, length=3)[0]


def branched(w, x):
    few = jax.lax.psum(jnp.sum(x), "data") < 1e9
    return jax.lax.cond(few, mlp, lambda w, x: x, w, x)


def own_slice(w, x):
    """x comes whole, and each device takes its part."""
    rows = T // jax.lax.axis_size("data")
    return mlp(w, jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("data") * rows, rows))


TENSOR = {"up": P(None, "model"), "down": P("model")}
STACKED = {"up": normal(10, L, N, M), "down": normal(11, L, M, N)}
TENSOR_STACKED = {"up": P(None, None, "model"), "down": P(None, "model")}
ROWS = {"axes": {"n": "model"}}
STACK = {"axes": {"stack": "model"}}
KEEPS = {"": lambda f: f, " remat": jax.checkpoint, " jit": jax.jit}

# local program, weights, their specs, x, its spec, spec of the result, options, plain program
MAPPED = {
    "data": (mlp, MLP, P(), X, P("data"), P("data"), {}, mlp),
    "all data": (mlp, MLP, P(), X, P(("data", "model")), P(("data", "model")), {}, mlp),
    "replicated": (mlp, MLP, P(), X, P(), P(), {}, mlp),
    "column": (
        lambda w, x: x @ w["up"],
        {"up": UP},
        {"up": P(None, "model")},
        X,
        P("data"),
        P("data", "model"),
        {},
        lambda w, x: x @ w["up"],
    ),
    "column row": (column_row, MLP, TENSOR, X, P("data"), P("data"), ROWS, mlp),
    "scattered": (
        column_row_scattered,
        MLP,
        TENSOR,
        X,
        P("data"),
        P("data", "model"),
        ROWS,
        mlp,
    ),
    "sequence": (
        sequence_parallel,
        MLP,
        TENSOR,
        X,
        P(("data", "model")),
        P(("data", "model")),
        ROWS,
        mlp,
    ),
    "fsdp": (
        gathered,
        MLP,
        {"up": P("data"), "down": P(None, "data")},
        X,
        P("data"),
        P("data"),
        {},
        mlp,
    ),
    "own slice": (own_slice, MLP, P(), X, P(), P("data"), {}, mlp),
    "while": (looped, {"w": S[0]}, P(), X, P("data"), P("data"), {}, looped_plain),
    "cond": (branched, MLP, P(), X, P("data"), P("data"), {}, mlp),
    "experts": (
        experts,
        {"experts": EXPERTS},
        P("model"),
        DISPATCHED,
        P("model"),
        P("model"),
        STACK,
        experts,
    ),
    "experts of replicated tokens": (
        lambda w, x: experts(w, jnp.stack([x, x + 1])),
        {"experts": EXPERTS},
        P("model"),
        X,
        P(),
        P("model"),
        STACK,
        lambda w, x: experts(w, jnp.stack([x, x + 1] * 4)),
    ),
    "experts pooled": (
        lambda w, x: jax.lax.scan(lambda x, _: (jnp.tanh(experts(w, x)), None), x, None, length=2)[
            0
        ],
        {"experts": normal(12, 8, N, N)},
        P("model"),
        DISPATCHED,
        P("model"),
        P("model"),
        STACK,
        lambda w, x: jax.lax.scan(lambda x, _: (jnp.tanh(experts(w, x)), None), x, None, length=2)[
            0
        ],
    ),
    "experts in cond": (
        lambda w, x: jax.lax.cond(
            jax.lax.psum(jnp.sum(x), "model") < 1e9,
            lambda: experts(w, x),
            lambda: 2 * experts(w, x),
        ),
        {"experts": EXPERTS},
        P("model"),
        DISPATCHED,
        P("model"),
        P("model"),
        STACK,
        experts,
    ),
    "experts by layer": (
        lambda w, x: jax.lax.scan(
            lambda x, w: (jnp.tanh(experts({"experts": w}, x)), None), x, w["experts"]
        )[0],
        {"experts": normal(13, L, 8, N, N)},
        P(None, "model"),
        DISPATCHED,
        P("model"),
        P("model"),
        STACK,
        lambda w, x: jax.lax.scan(
            lambda x, w: (jnp.tanh(experts({"experts": w}, x)), None), x, w["experts"]
        )[0],
    ),
}
for suffix, wrap in KEEPS.items():
    MAPPED |= {
        "layers" + suffix: (
            partial(layers, wrap),
            {"layers": S},
            P(),
            X,
            P("data"),
            P("data"),
            {},
            partial(layers, wrap),
        ),
        "blocks" + suffix: (
            partial(blocks, wrap),
            STACKED,
            TENSOR_STACKED,
            X,
            P("data"),
            P("data"),
            ROWS,
            partial(blocks_plain, wrap),
        ),
        "shared" + suffix: (
            partial(shared, wrap),
            MLP,
            TENSOR,
            X,
            P("data"),
            P("data"),
            ROWS,
            pooled,
        ),
    }


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", MAPPED)
def test_shard_map_inside(name, check_vma):
    local, w, w_spec, x, x_spec, out, options, plain = MAPPED[name]
    f = on_mesh(local, (w_spec, x_spec), out, check_vma=check_vma)
    value, seen = jax.jit(jlar.capture(f, **options))(w, x)
    value_, wanted = jax.jit(jlar.capture(plain))(w, x)
    np.testing.assert_allclose(value, value_, rtol=1e-4, atol=1e-5)
    same(jax.device_get(wanted), jax.device_get(seen))


@pytest.mark.parametrize("name", [name for name in MAPPED if "while" not in name])
def test_gradients_through_shard_map(name):
    local, w, w_spec, x, x_spec, out, options, _ = MAPPED[name]
    f = on_mesh(local, (w_spec, x_spec), out)

    def loss(f, w):
        out = f(w, x)
        value, seen = out if isinstance(out, tuple) else (out, {})
        return jnp.sum(jnp.sin(value)), seen

    wanted, _ = jax.jit(jax.grad(partial(loss, f), has_aux=True))(w)
    got, _ = jax.jit(jax.grad(partial(loss, jlar.capture(f, **options)), has_aux=True))(w)
    same(wanted, got, rtol=1e-5)


@pytest.mark.parametrize("name", ["data", "column row", "fsdp", "layers remat", "blocks"])
def test_grams_of_shard_map_inside(name):
    local, w, w_spec, x, x_spec, out, options, plain = MAPPED[name]
    f = on_mesh(local, (w_spec, x_spec), out)
    if options:  # grams of split inputs would move X: those of the others
        options = {**options, "where": "up"}
    _, seen = jax.jit(jlar.capture(f, measure=jlar.grams, **options))(w, x)
    _, wanted = jax.jit(jlar.capture(plain, measure=jlar.grams, where=options.get("where")))(w, x)
    same(jax.device_get(wanted), jax.device_get(seen))


@pytest.mark.parametrize("name", ["column row", "scattered", "sequence", "blocks"])
def test_grams_of_split_inputs(name):
    local, w, w_spec, x, x_spec, out, options, plain = MAPPED[name]
    f = on_mesh(local, (w_spec, x_spec), out)
    _, seen = jax.jit(jlar.capture(f, measure=jlar.grams, **options))(w, x)
    _, wanted = jax.jit(jlar.capture(plain, measure=jlar.grams))(w, x)
    same(jax.device_get(wanted), jax.device_get(seen))


@pytest.mark.parametrize("name", ["data", "column", "fsdp", "layers"])
def test_a_measure_of_ones_own(name):
    """Sums over tokens, whichever device has them; refused, not averaged, where W is split."""
    local, w, w_spec, x, x_spec, out, options, plain = MAPPED[name]
    measure = lambda W, X, Y, mask: {"x": jnp.sum(X**2), "y": jnp.sum(Y**2)}  # noqa: E731
    f = on_mesh(local, (w_spec, x_spec), out)
    _, wanted = jax.jit(jlar.capture(plain, measure=measure))(w, x)
    try:
        _, seen = jax.jit(jlar.capture(f, measure=measure, **options))(w, x)
    except ValueError as error:
        assert "measure" in str(error)
        return
    same(jax.device_get(wanted), jax.device_get(seen))


def test_ragged_inside():
    sizes = jnp.array([3, 1, 2, 4, 1, 2, 1, 2], jnp.int32)

    def local(w, x, sizes):
        return jax.lax.ragged_dot(x, w["e"], sizes)

    # Tokens by device: those of every four experts.
    f = on_mesh(local, (P(), P("data"), P("data")), P("data"))
    w, x = {"e": EXPERTS[:4]}, normal(14, 20, N)
    sizes = jnp.array([3, 1, 2, 4, 0, 2, 1, 7], jnp.int32)
    _, seen = jax.jit(jlar.capture(f))(w, x, sizes)
    plain = lambda w, x: (local(w, x[:10], sizes[:4]), local(w, x[10:], sizes[4:]))  # noqa: E731
    same(jlar.capture(plain)(w, x)[1], jax.device_get(seen))
    # Outputs of every expert by device.
    f = on_mesh(local, (P(None, None, "model"), P(), P()), P(None, "model"))
    w, sizes = {"e": EXPERTS}, jnp.array([3, 1, 2, 4, 0, 2, 1, 7], jnp.int32)
    seen = jax.jit(jlar.capture(f, axes={"m": "model"}))(w, x, sizes)[1]
    same(jlar.capture(local)(w, x, sizes)[1], jax.device_get(seen))


@pytest.mark.parametrize("axes", [None, {"stack": "model"}])
@pytest.mark.parametrize("tokens", [P(), P("model")])
def test_ragged_experts_by_device(axes, tokens):
    """Every device has two of eight experts: eight rows, or an error, but no mixture of experts."""
    sizes = jnp.array([3, 1, 2, 4, 1, 2, 1, 2], jnp.int32)

    def local(w, x, sizes):
        return jax.lax.ragged_dot(x, w["e"], sizes)

    w, x = {"e": EXPERTS}, normal(14, 8 if tokens == P() else 32, N)
    f = on_mesh(local, (P("model"), tokens, P("model")), P("model"))
    try:
        _, seen = jax.jit(jlar.capture(f, axes=axes))(w, x, sizes)
    except ValueError as error:
        assert "axes" in str(error) and "'e'" in str(error)
        return
    assert seen["e"].lar.shape == (8,)
    np.testing.assert_array_equal(seen["e"].count, sizes)
    for i in range(8):
        mine = x if tokens == P() else x[8 * (i // 2) : 8 * (i // 2) + 8]
        start = int(sizes[i - 1]) if i % 2 else 0
        wanted = reference.lar(EXPERTS[i].T, mine[start : start + int(sizes[i])])
        np.testing.assert_allclose(seen["e"].lar[i], wanted, rtol=1e-5)


def test_convolution_inside():
    w, x = {"k": normal(8, 8, 4, 3)}, normal(9, 4, 4, 10)

    def f(w, x):
        return jax.lax.conv_general_dilated(x, w["k"], (1,), "SAME")

    _, wanted = jlar.capture(f)(w, x)
    g = on_mesh(f, (P("model"), P("data")), P("data", "model"))
    same(wanted, jax.device_get(jax.jit(jlar.capture(g))(w, x)[1]))
    g = on_mesh(
        lambda w, x: jax.lax.psum(f(w, x), "model"),
        (P(None, "model"), P("data", "model")),
        P("data"),
    )
    same(wanted, jax.device_get(jax.jit(jlar.capture(g, axes={"n": "model"}))(w, x)[1]))


def test_partial_manual():
    """Manual over one axis, under jit over the other."""
    _, wanted = jax.jit(jlar.capture(mlp))(MLP, X)
    f = on_mesh(mlp, (P(), P("data")), P("data"), axis_names={"data"})
    w = placed(MLP, TENSOR, mesh_of())
    same(wanted, jax.device_get(jax.jit(jlar.capture(f))(w, X)[1]))
    f = on_mesh(column_row, (TENSOR, P()), P(), axis_names={"model"})
    x = placed(X, P("data"), mesh_of())
    same(wanted, jax.device_get(jax.jit(jlar.capture(f, **ROWS))(w, x)[1]))


def test_nested_shard_maps():
    def outer(w, x):
        inner = jax.shard_map(
            column_row, in_specs=(TENSOR, P()), out_specs=P(), axis_names={"model"}
        )
        return inner(w, x)

    f = on_mesh(outer, (P(), P("data")), P("data"), axis_names={"data"})
    _, wanted = jax.jit(jlar.capture(mlp))(MLP, X)
    same(wanted, jax.device_get(jax.jit(jlar.capture(f, **ROWS))(MLP, X)[1]))


def test_a_mask_of_all_tokens_does_not_fit_a_device(unchecked):
    f = on_mesh(mlp, (P(), P("data")), P("data"))
    with pytest.raises(ValueError, match="mask of shape"):
        jlar.capture(f, mask=jnp.ones(T))(MLP, X)


# --- capture inside of shard_map ----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MAPPED if "experts" not in name])
def test_inside_shard_map(name):
    local, w, w_spec, x, x_spec, _, options, plain = MAPPED[name]
    f = on_mesh(lambda w, x: jlar.capture(local, **options)(w, x)[1], (w_spec, x_spec))
    _, wanted = jax.jit(jlar.capture(plain))(w, x)
    same(jax.device_get(wanted), jax.device_get(jax.jit(f)(w, x)))


@pytest.mark.parametrize("name", [name for name in MAPPED if name.startswith("experts")])
def test_experts_inside_shard_map(name):
    """Each device returns the rows of all experts."""
    local, w, w_spec, x, x_spec, _, options, plain = MAPPED[name]
    f = on_mesh(lambda w, x: jlar.capture(local, **options)(w, x)[1], (w_spec, x_spec))
    _, wanted = jax.jit(jlar.capture(plain))(w, x)
    same(jax.device_get(wanted), jax.device_get(jax.jit(f)(w, x)))


@pytest.mark.parametrize(
    ("local", "w_spec", "axes"),
    [
        (mlp, P(), {"t": "data"}),
        (
            lambda w, x: x @ w["up"],
            {"up": P(None, "model"), "down": P()},
            {"t": "data", "m": "model"},
        ),
        (gathered, {"up": P("data"), "down": P(None, "data")}, {"t": "data"}),
        (
            lambda w, x: layers(jax.checkpoint, {"layers": w["up"][None, :, :N]}, x),
            P(),
            {"t": "data"},
        ),
    ],
    ids=["data", "column", "fsdp", "scan"],
)
def test_inside_shard_map_without_types(local, w_spec, axes):
    def f(w, x):
        return jlar.capture(local, axes=axes)(w, x)[1]

    def plain(w, x):
        return local(w, x) if local is not gathered else mlp(w, x)

    got = jax.jit(on_mesh(f, (w_spec, P("data")), check_vma=False))(MLP, X)
    same(jax.device_get(jax.jit(jlar.capture(plain))(MLP, X)[1]), jax.device_get(got))


def test_mask_inside_shard_map():
    keep = jnp.arange(T) % 3 > 0

    def f(local, w, x, keep, **options):
        return jlar.capture(local, mask=keep, **options)(w, x)[1]

    wanted = f(mlp, MLP, X, keep)
    specs = (P(), P("data"), P("data"))
    same(wanted, jax.device_get(jax.jit(on_mesh(partial(f, mlp), specs))(MLP, X, keep)))
    got = jax.jit(on_mesh(partial(f, column_row, **ROWS), (TENSOR, *specs[1:])))(MLP, X, keep)
    same(wanted, jax.device_get(got))
    blind = partial(f, mlp, axes={"t": "data"})
    unaware = jax.jit(on_mesh(blind, specs, check_vma=False))
    same(wanted, jax.device_get(unaware(MLP, X, keep)))


@pytest.mark.parametrize("name", ["data", "column row", "fsdp", "blocks remat", "shared"])
def test_training_step_inside_shard_map(name):
    local, w, w_spec, x, x_spec, _, options, plain = MAPPED[name]

    def loss(w, x):
        return jax.lax.psum(jnp.sum(jnp.sin(local(w, x))), "data")

    def step(f, w, x):
        return jax.grad(f, has_aux=True)(w, x)

    w_specs = jax.tree.map(lambda _: w_spec, w) if isinstance(w_spec, P) else w_spec
    f = on_mesh(partial(step, jlar.capture(loss, **options)), (w_spec, x_spec), (w_specs, P()))
    grad, seen = jax.jit(f)(w, x)
    wanted, seen_ = jax.jit(
        partial(step, jlar.capture(lambda w, x: jnp.sum(jnp.sin(plain(w, x)))))
    )(w, x)
    same(jax.device_get(seen_), jax.device_get(seen))
    same(wanted, jax.device_get(grad), rtol=1e-4)


def raises(match, local, w_spec, x_spec, w=MLP, x=X, check_vma=True, **options):
    f = on_mesh(
        lambda w, x: jlar.capture(local, **options)(w, x)[1], (w_spec, x_spec), check_vma=check_vma
    )
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(f, w, x)


def test_ambiguous_parts(unchecked):
    both = r"'model'.*split.* both operands of the product with 'down'.*axes="
    raises(both, column_row, TENSOR, P("data"))
    stack = r"'model'.*split.* both operands of the product with 'experts'.*stack"
    raises(stack, experts, P("model"), P("model"), {"experts": EXPERTS}, DISPATCHED)
    raises(
        "'down'.*(has none|has no stack|axes=)",
        column_row,
        TENSOR,
        P("data"),
        axes={"stack": "model"},
    )
    raises(
        "'down'.*not summed over them",
        lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"],
        TENSOR,
        P("data"),
        **ROWS,
    )
    raises("check_vma=False.*axes=", mlp, P(), P("data"), check_vma=False)
    raises(
        "the types do not tell what is split.*'n'",
        column_row,
        TENSOR,
        P("data"),
        check_vma=False,
        axes={"t": "data", "n": "model"},
    )
    raises(
        "stack",
        experts,
        P("model"),
        P("model"),
        {"experts": EXPERTS},
        DISPATCHED,
        check_vma=False,
        axes={"stack": "model"},
    )
    raises("'nowhere'", mlp, P(), P("data"), axes={"n": "nowhere"})
    raises("'nowhere'", mlp, P(), P("data"), check_vma=False, axes={"m": "nowhere"})
    raises("axes must map", mlp, P(), P("data"), axes={"tokens": "data"})


def test_weights_said_to_vary():
    """A usual way to keep gradients apart: whoever does so can say what splits the tokens."""

    def f(w, x):
        w = jax.lax.pcast(w, "data", to="varying")
        return jlar.capture(mlp, axes={"t": "data"})(w, x)[1]

    got = jax.jit(on_mesh(f, (P(), P("data"))))(MLP, X)
    same(jlar.capture(mlp)(MLP, X)[1], jax.device_get(got))


def test_sums_over_groups_of_devices():
    def local(w, x):
        x = jax.lax.psum(x, "model", axis_index_groups=[[0, 1], [2, 3]])
        return x @ w["up"]

    def plain(w, x):
        x = x.reshape(4, 4, N)
        x = jnp.stack([x[0] + x[1], x[0] + x[1], x[2] + x[3], x[2] + x[3]]).reshape(T, N)
        return x @ w["up"]

    f = on_mesh(local, (P(), P("model")), P("model"), check_vma=False)
    value, seen = jax.jit(jlar.capture(f))({"up": UP}, X)
    value_, wanted = jax.jit(jlar.capture(plain))({"up": UP}, X)
    np.testing.assert_allclose(value, value_, rtol=1e-5, atol=1e-6)
    same(wanted, jax.device_get(seen))


@pytest.mark.parametrize("between", ["cast", "jit", "remat", "bias", "more axes"])
def test_sum_of_split_inputs_later(between):
    """Y is summed after something linear, or by whoever called: measured, or refused by name."""

    def local(w, x):
        h = jnp.tanh(x @ w["up"])
        product = lambda w, h: h @ w["down"]  # noqa: E731
        wrap = {"jit": jax.jit, "remat": jax.checkpoint}.get(between, lambda f: f)
        y = wrap(product)(w, h)
        if between == "cast":
            return jax.lax.psum(y.astype(jnp.bfloat16), "model")
        if between == "more axes":
            return jax.lax.psum(y, ("data", "model"))
        return jax.lax.psum(y, "model") + 1

    out = P() if between == "more axes" else P("data")
    f = on_mesh(local, (TENSOR, P("data")), out)
    try:
        _, seen = jax.jit(jlar.capture(f, **ROWS))(MLP, X)
    except ValueError as error:
        assert between != "bias" and "'down'" in str(error)
        return
    same(jax.device_get(jlar.capture(mlp)(MLP, X)[1]), jax.device_get(seen))


# Devices that do not run the same: a sum over devices inside of it would wait for ever.
DIVERGING = {
    "cond": "jax.lax.cond(x[0, 0] > 0, lambda x: x @ w['w'], lambda x: 2 * x, x)",
    "while": "jax.lax.fori_loop(0, jax.lax.axis_index('data') + 1, lambda _, x: x @ w['w'], x)",
}


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("kind", DIVERGING)
def test_devices_that_diverge(kind, measured):
    program = f"""
        import jax, jax.numpy as jnp, jlar
        from jax.sharding import PartitionSpec as P
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        local = lambda w, x: {DIVERGING[kind]}
        f = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        x = jnp.concatenate([jnp.ones((3, 4)), -jnp.ones((3, 4))])
        w = {{"w": jnp.eye(4)}}
        if {measured}:
            lars = jax.jit(jlar.capture(f))(w, x)[1]
            print("count", int(lars["w"].count))
        else:
            print(jax.jit(f)(w, x).shape)
    """
    flags = (
        "--xla_force_host_platform_device_count=2 "
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=2 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=6"
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    refused = "ValueError" in done.stderr and "'w'" in done.stderr
    assert done.returncode == 0 or refused, done.stderr[:2000]
    if measured and not refused:
        assert f"count {3 if kind == 'cond' else 9}" in done.stdout


def test_experts_looked_up_by_device(unchecked):
    """Every device takes its own matrix of a replicated stack: nothing tells, so it is asked."""
    f = on_mesh(lambda w, x: x @ w["e"][jax.lax.axis_index("data")], (P(), P("data")), P("data"))
    with pytest.raises(ValueError, match="'data' splits both operands of the product with 'e'"):
        jlar.capture(f)({"e": EXPERTS}, X)


def test_sites_show_the_whole_product():
    f = on_mesh(column_row, (TENSOR, P("data")), P("data"))
    table = {row.path: row for row in jlar.sites(f, **ROWS)(MLP, X)}
    assert (table["up"].m, table["down"].n) == (M, M)


def test_one_input_on_each_device():
    """The whole product has eight inputs, though each device multiplies one."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    local = lambda w, x: jax.lax.psum(x @ w["w"], "model")  # noqa: E731
    f = on_mesh(local, (P("model"), P(None, "model")), mesh=mesh)
    w = {"w": UP}
    _, seen = jax.jit(jlar.capture(f, axes={"n": "model"}))(w, X)
    same(jlar.capture(lambda w, x: x @ w["w"])(w, X)[1], jax.device_get(seen))
