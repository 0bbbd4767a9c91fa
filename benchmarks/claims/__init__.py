"""Every claim there is, in the order in which they are measured: those that share a checkpoint stand together."""

from __future__ import annotations

from ..claim import Claim
from . import copy, memory, paddlenlp, paging, script, start

CLAIMS: tuple[Claim, ...] = (*start.CLAIMS, *copy.CLAIMS, *script.CLAIMS, *memory.CLAIMS, *paddlenlp.CLAIMS,
                             *paging.CLAIMS)
