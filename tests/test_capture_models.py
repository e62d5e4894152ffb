"""capture on real models: value and gradients are their own, statistics those of NumPy."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import equinox as eqx
import equinox.internal
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from numpy import ndarray

import jlar
import models
import reference
from models import Decoder
from reference import as_float64

WIDTH, HEADS = 8, 2
KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (4, 6, WIDTH))
ROWS = X.reshape(-1, WIDTH)


class Product(NamedTuple):
    """A matrix (m, n) and the inputs (..., n) it multiplies."""

    W: Float[ndarray, "m n"]
    X: Float[ndarray, "*t n"]


class Case(NamedTuple):
    """A loss, what it is called with, and its products by path, one per layer of a stack."""

    loss: Callable[..., Float[Array, ""]]
    weights: PyTree
    args: tuple[Any, ...]
    products: dict[str, list[Product]]


def filled(shapes: PyTree) -> PyTree:
    """Random arrays of these shapes, from NumPy: JAX would compile a program for each of them."""
    draw = np.random.default_rng(0).normal
    fill = lambda s: jnp.asarray(0.3 * draw(size=s.shape), s.dtype)  # noqa: E731
    return jax.tree.map(lambda s: fill(s) if isinstance(s, jax.ShapeDtypeStruct) else s, shapes)


def perceptron(x: Array, layers: Sequence[eqx.nn.Linear]) -> list[Product]:
    """The products of a multi-layer perceptron with ReLU."""
    h, products = as_float64(x), []
    for layer in layers:
        products.append(Product(as_float64(layer.weight), h))
        h = np.maximum(h @ as_float64(layer.weight).T + as_float64(layer.bias), 0)
    return products


class Names(NamedTuple):
    """What a framework calls the parts of a block, the arrays of a matrix and those of a norm."""

    parts: dict[str, str]
    matrix: tuple[str, str] = ("kernel", "bias")
    norm: tuple[str, str] = ("scale", "bias")


class Block(NamedTuple):
    """Attention and a ReLU network, each behind a layer norm, in NumPy."""

    arrays: dict[str, ndarray]
    prefix: str
    row: Any
    names: Names
    epsilon: float
    products: dict[str, list[Product]]

    def read(self, part: str, arrays: tuple[str, str]) -> list[ndarray]:
        path = f"{self.prefix}{self.names.parts[part]}"
        return [self.arrays[f"{path}.{name}"][self.row] for name in arrays]

    def norm(self, part: str, h: ndarray) -> ndarray:
        scale, bias = self.read(part, self.names.norm)
        centred = h - h.mean(-1, keepdims=True)
        deviation = np.sqrt(np.mean(centred**2, -1, keepdims=True) + self.epsilon)
        return centred / deviation * scale + bias

    def dense(self, part: str, h: ndarray) -> ndarray:
        """The last axes of a kernel, as many as its bias has, are its outputs."""
        kernel, bias = self.read(part, self.names.matrix)
        W = kernel.reshape(-1, bias.size).T
        path = f"{self.prefix}{self.names.parts[part]}.{self.names.matrix[0]}"
        self.products.setdefault(path, []).append(Product(W, h))
        return h @ W.T + bias.reshape(-1)

    def __call__(self, h: ndarray) -> ndarray:
        normed, split = self.norm("first", h), (*h.shape[:2], HEADS, -1)
        q, k, v = (self.dense(part, normed).reshape(split) for part in ATTENTION[:3])
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(h.shape)
        h = h + self.dense("out", mixed)
        return h + self.dense("down", np.maximum(self.dense("up", self.norm("second", h)), 0))


def of_transformer(
    weights: PyTree, blocks: Sequence[tuple[str, Any]], names: Names, epsilon: float
) -> dict[str, list[Product]]:
    """The products of a model by path; of each block the prefix of its paths, and its row there."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    arrays = {
        path.removesuffix(".value"): as_float64(leaf)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    }
    h, products = as_float64(X), {}
    for prefix, row in blocks:
        h = Block(arrays, prefix, row, names, epsilon, products)(h)
    return products


