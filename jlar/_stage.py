"""stage: runs a jaxpr as one equation, by the one private name of JAX that jlar uses."""

from typing import Any

import jax.extend.core as jex

try:
    # Under a trace it becomes one equation; jaxpr_as_fun would trace each of its equations anew,
    # which doubles the time to trace a model. Op by op both do the same.
    from jax._src.lax.eval_jaxpr import eval_jaxpr_p
except ImportError:
    eval_jaxpr_p = None


def stage(closed: jex.ClosedJaxpr, *args: Any) -> list[Any]:
    """What the program computes of these arguments."""
    if eval_jaxpr_p is None:
        return jex.jaxpr_as_fun(closed)(*args)
    return eval_jaxpr_p.bind(*args, jaxpr=closed)
