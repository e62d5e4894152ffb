"""The same numbers however W and X are split, and nothing gathered: compiled programs are read."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlar

M, N, B, T = 64, 16, 4, 64  # W (M, N), X (B, T, N): n^2 is less than any part of W or X

SPLITS = {
    "replicated": (P(), P()),
    "tokens": (P(), P("data")),
    "vocabulary": (P("model"), P()),
    "tokens x vocabulary": (P("model"), P("data")),
    "sequence": (P("model"), P(None, "data")),
    "batch and sequence": (P(), P("data", "model")),
    "inputs": (P(None, "model"), P("data", None, "model")),
    "inputs of W": (P("data", "model"), P()),
    "FSDP over outputs": (P("data", None), P("data")),
    "FSDP over inputs": (P("model", "data"), P("data")),
}
IN_ORDER = ("replicated", "tokens", "vocabulary", "tokens x vocabulary", "batch and sequence")
"""Rows over the axes of the mesh as Grams expect them: none has to move."""
NEEDS_Y = ("inputs", "inputs of W", "FSDP over outputs", "FSDP over inputs")


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    scale = jnp.linspace(1, 2, N)  # singular values apart, so that q is well defined
    W = jax.random.normal(keys[0], (M, N)) * scale[None]
    X = jax.random.normal(keys[1], (B, T, N)) * scale[None, None]
    labels = jax.random.randint(keys[2], (B, T), 0, M).at[0, 0].set(-100)
    return W, X, labels


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def placed(mesh, split):
    """W, X, Y and labels as the split says."""
    W, X, labels = arrays()
    W_spec, X_spec = SPLITS[split]
    tokens = (*X_spec, None, None)[:2]
    rows = (*W_spec, None)[0]
    Y_spec = P(*tokens, None if rows in tokens else rows)
    specs = {"W": (W, W_spec), "X": (X, X_spec), "Y": (X @ W.T, Y_spec), "l": (labels, P(*tokens))}
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in specs.values()]


def statistics(W, X, Y, labels):
    """Everything that is to be the same."""
    loss, of_loss = jlar.losses.cross_entropy(W, X, labels, chunk=50, soft_cap=20.0)
    return {
        "lar": jlar.lar(W, X),
        "energies": jlar.energies(W, X, mask=labels >= 0),
        "with Y": jlar.energies(W, X, Y=Y, mask=labels >= 0),
        "grams": jlar.grams(W, X, mask=labels >= 0),
        "spectra": jlar.spectra(W, X, method="gram"),
        "alignment": jlar.alignment(W, X),
        "ranks": jlar.principal_dimension(X),
        "loss": (loss, of_loss),
    }


def gradients(W, X, Y, labels):
    """What is differentiated on meshes."""

    def token_losses(W, X):
        losses = jlar.losses.cross_entropy(W, X, labels, chunk=50, reduction="none")[0]
        return jnp.sum(jnp.square(losses))

    return {
        "lar": jax.grad(lambda W, X: jlar.lar(W, X), argnums=(0, 1))(W, X),
        "loss": jax.grad(
            lambda W, X: jlar.losses.cross_entropy(W, X, labels, chunk=50)[0], argnums=(0, 1)
        )(W, X),
        "token losses": jax.grad(token_losses, argnums=(0, 1))(W, X),
    }


# q and corr need the singular directions, which rounding turns by eps times the largest eigenvalue
# over the gaps between them, some 30 here.


def assert_same(got, wanted):
    """Within 1e-6 of the largest entry of each array."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    named = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
    for (path, a), b in named:
        name = jax.tree_util.keystr(path)
        error = np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        rtol = 1e-5 if name.endswith((".q", "['corr']")) else 1e-6
        assert error <= rtol * np.max(np.abs(b)), (name, error)


@pytest.fixture(scope="module")
def on_one_device():
    with jax.numpy_dtype_promotion("strict"):
        W, X, labels = arrays()
        return jax.device_get(jax.jit(statistics)(W, X, X @ W.T, labels))


@pytest.mark.parametrize("split", SPLITS)
def test_under_jit_with_explicit_axes(split, on_one_device):
    got = jax.jit(statistics)(*placed(mesh_of(AxisType.Explicit), split))
    assert_same(jax.device_get(got), on_one_device)