def previous(out: Float[Array, "b t n"], x: Float[Array, "b t n"]) -> Float[Array, ""]:
    """The error of a model that is to say what came before."""
    return jnp.mean(jnp.square(out - jnp.roll(x, 1, axis=1)).astype(jnp.float32))


@functools.cache
def mlp(seed: int = 0) -> eqx.nn.MLP:
    make = lambda key: eqx.nn.MLP(WIDTH, 4, 32, depth=1, key=key)  # noqa: E731
    return eqx.filter_jit(make)(jax.random.key(seed))


def squares(model: Callable[..., Any], x: Float[Array, "t n"]) -> Float[Array, ""]:
    return jnp.mean(jnp.square(jax.vmap(model)(x)).astype(jnp.float32))


def of_mlp(model: eqx.nn.MLP, x: Float[Array, "t n"]) -> dict[str, list[Product]]:
    products = perceptron(x, model.layers)
    return {f"layers.{i}.weight": [product] for i, product in enumerate(products)}


def equinox_mlp() -> Case:
    return Case(squares, mlp(), (ROWS,), of_mlp(mlp(), ROWS))


def scanned_decoder() -> Case:
    model = filled(eqx.filter_eval_shape(Decoder, KEYS[1], jax.checkpoint))
    tokens = jax.random.randint(KEYS[2], (32, models.LENGTH), 0, models.VOCABULARY)
    products = {}
    for path, inputs in models.layer_inputs(model, tokens).items():
        layer = model.head if path == "head" else getattr(model.blocks, path.split(".")[1])
        weights = as_float64(layer.weight).reshape(-1, *layer.weight.shape[-2:])
        products[f"{path}.weight"] = list(map(Product, weights, inputs))
    loss = lambda model, tokens: models.loss_fn(model, tokens).astype(jnp.float32)  # noqa: E731
    return Case(loss, model, (tokens,), products)


def mixture_of_experts() -> Case:
    """Every token in every expert, scaled by its gate."""
    shapes = {"router": (WIDTH, 3), "up": (3, WIDTH, 16), "down": (3, 16, WIDTH)}
    weights = {
        name: jax.random.normal(key, shape) / 3
        for (name, shape), key in zip(shapes.items(), KEYS[1:], strict=False)
    }

    def loss(p: dict[str, Array], x: Float[Array, "t n"]) -> Float[Array, ""]:
        gates = jax.nn.softmax(x @ p["router"])
        inputs = jnp.einsum("te,tn->etn", gates, x)
        hidden = jax.nn.relu(jnp.einsum("etn,enm->etm", inputs, p["up"]))
        out = jnp.einsum("etn,enm->etm", hidden, p["down"])
        return jnp.mean(jnp.square(jnp.sum(out, 0)).astype(jnp.float32))

    x, up = as_float64(ROWS), as_float64(weights["up"])
    gates = np.exp(x @ as_float64(weights["router"]))
    gates /= gates.sum(1, keepdims=True)
    inputs = [gates[:, [i]] * x for i in range(3)]
    hidden = [np.maximum(each @ W, 0) for each, W in zip(inputs, up, strict=True)]
    down = as_float64(weights["down"])
    products = {
        "router": [Product(as_float64(weights["router"]).T, x)],
        "up": [Product(W.T, each) for W, each in zip(up, inputs, strict=True)],
        "down": [Product(W.T, each) for W, each in zip(down, hidden, strict=True)],
    }
    return Case(loss, weights, (ROWS,), products)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: Float[Array, "b t n"], _: None) -> tuple[Float[Array, "b t n"], None]:
        h = linen.LayerNorm(name="first")(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS, name="attention")(h)
        h = linen.Dense(4 * WIDTH, name="up")(linen.LayerNorm(name="second")(x))
        return x + linen.Dense(WIDTH, name="down")(jax.nn.relu(h)), None


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        blocks = linen.scan(
            linen.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return blocks(name="blocks")(x, None)[0]


ATTENTION = ("query", "key", "value", "out")
OTHERS = {part: part for part in ("first", "second", "up", "down")}
FLAX = Names({**{part: f"attention.{part}" for part in ATTENTION}, **OTHERS})


def linen_transformer() -> Case:
    model = LinenModel()
    variables = filled(jax.eval_shape(model.init, KEYS[1], X))
    products = of_transformer(variables, [("params.blocks.", i) for i in range(2)], FLAX, 1e-6)
    return Case(lambda v, x: previous(model.apply(v, x), x), variables, (X,), products)


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        x = x + self.attention(self.first(x))
        return x + self.down(jax.nn.relu(self.up(self.second(x))))


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])

    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        for block in self.blocks:
            x = block(x)
        return x


