"""Another mask: which keys a query sees, and what hides the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import surgery
from ..place import Place
from ..surgery import Change, together
from .attention import attentions
from .variant import Dial, Idea, Variant

MASKED = -1e30


def masks(place: Place) -> Iterator[Variant | Dial]:
    """The additive masks that a block is given, made anew: which keys each query may see, and what hides the others."""
    if place.whole:
        return
    for name, attention in zip(("attention_mask", "encoder_attention_mask"), attentions(place), strict=False):
        if surgery.has_argument(place.root, name) and place.argument(name) is not None:
            yield from _masks(place, name, f"{attention.name} mask")


def _masks(place: Place, name: str, subject: str) -> Iterator[Variant | Dial]:
    """Of the argument ``name``, [batch, 1, queries or 1, keys]: additive, or True where a query may not look."""
    captured = place.argument(name)
    length = captured.shape[-1]
    tokens = torch.from_numpy(place.mask_of(length))
    tril = torch.ones(length, length, dtype=torch.bool).tril()
    real = tokens[:, None, None, :]

    def mask(function: Callable[[Any], Any]) -> Change:
        """In the place of the mask that the block is given, and of a causal one of the attention's own beside it."""
        own = [surgery.attributes(path, {"bias": torch.ones_like(module.bias)}) for path, module in place.modules(
            nn.Module) if module._buffers.get("bias") is not None and module.bias.dtype == torch.bool]
        return together(surgery.argument(name, function), *own)

    def hidden(visible: Any, value: float | None = None) -> Change:
        def make(given: Any) -> Any:
            lowest = torch.finfo(torch.float32).min if value is None else value
            return torch.where(visible, 0.0, lowest).to(given.dtype)
        return mask(make)
    causal = captured.shape[-2] > 1
    additive = captured.dtype != torch.bool
    seen = captured > MASKED if additive else ~captured
    yield Variant("mask-missing", subject, "is missing: every query sees every key", hidden(torch.ones_like(seen)))
    if causal:
        yield Variant("causal-mask-missing", subject, "is not causal: queries see the keys behind them",
                      hidden(real.expand(seen.shape)))
        yield Variant("padding-mask-missing", subject, "ignores the padding", hidden(seen | (tril & ~real)))
        if (seen & ~tril).any():
            yield Variant("causal-mask-added", subject, "is causal, which the reference's is not", hidden(seen & tril))
        ahead = torch.cat([seen[:, :, 1:], seen[:, :, -1:]], 2)
        for told, shifted in (("lets each query see one key ahead", ahead),
                              ("hides each query's own key", seen & ~torch.eye(length, dtype=torch.bool))):
            yield Variant("causal-mask-shifted", subject, told, hidden(shifted))
        yield Variant("mask-polarity", subject, "is inverted: padding is seen and tokens are hidden",
                      hidden(tril & ~real))
        yield Variant("mask-polarity", subject, "is inverted: what may be seen is hidden, and the other way round",
                      hidden(~seen))
        yield Variant("mask-polarity", subject, "is upside down: queries see only what is behind them",
                      hidden(tril.T & real))
    else:
        if name == "attention_mask":
            yield Variant("causal-mask-added", subject, "is causal, which the reference's is not", hidden(tril & real))
        yield Variant("mask-polarity", subject, "is inverted: padding is seen and tokens are hidden", hidden(~real))
    if not additive:
        return
    yield Variant("mask-polarity", subject, "is added to the scores as ones and zeros",
                  mask(lambda given: seen.to(given.dtype)))
    groups = [("hidden keys", ~seen)]
    if causal:
        groups += [("padding", (~real & tril).expand(seen.shape)), ("keys behind the query", (~tril & real))]
    padded = [row for row in range(len(tokens)) if not tokens[row].all()]
    if len(padded) > 1:
        rows = torch.arange(len(tokens))[:, None, None, None]
        padding = ~real & (tril if causal else True)
        groups += [(f"the padding of row {row}", ((rows == row) & padding).expand(seen.shape)) for row in padded]
        groups += [(f"the hidden keys of row {row}", (rows == row) & ~seen) for row in padded if causal]
    for told, group in groups:
        def soft(value: float, group: Any = group) -> Change:
            return mask(lambda given: torch.where(group, torch.full_like(given, -value), given))
        for value in (1.0, 5.0, 10.0, 20.0, 100.0, 1e3, 1e4):
            yield Variant("mask-value", subject, f"adds {-value:g} to {told} instead of the lowest float", soft(value))
        yield Dial("mask-value", subject,
                   lambda value, told=told: f"adds {-value:.4g} to {told} instead of the lowest float", soft,
                   (0.5, 2.0, 7.0, 15.0))


def buffers(place: Place, name: str, held: Any) -> Iterator[Variant]:
    """What a wrong causal mask or fill value of a net that keeps them as buffers does to a block's mask."""
    given = place.argument("attention_mask")
    if given is None or given.dim() != 4:
        return
    length = given.shape[-1]
    real = torch.from_numpy(place.mask)[:, None, None, :]
    tril = torch.ones(length, length, dtype=torch.bool).tril()
    table = torch.from_numpy(held)
    if table.dim() == 4 and table.shape[-1] >= length:
        seen, hidden = table[..., :length, :length] > 0, torch.tensor(torch.finfo(torch.float32).min)
    elif table.numel() == 1:
        seen, hidden = tril, table.reshape(())
    else:
        return

    def make(given: Any) -> Any:
        padding = torch.where(real, 0.0, torch.finfo(torch.float32).min / 2)
        return (torch.where(seen, 0.0, hidden) + padding).to(given.dtype)
    yield Variant("wrong-buffer", name, "is not the one that the family fills in",
                  surgery.argument("attention_mask", make))


IDEAS = (
    Idea("the mask missing, inverted, shifted, not causal, too weak", masks),
)
