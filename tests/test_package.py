"""The package as installed: what `import jlar` pulls in, and what it exports."""

import subprocess
import sys

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