def nnx_transformer() -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: NNXModel(nnx.Rngs(0))))
    state = filled(state)
    products = of_transformer(state, [(f"blocks.{i}.", ...) for i in range(2)], FLAX, 1e-6)
    return Case(lambda state, x: previous(nnx.merge(graph, state)(x), x), state, (X,), products)


class HaikuBlock(hk.Module):
    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        norm = lambda x: hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)  # noqa: E731
        start = hk.initializers.VarianceScaling()
        h = norm(x)
        x = x + hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=start, name="attention")(
            h, h, h
        )
        return x + hk.nets.MLP([4 * WIDTH, WIDTH], name="mlp")(norm(x))


def haiku_transformer() -> Case:
    def forward(x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        return HaikuBlock(name="second")(HaikuBlock(name="first")(x))

    model = hk.without_apply_rng(hk.transform(forward))
    params = filled(jax.eval_shape(model.init, KEYS[1], X))
    parts = {part: f"attention/{part}" for part in ATTENTION[:3]} | {"out": "attention/linear"}
    parts |= {"first": "layer_norm", "second": "layer_norm_1"}
    parts |= {"up": "mlp/~/linear_0", "down": "mlp/~/linear_1"}
    names, blocks = (
        Names(parts, ("w", "b"), ("scale", "offset")),
        [("first/", ...), ("second/", ...)],
    )
    products = of_transformer(params, blocks, names, 1e-5)
    return Case(lambda params, x: previous(model.apply(params, x), x), params, (X,), products)


def partly_frozen() -> Case:
    """The last layer alone is trained; what is frozen comes as another argument."""
    model = mlp()
    chosen = eqx.tree_at(lambda m: m.layers[-1], jax.tree.map(lambda _: False, model), replace=True)
    trained, frozen = eqx.partition(model, chosen)

    def loss(trained: PyTree, frozen: PyTree, x: Float[Array, "t n"]) -> Float[Array, ""]:
        return squares(eqx.combine(trained, frozen), x)

    name = "layers.1.weight"
    return Case(loss, trained, (frozen, ROWS), {name: of_mlp(model, ROWS)[name]})


def adapters(merged: bool) -> Case:
    """Low-rank adapters B A beside W: one matrix where they are merged, else three."""
    shapes = {"W": (16, WIDTH), "A": (2, WIDTH), "B": (16, 2)}
    p = {
        name: jax.random.normal(key, shape) / 3
        for (name, shape), key in zip(shapes.items(), KEYS[1:], strict=False)
    }

    def loss(p: dict[str, Array], x: Float[Array, "t n"]) -> Float[Array, ""]:
        if merged:
            out = x @ (p["W"] + p["B"] @ p["A"]).T
        else:
            out = x @ p["W"].T + x @ p["A"].T @ p["B"].T
        return jnp.mean(jnp.square(out - 1).astype(jnp.float32))

    W, A, B, x = map(as_float64, (*p.values(), ROWS))
    if merged:
        return Case(loss, p, (ROWS,), {"W": [Product(W + B @ A, x)]})
    products = {"W": [Product(W, x)], "A": [Product(A, x)], "B": [Product(B, x @ A.T)]}
    return Case(loss, p, (ROWS,), products)


CASES: dict[str, Callable[[], Case]] = {
    "equinox MLP": equinox_mlp,
    "equinox decoder, scanned and rematerialised": scanned_decoder,
    "equinox, partly frozen": partly_frozen,
    "bare mixture of experts": mixture_of_experts,
    "bare adapters": lambda: adapters(merged=False),
    "bare adapters, merged": lambda: adapters(merged=True),
    "flax Linen transformer, scanned and rematerialised": linen_transformer,
    "flax NNX transformer": nnx_transformer,
    "haiku transformer": haiku_transformer,
}


@functools.cache
def made(name: str) -> Case:
    return CASES[name]()


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return made(request.param)


@pytest.fixture(scope="module")
def compiled(case) -> tuple[tuple[Array, dict[str, jlar.Energies]], PyTree]:
    return eqx.filter_jit(captured(case.loss))(case.weights, *case.args)


def captured(loss: Callable[..., Any]) -> Callable[..., Any]:
    """(value, statistics), gradients."""
    return eqx.filter_value_and_grad(jlar.capture(loss), has_aux=True)


def assert_close(a: PyTree, b: PyTree, tolerance: float = 1e-6) -> None:
    """Each array differs by no more than this share of its largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*(jax.tree.leaves(eqx.filter(t, eqx.is_array)) for t in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def assert_lars(
    lars: dict[str, jlar.Energies],
    products: dict[str, list[Product]],
    tolerance: float = 1e-5,
) -> None:
    """Every matrix is there, with LAR and count as NumPy has them, and no other."""
    assert lars.keys() == products.keys()
    for path, rows in products.items():
        wanted = [reference.lar(W, x) for W, x in rows]
        np.testing.assert_allclose(np.atleast_1d(lars[path].lar), wanted, rtol=0, atol=tolerance)
        counts = [x.size // x.shape[-1] for _, x in rows]
        np.testing.assert_array_equal(np.atleast_1d(lars[path].count), counts)


def assert_right(loss: Callable[..., Any], products: dict[str, list[Product]], *args: Any) -> None:
    """Value, gradients and statistics, compiled."""
    (value, lars), grads = eqx.filter_jit(captured(loss))(*args)
    assert_close((value, grads), eqx.filter_jit(eqx.filter_value_and_grad(loss))(*args))
    assert_lars(lars, products)


def narrow(tree: PyTree, dtype: Any = jnp.bfloat16) -> PyTree:
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, tree)


@pytest.fixture
def quick_compilation():
    """Op by op a model is hundreds of programs of one operation: nothing there to improve."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compilation")
