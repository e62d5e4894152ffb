"""The suite's house rules: eight CPU devices, strict dtypes, shapes checked at run time."""

import jax
import pytest
from jaxtyping import config, install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

with install_import_hook(["jlar", "jlar_experiments", "reference"], "beartype.beartype"):
    import jlar  # noqa: F401
    import reference  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """No implicit dtype promotion inside the library (the README's optax example needs some).

    Of the modules, for what they share is compiled once only if it sees the same.
    """
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Without the jaxtyping hook, as users run: it would pre-empt the library's own errors."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
