"""Numbers on the command line: each is what it says, or refused with what it has to be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive(text: str) -> int:
    """A whole number above 0."""
    return asked(text, int, lambda number: number > 0, "a whole number above 0")


def whole(text: str) -> int:
    """A whole number from 0 on."""
    return asked(text, int, lambda number: number >= 0, "a whole number of 0 or more")


def two_or_more(text: str) -> int:
    return asked(text, int, lambda number: number >= 2, "enough: one iteration shows no error that a step makes; "
                 "give 2 or more")


def above_zero(text: str) -> float:
    """A finite number above 0."""
    return asked(text, float, lambda number: 0 < number < math.inf, "a number above 0")


def not_below_zero(text: str) -> float:
    """A finite number from 0 on."""
    return asked(text, float, lambda number: 0 <= number < math.inf, "a number of 0 or more")


def below_one(text: str) -> float:
    return asked(text, float, lambda number: 0 <= number < 1, "a number from 0 to below 1")


def between_zero_and_one(text: str) -> float:
    return asked(text, float, lambda number: 0 < number < 1, "a rate between 0 and 1, as 0.1")


def asked(text: str, kind: Callable[[str], Number], holds: Callable[[Number], bool], told: str) -> Number:
    """A number that ``holds``; what is none, or another one, is not what is ``told``."""
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not holds(number):
        raise argparse.ArgumentTypeError(f"{text} is not {told}")
    return number
