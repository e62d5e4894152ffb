"""Level, slope and noise of a series over log2(step), from a window of its last points."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

WINDOW = 48  # points held
RESOLUTION = 1 / 64  # doublings: points closer than this are pooled into one
FEWEST = 6  # points of the smallest mean
ENOUGH = 12  # points before anything is said
NOISE_SPAN, NOISE_FEWEST = 1.0, 16  # doublings, and points at least, that the noise is from


class Window(eqx.Module):
    """The last `WINDOW` points (log2 of the step, value), pooled to `RESOLUTION`, oldest first.

    Time is counted in doublings because training is: a window of an eighth of a doubling is as
    short as needed early and as long as affordable late, whatever a step is and however often it
    is logged. Outliers are clipped where they are used, so a point alone moves nothing far.
    """

    doublings: Float[Array, "*runs window"]
    values: Float[Array, "*runs window"]
    filled: Int[Array, "*runs"]
    pending: Float[Array, "*runs 3"]
    """Sums over the points not yet in the window: of log2(step), of the values, and their count."""

    @classmethod
    def empty(cls, count: int) -> "Window":
        """A stack of windows that have seen nothing."""
        nothing = jnp.zeros((count, WINDOW), jnp.float32)
        pending = jnp.zeros((count, 3), jnp.float32)
        return cls(nothing, nothing, jnp.zeros(count, jnp.int32), pending)

    def push(
        self, doublings: Float[Array, ""], value: Float[Array, ""]
    ) -> tuple["Window", Bool[Array, ""]]:
        """The window with this point, and whether a pooled point has entered; nan never does."""
        finite = jnp.isfinite(value) & jnp.isfinite(doublings)
        point = jnp.stack([doublings, value, jnp.ones((), jnp.float32)])
        pending = self.pending + jnp.where(finite, point, 0)
        due = (self.filled == 0) | (doublings - self.doublings[-1] >= RESOLUTION)
        enters = finite & due

        def shifted(held: Array, total: Array) -> Array:
            mean = total / jnp.maximum(pending[2], 1)
            return jnp.where(enters, jnp.append(held[1:], mean), held)

        pushed = Window(
            shifted(self.doublings, pending[0]),
            shifted(self.values, pending[1]),
            jnp.minimum(self.filled + enters.astype(jnp.int32), WINDOW),
            jnp.where(enters, 0, pending),
        )
        return pushed, enters

    @property
    def enough(self) -> Bool[Array, ""]:
        """Whether there are points enough to say anything."""
        return self.filled >= ENOUGH

    def level(self, span: float, single: Float[Array, ""]) -> tuple[Array, Array]:
        """Means of log2(step) and of the values over the last `span` doublings.

        Values further than four times `single`, the standard deviation of a point, from the median
        are clipped.
        """
        inside = self._newest(span)
        middle = _median(self.values, inside)
        clipped = jnp.clip(self.values, middle - 4 * single, middle + 4 * single)
        return _mean(self.doublings, inside), _mean(clipped, inside)

    def slope(self, span: float) -> Float[Array, ""]:
        """Least-squares change per doubling over the last `span` doublings."""
        inside = self._newest(span)
        u = jnp.where(inside, self.doublings - _mean(self.doublings, inside), 0)
        y = self.values - _mean(self.values, inside)
        return _sum(u * y) / _sum(u * u)

    @property
    def noise(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Standard deviation of a point, and of the mean of many times the root of their number.

        From what is left of a point after interpolation between its neighbours, which a trend
        hardly touches, by the median absolute value, which outliers hardly touch. With noise of
        autocorrelation rho from point to point its variance is (1 - rho)(3 - rho) / 3 of that with
        neighbours four points away, which gives rho; the mean of many has (1 + rho) / (1 - rho)
        times the variance it has without. Infinite before there are enough points.
        """
        both = zip(self._residuals(1), self._residuals(4), strict=True)
        near, far = jnp.square(1.4826 * jax.vmap(_median)(*map(jnp.stack, both)))
        share = jnp.minimum(near / jnp.maximum(far, 1e-30), 1)
        rho = jnp.clip(2 - jnp.sqrt(1 + 3 * share), 0, 0.9)
        single = jnp.where(self.enough, jnp.maximum(near, far), jnp.inf)
        return jnp.sqrt(single), jnp.sqrt(single * (1 + rho) / (1 - rho))

    @property
    def resolution(self) -> Float[Array, ""]:
        """Smallest difference of neighbours that is none: what a log was rounded to, if it was."""
        steps = jnp.abs(jnp.diff(self.values))
        held = jnp.arange(WINDOW - 1) >= WINDOW - self.filled
        smallest = _min(jnp.where(held & (steps > 1e-6), steps, jnp.inf))
        return jnp.where(jnp.isfinite(smallest), smallest, 0)

    def _newest(self, span: float, fewest: int = FEWEST) -> Bool[Array, "window"]:
        place = jnp.arange(WINDOW)
        recent = self.doublings >= self.doublings[-1] - span
        return (place >= WINDOW - self.filled) & (recent | (place >= WINDOW - fewest))

    def _residuals(self, lag: int) -> tuple[Float[Array, "window"], Bool[Array, "window"]]:
        """What interpolation between points `lag` away leaves of each, padded, and which count."""
        before, at, after = (slice(i, i + WINDOW - 2 * lag) for i in (0, lag, 2 * lag))
        u, y = self.doublings, self.values
        w = (u[after] - u[at]) / jnp.maximum(u[after] - u[before], RESOLUTION / 2)
        r = jnp.abs(y[at] - w * y[before] - (1 - w) * y[after])
        r = r / jnp.sqrt(1 + w * w + (1 - w) * (1 - w))
        # Only the last doubling: the rise of the warm-up is too steep to be told from noise.
        valid = self._newest(NOISE_SPAN, NOISE_FEWEST)[before]
        return jnp.pad(r, (0, 2 * lag)), jnp.pad(valid, (0, 2 * lag))


def _median(values: Float[Array, "k"], where: Bool[Array, "k"]) -> Float[Array, ""]:
    """The upper median, by counting: a few times faster than a sort of so few."""
    values = jnp.where(where, values, jnp.inf)
    no_more = _sum((values[:, None] >= values).astype(jnp.int32))
    half = _count(where) // 2
    return _min(jnp.where(no_more > half, values, jnp.inf))


def _mean(values: Float[Array, "k"], where: Bool[Array, "k"]) -> Float[Array, ""]:
    return _sum(jnp.where(where, values, 0)) / _count(where).astype(jnp.float32)


def _count(where: Bool[Array, "k"]) -> Int[Array, ""]:
    return _sum(where.astype(jnp.int32))


def _sum(values: Shaped[Array, "*rows k"]) -> Shaped[Array, "*rows"]:
    return jnp.sum(_folded(jnp.add, values), axis=-1)


def _min(values: Float[Array, "k"]) -> Float[Array, ""]:
    return jnp.min(_folded(jnp.minimum, values))


def _folded(
    two: Callable[[Array, Array], Array], values: Shaped[Array, "*rows k"]
) -> Shaped[Array, "*rows half"]:
    """One half on the other: XLA's CPU compiler splits reductions of more than 32 numbers into two
    kernels each, and what takes time here is the number of kernels. Of an odd number the middle one
    is in both halves, which a minimum does not notice."""
    half = (values.shape[-1] + 1) // 2
    return two(values[..., :half], values[..., -half:])
