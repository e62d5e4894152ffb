"""The README: each Python block runs by itself and prints the comment it ends in."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)((?:# [^\n]*\n)*)```", README, re.DOTALL)
LINKS = re.findall(r"\]\(([^)#]+)(#[^)]+)?\)", README)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_can_be_pasted(number, capsys):
    code, printed = BLOCKS[number]
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):  # JAX's own defaults
        exec(compile(code, f"README.md, block {number}", "exec"), {"__name__": "__main__"})
    lines = [f"# {line}" for line in capsys.readouterr().out.splitlines()]
    assert lines and lines == printed.splitlines()


def test_the_readme_is_short_and_opens_with_what_it_is():
    assert len(BLOCKS) >= 4 and ">>>" not in README
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 900


def test_what_the_readme_links_to_exists():
    for path, section in LINKS:
        if "://" in path:
            continue
        assert (ROOT / path).exists(), path
        if section:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.M)
            assert section[1:] in [title.lower().replace(" ", "-") for title in titles]
