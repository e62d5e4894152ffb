"""What differs between versions of JAX, and the one private name of it that jlar uses."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.extend.core as jex

try:
    # Under a trace it becomes one equation; jaxpr_as_fun would trace each of its equations anew,
    # which doubles the time to trace a model. Op by op both do the same.
    from jax._src.lax.eval_jaxpr import eval_jaxpr_p
except ImportError:
    eval_jaxpr_p = None
PROGRAM = "call_jaxpr" if jax.__version_info__ >= (0, 12) else "jaxpr"


def stage(closed: jex.ClosedJaxpr, *args: Any) -> list[Any]:
    """What the program computes of these arguments."""
    if eval_jaxpr_p is None:
        return jex.jaxpr_as_fun(closed)(*args)
    return eval_jaxpr_p.bind(*args, **{PROGRAM: closed})


def height(eqns: Iterable[Any]) -> dict[str, bool]:
    """What a program has to be told beyond its equations: since JAX 0.12, if one is "high"."""
    if jax.__version_info__ < (0, 12):
        return {}
    types = ((eqn, [atom.aval for atom in eqn.invars]) for eqn in eqns)
    return {"is_high": any(eqn.primitive.is_high(*of, **eqn.params) for eqn, of in types)}


def scanned(params: dict[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are the same in every iteration, and how many it carries."""
    if "ft_in" in params:  # since JAX 0.11
        constant, carried, _ = map(len, params["ft_in"].unpack())
        return constant, carried
    return params["num_consts"], params["num_carry"]
