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


def is_running(results: list[Result], full: list[Result]) -> bool:
    """
    Whether a run that is to shorten videos shows it: not if no video is shorter than in the uncompressed model, nor if
    every answer is the uncompressed one's, letter by letter.
    """
    same = {result.id: result for result in full}
    pairs = [(result, same[result.id]) for result in results if result.id in same]
    return any(own.tokens_inner < other.tokens_inner for own, other in pairs) and any(
        own.answer != other.answer for own, other in pairs
    )