def test_op_by_op_value_and_gradients_are_the_models_own(case):
    with jax.disable_jit():
        (value, _), grads = captured(case.loss)(case.weights, *case.args)
        plain = eqx.filter_value_and_grad(case.loss)(case.weights, *case.args)
    chex.assert_trees_all_equal(*(eqx.filter(a, eqx.is_array) for a in ((value, grads), plain)))


def test_compiled_value_and_gradients_are_the_models_own(case, compiled):
    (value, _), grads = compiled
    plain = eqx.filter_jit(eqx.filter_value_and_grad(case.loss))(case.weights, *case.args)
    assert_close((value, grads), plain)


def test_statistics_are_those_of_numpy(case, compiled):
    (_, lars), _ = compiled
    assert_lars(lars, case.products)
    assert all(e.lar.dtype == jnp.float32 for e in lars.values())


def test_statistics_of_bfloat16_operands(case):
    with jax.numpy_dtype_promotion("standard"):  # flax's layer norm promotes bfloat16
        _, lars = eqx.filter_jit(jlar.capture(case.loss))(narrow(case.weights), *narrow(case.args))
    assert_lars(lars, case.products, tolerance=1e-3)
    assert all(e.y.dtype == jnp.float32 for e in lars.values())


def arrays(model: PyTree) -> list[Array]:
    return jax.tree.leaves(eqx.filter(model, eqx.is_array))


@pytest.mark.parametrize("given", ["closed over", "as an argument"])
def test_a_penalty_towards_reference_weights(given):
    reference_weights = mlp(seed=1)

    def loss(model: eqx.nn.MLP, x: Float[Array, "t n"], *towards: eqx.nn.MLP) -> Float[Array, ""]:
        pairs = zip(arrays(model), arrays([*towards, reference_weights][0]), strict=True)
        return squares(model, x) + 0.1 * sum(jnp.sum((a - b) ** 2) for a, b in pairs)

    towards = [reference_weights] if given == "as an argument" else []
    assert_right(loss, of_mlp(mlp(), ROWS), mlp(), ROWS, *towards)


