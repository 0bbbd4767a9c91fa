"""What a planted fault is: what is broken, where, which name is right, and which explanation would be true."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

Plant = Callable[[Path], AbstractContextManager[None]]
Place = Literal["checkpoint", "config", "net", "set-up", "training", "decoding"]
Changes = tuple[tuple[str, Any], ...]


class NotPlanted(Exception):
    """A fault that never came into effect proves nothing about who overlooks it."""


@dataclass(frozen=True)
class Fault:
    """``plant(output)`` breaks what lies in, or is loaded from, the directory ``output``.

    ``expected`` are patterns (fnmatch) of the parameters and operations that may be named, ``block`` the first module
    whose output is wrong. ``explanation`` holds the words of ``EXPLANATIONS`` one of which is asked for, None where
    no stock can be asked to have one; ``also`` those that would be true all the same. ``visible``: whether any output,
    be it a sublayer's, changes beyond the noise. ``changes`` are entries of the demo's config that the checkpoint has
    otherwise. ``stage`` is the one that has to tell, asked with ``flags``; ``says`` is what its explanation has to say
    besides.
    """

    kind: str
    family: str
    place: Place
    how: str
    plant: Plant = field(repr=False)
    block: str
    expected: frozenset[str]
    explanation: frozenset[str] | None
    visible: bool = True
    why: str = ""
    also: frozenset[str] = frozenset()
    target: str = "models"
    changes: Changes = ()
    stage: str = "forward"
    flags: tuple[str, ...] = ()
    says: str = ""

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.kind}/{self.family}/{self.place}{'' if self.how != 'weights held' else '-weights'}"

    def is_named_by(self, name: str | None) -> bool:
        """Whether ``name`` is one of those that are right."""
        return name is not None and any(fnmatchcase(name, pattern) for pattern in self.expected)


def words(explanation: str | None) -> frozenset[str] | None:
    """Words of ``EXPLANATIONS``, which are written with | between them."""
    return frozenset(explanation.split("|")) if explanation else None


EXPLANATIONS: dict[str, tuple[str, ...]] = {
    "transposed": ("transposed-weight",),
    "swapped": ("swapped-weights", "qkv-order"),
    "layers": ("swapped-layers", "shifted-layers", "swapped-weights"),
    "activation": ("gelu-variant", "activation"),
    "epsilon": ("layer-norm-epsilon", "batch-norm-epsilon"),
    "bias missing": ("missing-bias",),
    "untied": ("untied-weight", "tied-weights"),
    "rotary style": ("rotary-style",),
    "rotary dimension": ("rotary-dimension",),
    "rotary missing": ("rotary-missing",),
    "rotary base": ("rotary-base",),
    "rotary direction": ("rotary-direction",),
    "heads": ("head-count",),
    "scale": ("attention-scale",),
    "softmax": ("attention-softmax",),
    "mask value": ("mask-value",),
    "mask polarity": ("mask-polarity",),
    "padding": ("padding-mask-missing",),
    "no mask": ("mask-missing",),
    "causal": ("causal-mask-missing",),
    "causal offset": ("causal-mask-shifted",),
    "causal after all": ("causal-mask-added",),
    "position": ("position-offset",),
    "token types": ("token-types",),
    "dropout": ("dropout",),
    "rounded to fp16": ("rounded-to-float16",),
    "rounded to bf16": ("rounded-to-bfloat16",),
    "buffer": ("wrong-buffer",),
    "alibi": ("alibi-missing", "alibi-positions", "alibi-slopes"),
    "norm placed": ("layer-norm-placement",),
    "norm missing": ("layer-norm-missing",),
    "norm variant": ("layer-norm-variant",),
    "residual": ("missing-residual",),
    "branch": ("missing-branch",),
    "branch scale": ("branch-scale",),
    "skipped": ("skipped-block",),
    "embedding scale": ("embedding-scale",),
    "pooling": ("pooling",),
    "permuted": ("permuted-weight", "head-layout"),
    "scaled": ("scaled-weight",),
    "added": ("shifted-weight",),
    "sign": ("sign",),
    "zeros": ("constant-weight",),
    "not finite": ("nonfinite-weight",),
    "kernel": ("flipped-kernel",),
    "channels": ("channel-order",),
    "statistics": ("missing-statistics",),
    "of the batch": ("batch-statistics",),
    "batch norm missing": ("batch-norm-missing",),
    "stride": ("stride-placement",),
    "borders": ("padding-mode",),
    "dilation": ("dilation",),
    "pooling kind": ("pooling-kind",),
    "late shortcut": ("residual-placement",),
    "relative positions": ("relative-positions",),
    "rotary frequencies": ("rotary-frequencies",),
    "residual scale": ("residual-scale",),
    "logits scale": ("logits-scale",),
    "loss": ("loss",),
    "decay group": ("decay-group",),
    "weight decay": ("weight-decay",),
    "decay as L2": ("l2-decay",),
    "epsilon in the root": ("epsilon-inside-root",),
    "epsilon of the optimizer": ("epsilon",),
    "schedule": ("schedule",),
    "base rate": ("base-rate",),
    "schedule ahead": ("schedule-ahead",),
    "schedule behind": ("schedule-behind",),
    "schedule missing": ("schedule-missing",),
    "schedule length": ("schedule-length",),
    "schedule end": ("schedule-end",),
    "schedule per epoch": ("schedule-per-epoch",),
    "schedule per batch": ("schedule-per-batch",),
    "clipping": ("clipping",),
    "clipped too early": ("clipped-before-accumulation",),
    "not cleared": ("not-cleared",),
    "not updated": ("not-updated",),
    "rate of a group": ("rate-factor",),
    "betas": ("betas",),
    "momentum": ("momentum",),
    "eval mode": ("eval-mode",),
    "dropout scale": ("dropout-scale",),
    "dropout missing": ("dropout-missing",),
    "dropout rate": ("dropout-rate",),
    "biased variance": ("biased-variance",),
    "accumulation": ("accumulation",),
    "batch order": ("batch-order",),
    "decoding": ("decoding",),
}
"""The words of this file, and the kinds of explanation that say the same."""

GENERIC = ("changed-weight", "changed-elements", "changed-rows", "several-weights", "unrelated-weight")
"""Kinds that only say that a weight is another one: true of every wrong weight, and not asked for of any."""
