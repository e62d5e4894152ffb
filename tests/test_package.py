"""The package as installed: what `import jlar` pulls in, and what it exports."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jlar

EXTRAS = "optax orbax chex matplotlib tqdm tyro grain tokenizers flax jlar_experiments".split()


def test_import_pulls_in_nothing_of_the_extras():
    script = f"import sys, jlar; print([m for m in {EXTRAS} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_has_a_docstring():
    import jlar

    # The suite's import hook puts jaxtyping there.
    public = {name for name in dir(jlar) if not name.startswith("_")} - {"jaxtyping"}
    assert "lar" in public
    assert [name for name in public if not (getattr(jlar, name).__doc__ or "").strip()] == []


def loss(W, X):
    value, e = jlar.losses.cross_entropy(W, X, jnp.arange(len(X)) % len(W), chunk=8)
    return value + e.keep_rate


def ranks(W, X):
    s = jlar.spectra(W, X)
    numbers = (s.lar, s.stable_rank, s.effective_rank, s.corr, s.rank_corr, s.participation_q)
    return sum(numbers) + sum(s.top(2)) + jlar.spectra(W, X, method="svd").p[0]


def captured(W, X):
    value, seen = jlar.capture(lambda W: jnp.sum(jnp.tanh(X @ W.T)))(W)
    return value + sum(jlar.metrics(seen).values())


FUNCTIONS = {
    "lar": jlar.lar,
    "energies": lambda W, X: jlar.energies(W, X).effective_dimension,
    "grams": lambda W, X: jlar.grams(W, X).lar,
    "spectra": ranks,
    "alignment": lambda W, X: jlar.alignment(W, X).lar,
    "principal": lambda W, X: jlar.principal_dimension(X) + 0.0 * jnp.sum(W),
    "loss": loss,
    "captured": captured,
}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_good_data_under_every_check_of_jax(name, jit):
    """The monitor's is in test_monitor.py, captures of other programs in test_capture.py."""
    W, X = jax.random.normal(jax.random.key(0), (2, 16, 12))
    f = jax.value_and_grad(FUNCTIONS[name])
    with jax.debug_nans(True), jax.debug_infs(True), jax.enable_checks(True):
        value, gradient = (jax.jit(f) if jit else f)(W[:8], X)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
