"""NumPy float64 re-implementation straight from the paper; shares no code with jlar."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def as_float64(a) -> ndarray:
    return np.asarray(a).astype(np.float64)


def rms(a: ndarray) -> float:
    return float(np.sqrt(np.mean(a**2)))


def kept_rows(X, mask=None) -> Float[ndarray, "t n"]:
    X = as_float64(X)
    rows = X.reshape(-1, X.shape[-1])
    return rows if mask is None else rows[np.asarray(mask).reshape(-1).astype(bool)]


def lar(W, X, mask=None) -> float:
    """Equation (1), by the RMS norms of the products themselves."""
    W, X = as_float64(W), kept_rows(X, mask)
    Y = np.stack([W @ x for x in X])
    return float(np.log(rms(Y) / (rms(W) * rms(X))) / np.log(W.shape[1]))


def log_n(a: float, n: int) -> float:
    return float(np.log(a) / np.log(n))


class Spectra(NamedTuple):
    p: Float[ndarray, "n"]
    q: Float[ndarray, "n"]
    basis: Float[ndarray, "n n"]


def spectra(W, X, mask=None) -> Spectra:
    """Equation (2) and the definition of q, the null space of W completed to a basis of R^n."""
    W, X = as_float64(W), kept_rows(X, mask)
    n = W.shape[1]
    _, s, Vt = np.linalg.svd(W, full_matrices=True)
    p = np.zeros(n)
    for i, value in enumerate(s):
        p[i] = value**2
    p /= p.sum()
    q = np.array([sum((v @ x) ** 2 for x in X) for v in Vt]) / sum(x @ x for x in X)
    return Spectra(p, q, Vt)


def principal_dimension(X, fraction=0.95, mask=None) -> int:
    X = kept_rows(X, mask)
    s = np.linalg.svd(X - X.mean(0), compute_uv=False) ** 2
    share = np.cumsum(s) / s.sum()
    return int(np.searchsorted(share, fraction) + 1)


def effective_rank(W) -> float:
    s = np.linalg.svd(as_float64(W), compute_uv=False)
    s = s[s > 0] / s.sum()
    return float(np.exp(-(s * np.log(s)).sum()))


def stable_rank(W) -> float:
    W = as_float64(W)
    return float(np.linalg.norm(W, "fro") ** 2 / np.linalg.norm(W, 2) ** 2)
