"""Budgets that are shared out sum up, follow the weights, and respect what each can take."""

import pytest
import torch

from holitom_hf.merging.apportionment import apportion, evenly


@pytest.mark.parametrize("total", [0, 1, 5, 17, 40])
def test_shares_are_those_of_a_plain_loop_over_tokens(total):
    """Webster's method one token at a time: the next goes to the largest weight / (2 * what it has + 1)."""
    weights = torch.rand(6, generator=torch.Generator().manual_seed(total)) + 0.05
    capacity = [9, 2, 12, 7, 3, 12]
    given = [0] * 6
    for _ in range(total):
        free = [i for i in range(6) if given[i] < capacity[i]]
        given[max(free, key=lambda i: float(weights[i]) / (2 * given[i] + 1))] += 1
    assert apportion(weights, torch.tensor(capacity), total, 12).tolist() == given


def test_shares_that_are_whole_are_given_as_they_are():
    assert apportion(torch.tensor([1.0, 1, 2, 4]), 10, 16, 10).tolist() == [2, 2, 4, 8]
    # Rounded each on its own they are 1, 2 and 4, which is the sum asked for.
    assert apportion(torch.tensor([1.2, 1.9, 3.9]), 10, 7, 10).tolist() == [1, 2, 4]


def test_each_is_shown_before_any_is_shown_twice():
    weights = torch.tensor([100.0, 0.0, 1.0])
    assert apportion(weights, 9, 3, 9, is_each_shown=True).tolist() == [1, 1, 1]
    assert apportion(weights, 9, 5, 9, is_each_shown=True).tolist() == [3, 1, 1]
    assert apportion(weights, 9, 5, 9).tolist() == [5, 0, 0]


def test_what_is_preferred_is_given_first():
    weights, preferred = torch.tensor([3.0, 1.0]), torch.tensor([2, 5])
    assert apportion(weights, 9, 6, 9, preferred=preferred).tolist() == [2, 4]
    assert apportion(weights, 9, 9, 9, preferred=preferred).tolist() == [4, 5]


def test_even_shares_differ_by_one_at_most_and_are_spread_out():
    assert evenly(10, 4, torch.device("cpu")).tolist() == [2, 3, 2, 3]
    assert evenly(2, 6, torch.device("cpu")).tolist() == [0, 0, 1, 0, 0, 1]
