"""How well two scores agree on the order of cells: Spearman's rank correlation with an interval (paper, figures 3 and 4).

ρ is Pearson's correlation of the ranks. Tied values share the mean of their ranks, as in SciPy.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

MIN_POINTS = 3  # with two, ρ is 1 or −1 for any scores


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ of `count` pairs, nan where one side is constant, and the ends of its 95 % bootstrap interval."""

    rho: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"ρ = {self.rho:.2f} ({self.low:.2f} to {self.high:.2f}, n = {self.count})"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> RankCorrelation:
    """ρ and its interval together. Raises as `spearman` does.

    >>> print(rank_correlation([0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]))
    ρ = 1.00 (1.00 to 1.00, n = 4)
    """
    return RankCorrelation(spearman(x, y), *bootstrap_interval(x, y), len(x))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """ρ of the pairs (x[i], y[i]), from −1 to 1; nan if all x or all y are equal, because then there is no order.

    Raises ValueError for different lengths, fewer than three pairs, or a value that is not finite.

    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 12)  # 1 − 6·(0 + 1 + 1 + 0) / (4·15)
    0.8
    """
    return float(_rho(*_pairs(x, y)))


def bootstrap_interval(
    x: Sequence[float], y: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of ρ: cells are drawn with replacement, each with both its scores.

    It says how far ρ may be off because only these cells were scored; the noise in each score is not part of it. Draws in
    which one side is constant have no ρ and are left out; (nan, nan) if none is left. The same `seed` gives the same
    interval. Raises ValueError as `spearman` does, and for a level that is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    pairs, rng = _pairs(x, y), np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # SciPy's own interval does not allow for draws without ρ
        drawn = stats.bootstrap(
            pairs, _rho, n_resamples=resamples, paired=True, vectorized=True, method="percentile", rng=rng
        ).bootstrap_distribution
    known = drawn[~np.isnan(drawn)]
    if not known.size:
        return (np.nan, np.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def _pairs(x: Sequence[float], y: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pairs = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if pairs[0].ndim != 1 or pairs[0].shape != pairs[1].shape:
        raise ValueError(f"x and y must be as many numbers each, got shapes {pairs[0].shape} and {pairs[1].shape}")
    if pairs[0].size < MIN_POINTS:
        raise ValueError(f"a rank correlation needs at least {MIN_POINTS} pairs, got {pairs[0].size}")
    if not all(np.isfinite(side).all() for side in pairs):
        raise ValueError("scores must be finite: leave out the cells without a score")
    return pairs


def _rho(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """ρ along `axis`, for many draws at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # nan is the documented result
        ranks = (stats.rankdata(side, axis=axis) for side in (x, y))
        return np.asarray(stats.pearsonr(*ranks, axis=axis).statistic)


def ties(scores: Sequence[float]) -> str | None:
    """A sentence if most scores are equal, as for networks that all predict one class; else None.

    >>> ties([0.05, 0.05, 0.05, 0.2])
    'most scores are the same, 5.00 %, so their order says nothing: train longer, or with a higher learning rate'
    >>> ties([0.05, 0.1, 0.2]), ties([0.05])
    (None, None)
    """
    score, count = Counter(round(score, 6) for score in scores).most_common(1)[0]
    if count < 2 or 2 * count <= len(scores):
        return None
    return (
        f"most scores are the same, {100 * score:.2f} %, so their order says nothing: "
        "train longer, or with a higher learning rate"
    )
