"""How to train with `jlar.capture`, a page each: `python -m jlar_experiments.recipes.NAME`."""