def test_a_direction_drawn_per_leaf():
    """The number of keys is the number of arrays of the model, and of nothing else."""

    def loss(model: eqx.nn.MLP, x: Float[Array, "t n"], key: PRNGKeyArray) -> Float[Array, ""]:
        leaves, structure = jax.tree.flatten(model)
        keys = iter(jax.random.split(key, len(arrays(model))))
        drawn = [jax.random.uniform(next(keys), a.shape) if eqx.is_array(a) else a for a in leaves]
        # Noise of the biases alone: the matrices are still weights.
        leaves = [
            a + 0.1 * b if eqx.is_array(a) and a.ndim == 1 else a
            for a, b in zip(leaves, drawn, strict=True)
        ]
        slope = sum(jnp.sum(a * b) for a, b in zip(*map(arrays, (leaves, drawn)), strict=True))
        return squares(jax.tree.unflatten(structure, leaves), x) + 0.01 * slope

    keys = jax.random.split(KEYS[3], 4)
    biases = [
        0.1 * jax.random.uniform(key, a.shape) for key, a in zip(keys, arrays(mlp()), strict=True)
    ]
    noisy = eqx.tree_at(
        lambda m: [layer.bias for layer in m.layers],
        mlp(),
        [jnp.add(layer.bias, b) for layer, b in zip(mlp().layers, biases[1::2], strict=True)],
    )
    assert_right(loss, of_mlp(noisy, ROWS), mlp(), ROWS, KEYS[3])


def raveled(model: eqx.nn.MLP, x: Float[Array, "t n"]) -> Float[Array, ""]:
    """A loss that also sees the model as one long vector, and computes with that."""
    parts, static = eqx.partition(model, eqx.is_array)
    flat, restored = ravel_pytree(parts)
    return squares(eqx.combine(restored(flat), static), x) + 0.01 * jnp.sum(flat**2)


def test_a_model_as_one_long_vector():
    (value, lars), grads = eqx.filter_jit(captured(raveled))(mlp(), ROWS)
    assert_close((value, grads), eqx.filter_jit(eqx.filter_value_and_grad(raveled))(mlp(), ROWS))
    wanted = sorted(reference.lar(*row) for (row,) in of_mlp(mlp(), ROWS).values())
    seen = sorted(float(e.lar) for e in lars.values())
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-5)
    assert all(e.count == len(ROWS) for e in lars.values())


def test_a_part_of_a_long_vector_has_the_name_of_its_array():
    _, lars = jlar.capture(raveled)(mlp(), ROWS)
    assert lars.keys() == of_mlp(mlp(), ROWS).keys()


@pytest.mark.parametrize(("loop", "dtype"), [("map", jnp.bfloat16), ("scan", jnp.float16)])
def test_a_thousand_chunks_in_half_precision(loop, dtype):
    """Sums and counts stay in float32 where the whole model is cast: 8 bits count to 256."""
    x = jax.random.normal(KEYS[4], (1000, 4, WIDTH))

    def loss(model: eqx.nn.MLP, x: Float[Array, "c t n"]) -> Float[Array, ""]:
        half, x = narrow((model, x), dtype)
        if loop == "map":
            out = jax.lax.map(jax.vmap(half), x)
            return jnp.mean(jnp.square(out.astype(jnp.float32)))
        add = lambda total, chunk: (total + squares(half, chunk), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros(()), x)[0] / 1000

    (value, lars), grads = eqx.filter_jit(captured(loss))(mlp(), x)
    assert_close((value, grads), eqx.filter_jit(eqx.filter_value_and_grad(loss))(mlp(), x))
    assert_lars(lars, of_mlp(mlp(), x.reshape(-1, WIDTH)), tolerance=1e-3)
    assert all(e.count == 4000 and e.y.dtype == jnp.float32 for e in lars.values())


