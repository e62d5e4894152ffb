"""The suite's house rules: eight CPU devices, strict dtypes and ranks, shapes checked at run time.

Not `jax_debug_nans` and `jax_debug_infs`: nan is the documented answer to bad data, which hundreds
of tests ask for. test_package.py has every public function on good data under both.
"""

import jax
import pytest
from jaxtyping import config, install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

with install_import_hook(["jlar", "jlar_experiments", "reference"], "beartype.beartype"):
    import jlar  # noqa: F401
    import reference  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def strict_promotion(request):
    """No implicit promotion of dtypes, nor of ranks but in models, which are as users write them.

    Of the modules, for what they share is compiled once only if it sees the same.
    """
    studies = {"experiments", "jlar_experiments"}.intersection(request.path.parts)
    ranks = "allow" if studies or request.path.name.startswith("test_capture") else "raise"
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion(ranks):
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
