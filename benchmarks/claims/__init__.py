"""Every claim there is, in the order in which they are measured: those on 28 layers stand together, at the end."""

from __future__ import annotations

from ..claim import Claim
from . import copy, memory, paddlenlp, paging, script, start

CLAIMS: tuple[Claim, ...] = (*start.CLAIMS, *copy.CLAIMS, *script.CLAIMS, *memory.CLAIMS, *paddlenlp.CLAIMS,
                             *paging.CLAIMS, *copy.LARGE, *memory.LARGE, *paging.LARGE)