@pytest.mark.parametrize("split", ["batch and sequence", "inputs"])
def test_under_jit_with_automatic_axes(split, on_one_device):
    got = jax.jit(statistics)(*placed(mesh_of(AxisType.Auto), split))
    assert_same(jax.device_get(got), on_one_device)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_under_jit_with_the_mesh_set(kind, on_one_device):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        got = jax.jit(statistics)(*placed(mesh, "tokens x vocabulary"))
    assert_same(jax.device_get(got), on_one_device)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("split", ["tokens x vocabulary", "FSDP over inputs"])
def test_gradients_under_jit(split, kind):
    W, X, labels = arrays()
    wanted = jax.jit(gradients)(W, X, X @ W.T, labels)
    got = jax.jit(gradients)(*placed(mesh_of(kind), split))
    assert_same(jax.device_get(got), jax.device_get(wanted))


def collectives(program):
    """(name, how many numbers it carries) for each collective of the compiled program."""
    found = []
    names = (
        "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    for result, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", program.as_text()):
        shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", result)
        found.append((name, sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)))
    return found


def assert_moves_at_most(program, numbers):
    moved = collectives(program)
    assert all(count <= numbers for _, count in moved), moved
    return moved


def test_collectives_are_found():
    mesh = mesh_of(AxisType.Auto)
    W = jax.device_put(arrays()[0], NamedSharding(mesh, P("data")))
    gather = jax.jit(lambda W: W * 1, out_shardings=NamedSharding(mesh, P()))
    assert collectives(gather.lower(W).compile()) == [("all-gather", M * N)]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_under_jit_nothing_is_gathered(split, kind, on_one_device):
    """But what XLA gathers for the Grams where automatic axes split the inputs."""
    W, X, Y, labels = placed(mesh_of(kind), split)
    energies = jax.jit(lambda W, X, Y, labels: jlar.energies(W, X, Y=Y, mask=labels >= 0))
    assert_moves_at_most(energies.lower(W, X, Y, labels).compile(), 8)
    if split not in NEEDS_Y:
        assert_moves_at_most(jax.jit(jlar.lar).lower(W, X).compile(), 8)
    spectra = jax.jit(lambda W, X: jlar.grams(W, X).spectra()).lower(W, X).compile()
    if kind == AxisType.Explicit or "inputs" not in split:
        moved = assert_moves_at_most(spectra, 2 * N * N)  # two sums in one
        assert "all-gather" not in {name for name, _ in moved}, moved
    kinds = {name for name, _ in collectives(spectra)}
    if split in IN_ORDER or (kind == AxisType.Explicit and "inputs" not in split):
        assert kinds <= {"all-reduce"}, kinds
    assert_same(jax.device_get(spectra(W, X)), on_one_device["spectra"])


@pytest.mark.parametrize("spec", [P("f", "t"), P("t", ("d", "f")), P(("f", "t"))], ids=str)
def test_explicit_axes_of_any_number(spec):
    """Three of them, and one that vmap runs over."""
    mesh = jax.make_mesh((2, 2, 2), ("d", "f", "t"), axis_types=(AxisType.Explicit,) * 3)
    W = jax.device_put(arrays()[0], NamedSharding(mesh, spec))
    program = jax.jit(lambda W: jlar.grams(W, W).w).lower(W).compile()
    moved = assert_moves_at_most(program, N * N)
    assert not any(name == "all-gather" for name, _ in moved), moved
    assert_same(jax.device_get(program(W)), jax.device_get(jlar.grams(*arrays()[:2]).w))
    stack = jax.device_put(arrays()[1], NamedSharding(mesh, P("d", None, "t")))
    got = jax.jit(jax.vmap(lambda A: jlar.grams(A, A).x))(stack)
    assert_same(
        jax.device_get(got), jax.device_get(jnp.einsum("bti,btj->bij", *(arrays()[1],) * 2))
    )
    nothing = jax.device_put(jnp.ones((0, N)), NamedSharding(mesh, P("d", "t")))
    assert jnp.isnan(jlar.lar(W, nothing)) and not jnp.any(jlar.grams(W, nothing).x)


