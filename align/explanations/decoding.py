"""Why two continuations part: known mistakes, tried on torch's own logits, and on torch itself."""

from __future__ import annotations


def mistakes_of(found, replayed, start, strategy):
    return []


def explained(session, step, cases):
    return None
