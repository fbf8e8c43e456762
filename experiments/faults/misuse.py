"""Misuse of the Python API: wrong values for every argument of every public function.

Question: does every mistake in a call end in one line that names the argument?
Command:  python -m experiments.faults.misuse
Needs:    the `test-core` extra; minutes are in README.md.

For each public function there is a valid call. Each of its arguments in turn is replaced by values that
people hand in by mistake. The call must work, or raise the project's own error: one line of at most 400
characters that names the argument. Anything else is a fault.
"""

from __future__ import annotations

import collections
import contextlib
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.faults.misuse_calls import mistakes
from experiments.faults.misuse_cases import Case
from experiments.faults.misuse_rooms import all_cases
from experiments.faults.result import Result
from jaxldm.errors import JaxldmError

MOST_CHARACTERS = 400


# What a message says in place of one name, where it is about two arguments or about their outcome.
OF_SEVERAL = (
    "shapes do not go together",
    "grid must fall",
    "two steps or more",
    "got NaN",
    "must lie in 1 to",
    "one for each of",
)


class Row(NamedTuple):
    """One misuse and what came of it: "works", "refused", or a fault."""

    call: str
    argument: str
    value: str
    outcome: str
    message: str
    seconds: float

    @property
    def foreign(self) -> bool:
        """Whether it is a fault."""
        return self.outcome not in ("works", "refused")


class Anything:
    """An object of somebody's own class."""


def no_argument():
    """A function that takes nothing."""
    return 3


# What people hand in by mistake. All are made without computing on a device.
WRONG: dict[str, Any] = {
    "None": None,
    "'x'": "x",
    "''": "",
    "'1'": "1",
    "True": True,
    "0": 0,
    "1": 1,
    "-1": -1,
    "1.5": 1.5,
    "-0.5": -0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "10**30": 10**30,
    "1e39": 1e39,
    "1j": 1j,
    "b'x'": b"x",
    "[]": [],
    "[1]": [1],
    "['x']": ["x"],
    "[None]": [None],
    "[[1], [1, 2]]": [[1], [1, 2]],
    "()": (),
    "(1, 2, 3)": (1, 2, 3),
    "{}": {},
    "{'a': 1}": {"a": 1},
    "set()": set(),
    "np.float64(0.5)": np.float64(0.5),
    "np.int64(2)": np.int64(2),
    "np.zeros(0)": np.zeros(0),
    "np.zeros(3)": np.zeros(3),
    "np.zeros((2, 3, 5), np.float32)": np.zeros((2, 3, 5), np.float32),
    "np.array(['a'])": np.array(["a"]),
    "np.array([None])": np.array([None]),
    "np.array([nan])": np.array([np.nan], np.float32),
    "np.array([1], complex)": np.array([1], np.complex64),
    "np.uint8 [2, 4, 4, 1]": np.zeros((2, 4, 4, 1), np.uint8),
    "np.nan [2, 4, 4, 1]": np.full((2, 4, 4, 1), np.nan, np.float32),
    "object()": Anything(),
    "a class": Anything,
    "a function": no_argument,
    "int": int,
}


def misuses(case: Case) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(argument, its wrong value in words, all arguments), for each argument and each wrong value."""
    for argument in case.arguments:
        for words, value in WRONG.items():
            yield argument, words, {**case.arguments, argument: value}


def outcome_of(case: Case, argument: str, words: str, arguments: dict[str, Any]) -> Row:
    """The row of one misuse."""
    start = time.perf_counter()
    outcome, message = "works", ""
    try:
        with warnings.catch_warnings(), _elsewhere():
            warnings.simplefilter("ignore")
            call(case.function, arguments)
    except JaxldmError as error:
        message = str(error)
        outcome = judge(case, argument, message)
    except Exception as error:  # noqa: BLE001 (these are what is looked for)
        outcome, message = f"foreign {type(error).__name__}", str(error)
    return Row(case.name, argument, words, outcome, message, time.perf_counter() - start)


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """An empty working folder: "x" may be taken for the name of a file to write."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The call; an argument "*" is the first one, given by place."""
    by_place = [value for name, value in arguments.items() if name.startswith("*")]
    return function(*by_place, **{k: v for k, v in arguments.items() if not k.startswith("*")})


def judge(case: Case, argument: str, message: str) -> str:
    """Whether a message of the project's own error is as it should be."""
    if "\n" in message:
        return "message of several lines"
    if len(message) > MOST_CHARACTERS:
        return f"message of {len(message)} characters"
    name = argument.strip("*")
    accepted = [name, name.replace("_", " "), case.words.get(name, name), *OF_SEVERAL]
    return "refused" if any(re.search(word, message) for word in accepted) else "does not name the argument"


def run(count: int | None = None, seed: int = 0) -> Result:
    """`count` misuses, chosen evenly over the functions and their arguments; None: all of them."""
    start = time.perf_counter()
    rows = [*outcomes(None, count, seed), *of_whole_calls()]
    faults = [*refused(all_cases()), *(line_of(row) for row in rows if row.foreign)]
    return Result("misuses", len(rows), faults, time.perf_counter() - start)


def of_whole_calls() -> Iterator[Row]:
    """The rows of the mistakes of `misuse_calls`, each of which must be refused."""
    for mistake in mistakes():
        case = Case(mistake.name, lambda call=mistake.call: call(), {}, words={"call": mistake.words})
        row = outcome_of(case, "call", "as written", {})
        yield row._replace(outcome="not refused") if row.outcome == "works" else row


def refused(cases: Iterable[Case]) -> list[str]:
    """The cases whose valid call is refused: their misuses may be refused for the same reason, and hide."""
    faults = []
    for case in cases:
        row = outcome_of(case, "nothing", "valid", case.arguments)
        if (row.outcome != "works") != bool(case.refusal) or case.refusal not in row.message:
            faults.append(line_of(row))
    return faults


def outcomes(
    chosen: Collection[tuple[str, str, str]] | None = None, count: int | None = None, seed: int = 0
) -> Iterator[Row]:
    """The rows of the misuses.

    Args:
        chosen: (function, argument, value in words) of those to try; None: any.
        count: so many of them; None: all.
        seed: which ones.
    """
    every = [(case, *misuse) for case in all_cases() for misuse in misuses(case)]
    if chosen is not None:
        every = [entry for entry in every if (entry[0].name, *entry[1:3]) in chosen]
    if count is not None:  # one of each argument of each function, then a second one of each, ...
        random.Random(seed).shuffle(every)
        turns: collections.Counter[tuple[str, str]] = collections.Counter()
        order = []
        for entry in every:
            turns[entry[0].name, entry[1]] += 1
            order.append((turns[entry[0].name, entry[1]], not entry[0].cheap, len(order)))
        every = [every[place[-1]] for place in sorted(order)[:count]]
    return (outcome_of(*entry) for entry in every)


def line_of(row: Row) -> str:
    """A fault in one line."""
    return f"{row.call}({row.argument}={row.value}): {row.outcome}: {' '.join(row.message.split())[:200]}"


def main() -> None:
    """Prints every fault, and how many misuses there were."""
    result = run()
    print(*result.faults, sep="\n")
    print(f"{result.count} misuses, {len(result.faults)} faults, {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
