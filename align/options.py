"""Numbers on the command line: each is what it says, or refused with what it has to be."""

from __future__ import annotations

import argparse
import math


def whole(text: str) -> int:
    """Of 0 or more."""
    number = _number(text)
    if number < 0 or number % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 0 or more")
    return int(number)


def two_or_more(text: str) -> int:
    """2 or more."""
    if (number := whole(text)) < 2:
        raise argparse.ArgumentTypeError("one iteration shows no error that a step makes; give 2 or more")
    return number


def not_below_zero(text: str) -> float:
    if not (number := _number(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return number


def above_zero(text: str) -> float:
    if not (number := _number(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def below_one(text: str) -> float:
    if not 0 <= (number := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return number


def between_zero_and_one(text: str) -> float:
    if not 0 < (number := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a rate between 0 and 1, as 0.1")
    return number


def _number(text: str) -> float:
    """-1, which each of these refuses, where it is no finite number."""
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0
