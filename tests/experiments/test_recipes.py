"""Every recipe trains a model, and what it calls LAR is LAR."""

import importlib
import importlib.util
import pkgutil
from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

import reference
from jlar_experiments import recipes

NAMES = [module.name for module in pkgutil.iter_modules(recipes.__path__)]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What the recipes that have run returned."""
    return {}


def result(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in results:
        with install_import_hook("jlar_experiments.recipes", "beartype.beartype"):
            recipe = importlib.import_module(f"jlar_experiments.recipes.{name}")
        with jax.numpy_dtype_promotion("standard"):  # as users run it; optax and haiku promote
            results[name] = recipe.main()
    return results[name]


def test_recipes_are_found():
    assert len(NAMES) >= 13


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_the_lar_is_that_of_numpy(name, results, capsys):
    seen = result(results, name)
    losses = np.array(seen["losses"])
    assert np.isfinite(losses).all() and losses[-5:].mean() < 0.75 * losses[0]
    wanted = reference.lar(seen["W"], seen["X"])
    np.testing.assert_allclose(seen["lar"], wanted, rtol=0, atol=1e-5)
    said = capsys.readouterr().out.splitlines()
    assert said and len(said) <= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_one_page_that_says_what_it_shows(name):
    spec = importlib.util.find_spec(f"jlar_experiments.recipes.{name}")
    source = spec.loader.get_source(spec.name)
    assert len(source.splitlines()) <= 60 and source.startswith('"""')


def test_of_a_partly_frozen_model_the_trained_part_can_be_had_alone(results):
    assert result(results, "frozen_layers")["trained"] == ["layers.2.weight"]


def test_spectra_of_a_sharded_matrix_are_those_of_numpy(results):
    seen = result(results, "spectra_on_a_mesh")
    assert len(seen["W"].sharding.device_set) == jax.device_count() == 8
    wanted = reference.spectra(seen["W"], seen["X"])
    np.testing.assert_allclose(seen["seen"].p, wanted.p, rtol=0, atol=1e-5)
    np.testing.assert_allclose(seen["seen"].q, wanted.q, rtol=0, atol=1e-4)


def test_dropout_draws_anew_in_each_step(results):
    seen = result(results, "with_nnx")
    assert seen["rest"]["dropout"]["rngs"]["count"][...] == len(seen["losses"])


def test_padding_is_left_out(results):
    seen = result(results, "padding_masks")
    assert len(seen["X"]) == 78 and float(abs(seen["X"]).max()) < 50


def test_the_monitor_in_a_step_rings_on_few_data_and_not_on_many(results):
    seen = result(results, "monitor_in_a_step")
    assert seen["monitor"].first_alarm_step > 0 and not seen["baseline"].first_alarm_step


def test_a_tracker_gets_floats_by_name_and_tensorboard_a_file(results, tmp_path):
    result(results, "tracking")
    recipe = importlib.import_module("jlar_experiments.recipes.tracking")
    logged = []

    class Tracker(recipe.TensorBoard):
        def log(self, scalars, step):
            super().log(scalars, step)
            logged.append((step, scalars))

    tracker = Tracker(str(tmp_path))
    with jax.numpy_dtype_promotion("standard"):
        recipe.main(steps=21, tracker=tracker)
    tracker.writer.close()
    assert [step for step, _ in logged] == [0, 10, 20]
    assert all(set(each) == {"loss", "lar/up", "lar/down"} for _, each in logged)
    assert all(type(value) is float for _, each in logged for value in each.values())
    assert b"lar/up" in next(tmp_path.iterdir()).read_bytes()
