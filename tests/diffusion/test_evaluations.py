"""Evaluations of the network are counted while a solver runs, and steps are chosen by what they cost."""

import pytest

from jaxldm import diffusion as D

COUNTS = {  # steps -> evaluations, from the papers
    "ddim": lambda n: n,
    "dpmpp_2m": lambda n: n,
    "unipc": lambda n: n,
    "heun": lambda n: 2 * n - 1,  # the last step, onto the clean row, is Euler's
    "dpm2": lambda n: 2 * n - 1,
    "pndm": lambda n: n if n == 1 else n + 1,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_papers(name):
    count = D.evaluation_counter(D.solvers.make(name), D.VP.named("linear"), 6)
    assert [count(steps) for steps in (1, 4, 6)] == [COUNTS[name](steps) for steps in (1, 4, 6)]


def test_steps_are_the_most_that_a_budget_pays_for():
    vp, flow = D.VP.named("linear"), D.Flow()
    assert D.steps_within(D.solvers.heun(), vp, [1, 2, 9, 10]) == [(1, 1), (1, 1), (5, 9), (5, 9)]
    # The first step on a flow path starts where alpha = 0, and is Euler's.
    assert D.steps_within(D.solvers.heun(), flow, [1, 2, 9, 10]) == [(1, 1), (2, 2), (5, 8), (6, 10)]
    assert D.steps_within(D.solvers.ddim(), flow, [7]) == [(7, 7)]
