"""What paired answers to the same questions say of two runs."""

import math

from .running import Result


def mcnemar(ours: list[Result], theirs: list[Result]) -> tuple[int, int, float]:
    """
    McNemar's exact test over the questions that both runs answered.

    Returns:
        How many questions only ours has right, how many only theirs, and the two-sided probability of counts at least
        that unequal if each were as likely (McNemar, Psychometrika 1947).
    """
    right = {result.id: result.is_right for result in theirs}
    pairs = [(result.is_right, right[result.id]) for result in ours if result.id in right]
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    return won, lost, mcnemar_probability(won, lost)


def mcnemar_probability(won: int, lost: int) -> float:
    """The two-sided probability of counts at least that unequal if each question were as likely to be either."""
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def is_running(results: list[Result], baseline: list[Result]) -> bool:
    """
    Whether a run that is to take less shows it: not if no question takes fewer tokens or operations than in the run
    that it is compared with, nor if every answer is that one's, letter by letter.
    """
    same = {result.id: result for result in baseline}
    pairs = [(result, same[result.id]) for result in results if result.id in same]
    return any(_takes_less(own, other) for own, other in pairs) and any(
        own.answer != other.answer for own, other in pairs
    )


def _takes_less(own: Result, other: Result) -> bool:
    is_counted = own.operations is not None and other.operations is not None
    return own.tokens_inner < other.tokens_inner or (is_counted and own.operations < other.operations)