@pytest.mark.parametrize("name", [None, "data"])
def test_stacks_stay_where_they_are(name):
    """Under vmap the stack may be split; `spmd_axis_name` says so."""
    stack = jax.device_put(arrays()[1], NamedSharding(mesh_of(AxisType.Auto), P("data")))
    grams = jax.jit(jax.vmap(lambda A: jlar.grams(A, A).x, spmd_axis_name=name))
    program = grams.lower(stack).compile()
    assert not collectives(program)
    assert_same(jax.device_get(program(stack)), jax.device_get(grams(arrays()[1])))


def test_grams_leave_the_model_as_it_was_split():
    """What XLA has no order for is not split to suit them."""
    W, X = placed(mesh_of(AxisType.Auto), "tokens")[:2]

    def hidden(W, X, measured):
        H = jax.nn.relu(X @ W.T)
        return H, jlar.principal_dimension(H) if measured else None

    compiled = {
        measured: jax.jit(partial(hidden, measured=measured)).lower(W, X).compile()
        for measured in (False, True)
    }
    alone, beside = (compiled[measured].output_shardings[0] for measured in (False, True))
    assert alone.spec == beside.spec == P("data")


@pytest.mark.parametrize("split", SPLITS)
def test_explicit_variants(split, on_one_device):
    """The numbers of one device, and what moves for them."""
    mesh, (W_spec, X_spec) = mesh_of(AxisType.Auto), SPLITS[split]
    W, X, Y, labels = placed(mesh, split)
    held = {"mesh": mesh, "W_spec": W_spec, "X_spec": X_spec}
    needed = {"Y": Y} if split in NEEDS_Y else {}

    def energies(W, X, needed, labels):
        return {
            "energies": jlar.sharded(jlar.energies, **held)(W, X, **needed, mask=labels >= 0),
            "lar": jlar.sharded(jlar.lar, **held)(W, X, **needed),
        }

    few = jax.jit(energies).lower(W, X, needed, labels).compile()
    assert_moves_at_most(few, 16)  # of two calls
    spectra = jax.jit(jlar.sharded(jlar.spectra, **held)).lower(W, X).compile()
    moved = assert_moves_at_most(spectra, 2 * N * N)
    assert not any(name == "all-gather" for name, _ in moved), moved
    got = few(W, X, needed, labels) | {"spectra": spectra(W, X)}
    got["grams"] = jlar.sharded(jlar.grams, **held)(W, X, mask=labels >= 0)
    assert_same(jax.device_get(got), {name: on_one_device[name] for name in got})
    assert got["spectra"].p.sharding.is_fully_replicated


@pytest.mark.parametrize("split", ["tokens x vocabulary", "inputs"])
def test_explicit_variants_on_explicit_axes(split, on_one_device):
    """As `jax.make_mesh` makes them, inside jit too; what lies nowhere yet is put in place."""
    mesh = mesh_of(AxisType.Explicit)
    W, X = arrays()[:2] if split == "inputs" else placed(mesh, split)[:2]
    held = {"mesh": mesh, "W_spec": SPLITS[split][0], "X_spec": SPLITS[split][1]}
    grams = jlar.sharded(jlar.grams, **held)(W, X)
    assert_same(grams.spectra().p, on_one_device["spectra"].p)
    alignment = jax.jit(jlar.sharded(jlar.alignment, **held))
    assert_same(jax.device_get(alignment(*placed(mesh, split)[:2])), on_one_device["alignment"])


def test_tall_weights_are_exchanged_in_pieces():
    """Of more rows than n per device, and not a multiple of them."""
    mesh, X = mesh_of(AxisType.Auto), arrays()[1]
    W = jax.random.normal(jax.random.key(5), (300, N))
    held = {"mesh": mesh, "W_spec": P(None, "model"), "X_spec": P(None, None, "model")}
    grams = jax.jit(jlar.sharded(jlar.grams, **held))
    assert_same(jax.device_get(grams(W, X)), jax.device_get(jlar.grams(W, X)))
    moved = assert_moves_at_most(grams.lower(W, X).compile(), 2 * N * N)
    assert any(name == "all-to-all" for name, _ in moved), moved