def test_training_with_clipped_gradients_goes_the_same_way():
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    model = mlp()

    def train(loss: Callable[..., Any], has_aux: bool) -> tuple[PyTree, Float[Array, "steps"]]:
        start, static = eqx.partition(model, eqx.is_array)

        def step(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], Array]:
            params, state = carry
            call = eqx.filter_value_and_grad(loss, has_aux=has_aux)
            _, grads = call(eqx.combine(params, static), ROWS)
            grads = eqx.filter(grads, eqx.is_array)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

        (params, _), norms = jax.lax.scan(step, (start, optimizer.init(start)), None, length=200)
        return params, norms

    towards = lambda model, x: jnp.mean((jax.vmap(model)(x) - jnp.sin(x[:, :4])) ** 2)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # optax
        params, norms = jax.jit(train, static_argnums=(0, 1))(jlar.capture(towards), True)
        plain, plain_norms = jax.jit(train, static_argnums=(0, 1))(towards, False)
    assert norms[0] > 0.1  # the clip is felt
    assert_close((params, norms), (plain, plain_norms), tolerance=1e-4)


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_recurrent_cells_pool_over_time(cell):
    model = getattr(eqx.nn, f"{cell}Cell")(WIDTH, 6, key=KEYS[1])

    def loss(cell: Any, x: Float[Array, "b t n"]) -> Float[Array, ""]:
        start = jnp.zeros(6) if isinstance(cell, eqx.nn.GRUCell) else (jnp.zeros(6), jnp.zeros(6))
        step = lambda state, x: (cell(x, state), None)  # noqa: E731
        last = jax.vmap(lambda x: jax.lax.scan(step, start, x)[0])(x)
        return jnp.mean(jax.tree.leaves(last)[0] ** 2)

    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    ih, hh, bias = map(as_float64, (model.weight_ih, model.weight_hh, model.bias))
    h = c = np.zeros((len(X), 6))
    states = []
    for x in as_float64(X).swapaxes(0, 1):
        states.append(h)
        if cell == "GRU":
            (r, z, new), (hr, hz, hn) = (np.split(a, 3, -1) for a in (x @ ih.T + bias, h @ hh.T))
            new = np.tanh(new + sigmoid(r + hr) * (hn + as_float64(model.bias_n)))
            h = new + sigmoid(z + hz) * (h - new)
        else:
            i, f, g, o = np.split(x @ ih.T + h @ hh.T + bias, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
    products = {"weight_ih": Product(ih, ROWS), "weight_hh": Product(hh, np.concatenate(states))}
    assert_right(loss, {path: [row] for path, row in products.items()}, model, X)


def test_a_convolution_is_a_product_with_patches():
    model = eqx.nn.Conv2d(3, 4, 3, stride=2, key=KEYS[1])
    images = jax.random.normal(KEYS[2], (2, 3, 9, 9))
    windows = np.lib.stride_tricks.sliding_window_view(as_float64(images), (3, 3), (2, 3))
    patches = windows[:, :, ::2, ::2].transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    W = as_float64(model.weight).reshape(4, 27)
    assert_right(squares, {"weight": [Product(W, patches)]}, model, images)


class Scaled(eqx.nn.Linear):
    """A subclass that computes something of its own."""

    def __call__(self, x: Float[Array, "n"], *, key: Array | None = None) -> Float[Array, "m"]:
        return 2 * super().__call__(x)


class ByHand(eqx.Module):
    """A layer that nobody but its author knows."""

    matrix: Float[Array, "n m"]
    offset: Float[Array, "m"]
    scaled: Scaled

    def __call__(self, x: Float[Array, "n"]) -> Float[Array, "k"]:
        return self.scaled(jnp.tanh(jnp.einsum("i,io->o", x, self.matrix) + self.offset))


def test_layers_written_by_hand():
    scaled = Scaled(16, 4, key=KEYS[1])
    model = ByHand(jax.random.normal(KEYS[2], (WIDTH, 16)), jnp.ones(16), scaled)
    W, x = as_float64(model.matrix).T, as_float64(ROWS)
    second = Product(as_float64(scaled.weight), np.tanh(x @ W.T + 1))
    products = {"matrix": [Product(W, x)], "scaled.weight": [second]}
    assert_right(squares, products, model, ROWS)


@pytest.mark.parametrize("kind", ["lax", "checkpointed", "bounded"])
def test_a_while_loop_pools_its_iterations(kind):
    """Also equinox's own, which have a derivative in reverse."""
    layer = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=KEYS[1])

    def loss(layer: eqx.nn.Linear, x: Float[Array, "t n"]) -> Float[Array, ""]:
        go_on = lambda carry: carry[0] < 3  # noqa: E731
        step = lambda carry: (carry[0] + 1, jnp.tanh(jax.vmap(layer)(carry[1])))  # noqa: E731
        start = jnp.array(0), x
        if kind == "lax":
            return jnp.sum(jax.lax.while_loop(go_on, step, start)[1])
        loop = equinox.internal.while_loop(go_on, step, start, kind=kind, max_steps=4)
        return jnp.sum(loop[1])

    W, inputs = as_float64(layer.weight), [as_float64(ROWS)]
    for _ in range(2):
        inputs.append(np.tanh(inputs[-1] @ W.T))
    products = {"weight": [Product(W, np.concatenate(inputs))]}
    if kind == "lax":
        value, lars = jax.jit(jlar.capture(loss))(layer, ROWS)
        assert_close(value, jax.jit(loss)(layer, ROWS))
        assert_lars(lars, products)
    else:
        assert_right(loss, products, layer, ROWS)


