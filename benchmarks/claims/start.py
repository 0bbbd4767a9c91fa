"""The start: a command that only tells something answers at once."""

from __future__ import annotations

from ..bench import Bench
from ..claim import Claim, Limit, Measured, absolute

SECONDS = 0.25


def answer(bench: Bench, flag: str) -> Measured:
    """Wall time of ``convert.gptj`` with ``flag`` beside an interpreter that does nothing."""
    ours, rival = bench.alternately(f"convert.gptj {flag} and python -c pass",
                                    lambda: bench.python("-m", "convert.gptj", flag).seconds,
                                    lambda: bench.python("-c", "pass").seconds, bench.scale.starts)
    return absolute(ours, rival, "s")


CLAIMS = tuple(
    Claim(f"start.{flag}", f"`python -m convert.gptj --{flag}` answers at once", Limit(SECONDS, "s"),
          "`python -c pass`", lambda bench, flag=flag: answer(bench, f"--{flag}"))
    for flag in ("help", "rules")
)