def on_mesh(f, in_specs, out_specs=None):
    """`f` inside shard_map, jitted."""
    mapped = jax.shard_map(
        f, mesh=mesh_of(AxisType.Auto), in_specs=in_specs, out_specs=out_specs or P()
    )
    return jax.jit(mapped)


AXES = {"t": "data", "m": "model"}


def test_inside_shard_map(on_one_device):
    W, X, labels = arrays()

    def local(W, X, labels):
        mask, axes = labels >= 0, AXES
        return {
            "lar": jlar.lar(W, X, axes=axes),
            "energies": jlar.energies(W, X, mask=mask, axes=axes),
            "grams": jlar.grams(W, X, mask=mask, axes=axes),
            "spectra": jlar.spectra(W, X, method="gram", axes=axes),
        }

    got = on_mesh(local, (P("model"), P("data"), P("data")))(W, X, labels)
    assert_same(jax.device_get(got), {name: on_one_device[name] for name in got})
    svd = on_mesh(partial(jlar.alignment, axes={"t": "data"}), (P(), P("data")))(W, X)
    assert_same(jax.device_get(svd), on_one_device["alignment"])


def test_a_named_axis_of_vmap_is_one_as_well(on_one_device):
    W, X, _ = arrays()
    lar = jax.vmap(partial(jlar.lar, axes={"t": "batch"}), (None, 0), axis_name="batch")(W, X)
    np.testing.assert_allclose(lar, on_one_device["lar"], rtol=1e-6)


def test_gradient_of_lar_inside_shard_map():
    W, X, _ = arrays()
    gradient = jax.grad(partial(jlar.lar, axes=AXES), argnums=(0, 1))
    got = on_mesh(gradient, (P("model"), P("data")), (P("model"), P("data")))(W, X)
    assert_same(jax.device_get(got), jax.grad(jlar.lar, argnums=(0, 1))(W, X))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vocabulary_parallel_loss(reduction):
    W, X, labels = arrays()
    keep = jnp.arange(T) % 3 > 0
    options = dict(reduction=reduction, soft_cap=20.0, z_loss=0.01, chunk=20)
    weights = jnp.linspace(-1, 2, B * T).reshape(B, T)  # cotangents that are not one

    def weighted(loss, W, X, labels, keep, weights):
        value, energies = loss(W, X, labels, mask=jnp.broadcast_to(keep, labels.shape))
        whole = 3 * value if reduction != "none" else jnp.sum(value * weights)
        return whole, (value, energies)

    def value_and_grad(loss):
        gradient = jax.value_and_grad(weighted, argnums=(1, 2), has_aux=True)
        return lambda *args: gradient(loss, *args)

    cross_entropy = partial(jlar.losses.cross_entropy, **options)
    wanted = value_and_grad(cross_entropy)(W, X, labels, keep, weights)

    def local(*args):
        def whole(*args, **kwargs):
            value, energies = cross_entropy(*args, **kwargs, axes=AXES)
            return value, energies

        (value, aux), gradients = value_and_grad(whole)(*args)
        return (jax.lax.psum(value, "data") if reduction == "none" else value, aux), gradients

    of_token = P("data") if reduction == "none" else P()
    specs = (P("model"), P("data"), P("data"), P(), P("data"))
    out = ((P(), (of_token, P())), (P("model"), P("data")))
    program = on_mesh(local, specs, out)
    assert_same(jax.device_get(program(W, X, labels, keep, weights)), wanted)
    moved = collectives(program.lower(W, X, labels, keep, weights).compile())
    # X's gradient is summed over "model", W's over "data": what any such layer moves. Beside that,
    # no more than a few numbers per token of a chunk.
    most = B * T * N // 2
    assert sorted(count for _, count in moved)[-1] <= most + 8 < B * T * M // 4, moved
    assert not any(name == "all-gather" for name, _ in moved), moved


