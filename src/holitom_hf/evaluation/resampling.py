"""What is known of an accuracy, or of a difference of two, from so many videos: paired bootstrap intervals."""

from collections.abc import Iterable

import numpy as np

from .running import Result


NUM_RESAMPLES = 2000
# Videos below which resampling them says nothing of others: its intervals are too narrow, or have no width at all.
MIN_VIDEOS = 30


class Resampled:
    """
    The same resamples of videos for everything compared, so that differences of accuracies are paired: a video that is
    hard for one run is drawn as often for the other.
    """

    def __init__(self, videos: set[str], seed: int = 0):
        """
        Args:
            videos: Their names.
            seed: Of what is drawn; of sets that have nothing to do with each other, each has its own.
        """
        self.number = {video: index for index, video in enumerate(sorted(videos))}
        self.picks = np.random.default_rng(seed).integers(len(videos), size=(NUM_RESAMPLES, len(videos)))

    def _sums(self, results: Iterable[Result]) -> tuple[np.ndarray, np.ndarray]:
        right, asked = np.zeros(len(self.number)), np.zeros(len(self.number))
        for result in results:
            right[self.number[result.video]] += result.is_right
            asked[self.number[result.video]] += 1
        return right, asked

    def accuracies(self, results: Iterable[Result]) -> np.ndarray:
        """(NUM_RESAMPLES,) accuracy in every resample; NaN where one has no such question."""
        right, asked = self._sums(results)
        with np.errstate(invalid="ignore"):
            return right[self.picks].sum(1) / asked[self.picks].sum(1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Between which 95 % of the resamples lie."""
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


def verdict(low: float, high: float, undecided: str = "cannot be told") -> str:
    """What an interval of a difference says of the claim that it is positive."""
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else undecided


def interpolated(at: float, places: list[float], curves: list[np.ndarray]) -> np.ndarray:
    """(NUM_RESAMPLES,) values between those of `curves` at the ascending `places`, resample by resample."""
    right = min(int(np.searchsorted(places, at)), len(places) - 1)
    left = max(right - 1, 0)
    width = places[right] - places[left]
    share = min((at - places[left]) / width, 1.0) if width > 0 else 1.0
    return (1 - share) * curves[left] + share * curves[right]


def points(difference: float, low: float, high: float) -> str:
    """A difference of accuracies with its interval, in percentage points."""
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
