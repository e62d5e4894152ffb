"""Scripts of a page, one for each way to train with `jlar.capture`: python -m jlar_experiments.recipes.NAME."""
