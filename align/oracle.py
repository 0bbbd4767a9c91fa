"""The torch model run in other arithmetic: in float64, and in float32 with its sums in another order.

Both work on the unmodified class from outside, through a ``TorchFunctionMode``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LINEAR = {F.linear}
MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
LAYER_NORM = {F.layer_norm, torch.layer_norm}
SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
CASTS = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.type}


class Reordered(TorchFunctionMode):
    """Permute the contracted axis of every product and the reduced axis of every norm and softmax.

    In exact arithmetic nothing changes, so what changes is rounding: the spread over several seeds is the error
    that torch itself has no claim to. x [..., k] with w [n, k]; a [..., k] with b [..., k, n].
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in LINEAR:
            order = self._order(args[0].shape[-1])
            return func(args[0][..., order], args[1][:, order], *args[2:], **kwargs)
        if func in MATMUL and args[1].dim() > 1:
            order = self._order(args[0].shape[-1])
            return func(args[0][..., order], args[1][..., order, :], *args[2:], **kwargs)
        if func in LAYER_NORM:
            return self._layer_norm(*args, **kwargs)
        if func in SOFTMAX:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            order = self._order(args[0].shape[dim])
            permuted = func(args[0].index_select(dim, order), *args[1:], **kwargs)
            return permuted.index_select(dim, torch.argsort(order))
        return func(*args, **kwargs)

    def _layer_norm(self, x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None,
                    bias: torch.Tensor | None = None, eps: float = 1e-5, *rest: Any) -> torch.Tensor:
        order = self._order(x.shape[-1])
        permuted = F.layer_norm(x[..., order], shape, None if weight is None else weight[order],
                                None if bias is None else bias[order], eps)
        return permuted[..., torch.argsort(order)]

    def _order(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self.generator)


class Float64(TorchFunctionMode):
    """Keep a double model in double: a class's own casts to float32 (GPT-J's query, key and logits) are ignored."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        narrowing = func is torch.Tensor.float or torch.float32 in (*args[1:], kwargs.get("dtype"))
        if func in CASTS and narrowing and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)