def test_weights_gathered_for_use():
    """FSDP by hand: JAX believes the gathered W to vary over the axis; the energies do not."""
    W, X, _ = arrays()

    def local(W, X):
        W = jax.lax.all_gather(W, "data", tiled=True)
        return jlar.energies(W, X, axes={"t": "data"})

    got = on_mesh(local, (P("data"), P("data")))(W, X)
    assert_same(jax.device_get(got), jlar.energies(W, X))


SPECS = {"W_spec": P("model"), "X_spec": P("data")}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"W_spec": P("tensor")}, "tensor .* is not found in mesh"),
        ({"X_spec": P(None, None, "rows")}, "rows .* is not found in mesh"),
        ({"X": jnp.ones((3, T, N))}, "axis 0 is partitioned 2 times, but the dimension size is 3"),
        ({"X_spec": P("data", None, None, None)}, r"operands\['X'\] .* rank at least 4"),
        ({"W_spec": P(None, "model"), "X_spec": P(None, None, "model")}, "Y must be given"),
        ({"W_spec": P("data"), "X_spec": P("data")}, "Y must be given"),
        ({"X_spec": P(), "W_spec": P(None, None, None)}, r"operands\['W'\] .* rank at least 3"),
        ({"W": jnp.ones((1, M, N))}, r"W must have shape \(m, n\).*got shape \(1, 64, 16\)"),
        ({"X": jnp.float32(1), "X_spec": P()}, "X must have shape .* got a scalar"),
        ({"W": "elsewhere"}, "does not match the sharding on the respective arg"),
        ({"W": "split otherwise"}, "does not match"),
    ],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_misuse_of_the_explicit_variants(changed, message, kind, unchecked):
    """JAX's own errors, which name the array or its shape, and the library's."""
    (W, X, _), mesh, changed = arrays(), mesh_of(kind), dict(changed)
    small = jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])
    placed = {
        "elsewhere": NamedSharding(small, P("model")),
        "split otherwise": NamedSharding(mesh, P("data")),
    }
    if isinstance(changed.get("W"), str):
        changed["W"] = jax.device_put(W, placed[changed["W"]])
    W, X = changed.pop("W", W), changed.pop("X", X)
    with pytest.raises(ValueError, match=message):
        jlar.sharded(jlar.energies, mesh=mesh, **{**SPECS, **changed})(W, X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(jlar.lar, axes={"tokens": "data"}), "axes must map"),
        (partial(jlar.lar, axes={"t": "rows"}), "axes names what is not a mesh axis here .*rows"),
        (partial(jlar.lar, axes={"t": "data", "m": "data"}), "W is the same on every device"),
        (partial(jlar.lar, axes={"m": "model"}), "W is the same on every device along 'model'"),
        (partial(jlar.lar, axes={"t": ("data", "model")}), "X is the same .* along 'model'"),
        (partial(jlar.lar, axes={"m": "data", "n": "data"}), 'must not split "m" and "n"'),
    ],
)
def test_misuse_inside_shard_map(call, message, unchecked):
    W, X, _ = arrays()
    with pytest.raises(ValueError, match=message):
        on_mesh(call, (P(), P("data")))(W, X)


def test_more_misuse_inside_shard_map(unchecked):
    W, X, labels = arrays()
    with pytest.raises(ValueError, match='"svd" needs W whole'):
        on_mesh(partial(jlar.alignment, method="svd", axes=AXES), (P("model"), P("data")))(W, X)
    with pytest.raises(ValueError, match='tokens "t" and the vocabulary "m"'):
        loss = partial(jlar.losses.cross_entropy, axes={"t": "data", "n": "model"})
        on_mesh(loss, (P(None, "model"), P("data"), P("data")))(W, X, labels)
    for same, specs in (("W", (P(), P("data"))), ("X", (P("model"), P()))):
        split = f"{same} is the same on every device"
        with pytest.raises(ValueError, match=split):
            loss = partial(jlar.losses.cross_entropy, axes=AXES)
            on_mesh(loss, (*specs, P("data")))(W, X, labels)
    unaware = jax.shard_map(
        partial(jlar.losses.cross_entropy, axes=AXES),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P("model"), P("data"), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match="leave check_vma"):
        unaware(W, X, labels)
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        jlar.lar(W, X, axes=AXES)