def test_a_derivative_rule_without_results():
    """As in equinox's loops: a check on the cotangents, which returns nothing."""

    @jax.custom_jvp
    def check(x: Float[Array, "t n"]) -> tuple[()]:
        return ()

    check.defjvp(lambda primals, tangents: ((), ()))

    def loss(W: Float[Array, "m n"], x: Float[Array, "t n"]) -> Float[Array, ""]:
        check(x)
        return jnp.sum(x @ W.T)

    W = mlp().layers[0].weight
    assert_right(loss, {"weights": [Product(as_float64(W), ROWS)]}, W, ROWS)


def test_a_square_matrix_and_its_transpose_are_two():
    """As in an autoencoder with tied weights, whose encoder is the decoder's transpose."""
    W, x = as_float64(jax.random.normal(KEYS[1], (WIDTH, WIDTH))), as_float64(ROWS)
    W, x = W * np.arange(WIDTH), x * np.arange(WIDTH)  # so that the two have different LAR

    def loss(W: Float[Array, "m n"], x: Float[Array, "t n"]) -> Float[Array, ""]:
        return jnp.mean(jnp.square(jnp.tanh(x @ W.T) @ W - x))

    rows = {"weights": [Product(W, x)], "weights#2": [Product(W.T, np.tanh(x @ W.T))]}
    _, lars = jlar.capture(loss)(*(jnp.asarray(a, jnp.float32) for a in (W, x)))
    assert_lars(lars, rows)


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "t n"]) -> Float[Array, "t n"]:
        return self.dropout(self.norm(self.linear(x)))


def test_a_module_that_changes_itself_is_refused(unchecked):
    """Running means of a batch norm, and the count from which dropout draws, would be lost."""
    loss = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    with pytest.raises(ValueError, match=r"changes its first argument in place.*nnx\.split"):
        nnx.value_and_grad(jlar.capture(loss), has_aux=True)(Normed(nnx.Rngs(0)), ROWS)


@pytest.mark.parametrize("what", ["noise", "frozen"])
def test_what_is_added_to_a_weight_makes_it_data(what):
    """Then no product of a weight is left, and the table says what became of it."""
    W, A, B = (
        jax.random.normal(key, shape)
        for key, shape in zip(KEYS[1:4], ((4, WIDTH), (2, WIDTH), (4, 2)), strict=True)
    )

    def loss(p: dict[str, Array], x: Float[Array, "t n"], other: Array) -> Float[Array, ""]:
        if what == "noise":
            return jnp.sum(x @ (p["W"] + 0.1 * jax.random.normal(other, p["W"].shape)).T)
        return jnp.sum(x @ (other + p["B"] @ p["A"]).T)

    weights = {"W": W} if what == "noise" else {"A": A, "B": B}
    args = weights, ROWS, KEYS[4] if what == "noise" else W
    sites = jlar.sites(loss)(*args)
    assert {row.path for row in sites} == weights.keys()
    assert all("added to data" in row.why and not row.name for row in sites)
    with pytest.raises(ValueError, match=r"nothing to measure(.|\n)*added to data"):
        jlar.capture(loss)(*args)


def test_a_frozen_matrix_beside_its_adapters_leaves_them_their_sites():
    W, A, B = (
        jax.random.normal(key, shape)
        for key, shape in zip(KEYS[1:4], ((4, WIDTH), (2, WIDTH), (4, 2)), strict=True)
    )
    loss = lambda p, W, x: jnp.sum((x @ W.T + x @ p["A"].T @ p["B"].T) ** 2)  # noqa: E731
    x, A64, B64 = map(as_float64, (ROWS, A, B))
    products = {"A": [Product(A64, x)], "B": [Product(B64, x @ A64.T)]}
    assert_right(loss, products, {"A": A, "B": B}, W, ROWS)


def test_layers_inside_flax_attention_are_reached():
    for case in map(made, [name for name in CASES if name.startswith("flax")]):
        measured = {row.name for row in jlar.sites(case.loss)(case.weights, *case.args)}
        inside = [path for path in case.products if ".attention." in path]
        assert measured.issuperset(inside) and len(inside) >= 4


def test_every_array_is_measured_or_has_a_reason(case):
    sites = jlar.sites(case.loss)(case.weights, *case.args)
    assert {row.name for row in sites} - {""} == case.products.keys()
    assert all(bool(row.name) != bool(row.why) for row in sites)
    assert len({row.path for row in sites}) == len(arrays(case.weights))


def test_one_trace_serves_all_steps():
    traced = chex.assert_max_traces(squares, n=1)
    step = eqx.filter_jit(captured(traced))
    for model, x in ((mlp(), ROWS), (mlp(seed=1), 2 * ROWS)):
        (_, lars), _ = step(model, x)
        assert_lars(lars, of_mlp(model, x))


def test_donated_arguments_stay_donated():
    def step(W: Float[Array, "m n"], x: Float[Array, "t n"]) -> tuple[Array, dict[str, Any]]:
        loss = lambda W, x: jnp.sum(jnp.tanh(x @ W.T) ** 2)  # noqa: E731
        (_, lars), gradient = jax.value_and_grad(jlar.capture(loss), has_aux=True)(W, x)
        return W - 0.1 * gradient, lars

    W, step = jax.random.normal(KEYS[1], (WIDTH, WIDTH)), jax.jit(step, donate_argnums=0)
    wanted = reference.lar(W, ROWS)
    alias = step.lower(W, ROWS).compile().memory_analysis().alias_size_in_bytes
    updated, lars = step(W, ROWS)
    assert W.is_deleted() and not updated.is_deleted() and alias == updated.nbytes
    np.testing.assert_allclose(lars["weights"].lar, wanted, rtol=0, atol=1e-5)


class Stack(linen.Module):
    """Blocks named as in flax; `boxed` puts metadata around their kernels, as for a mesh."""

    boxed: bool

    @linen.compact
    def __call__(self, x: Float[Array, "t n"]) -> Float[Array, "t n"]:
        for i in range(2):
            x = StackBlock(self.boxed, name=f"blocks_{i}")(x)
        return x


class StackBlock(linen.Module):
    boxed: bool

    @linen.compact
    def __call__(self, x: Float[Array, "t n"]) -> Float[Array, "t n"]:
        start = linen.initializers.lecun_normal()
        if self.boxed:
            start = linen.with_partitioning(start, (None, "model"))
        x = jax.nn.relu(linen.Dense(16, kernel_init=start)(x))
        return linen.Dense(WIDTH, kernel_init=start)(x)


def names(f: Callable[..., Any], *args: Any) -> list[str]:
    return [row.name for row in jlar.sites(f)(*args) if row.name]


@pytest.mark.parametrize("boxed", [False, True])
def test_paths_in_flax(boxed):
    model = Stack(boxed)
    paths = [f"params.blocks_{i}.Dense_{j}.kernel" for i in range(2) for j in range(2)]
    assert names(model.apply, jax.jit(model.init)(KEYS[1], ROWS), ROWS) == paths


def test_paths_in_equinox_and_in_containers():
    W = mlp().layers[0].weight
    assert names(squares, mlp(), ROWS) == [f"layers.{i}.weight" for i in range(2)]
    assert names(lambda p, x: x @ p["blocks"][0]["up"].T, {"blocks": [{"up": W}]}, ROWS) == [
        "blocks.0.up"
    ]
    assert names(lambda p, x: x @ p[1].T, (None, W), ROWS) == ["1"]
