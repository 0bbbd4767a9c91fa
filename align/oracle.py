"""The torch model run in other arithmetic: in float64, and in float32 with its sums in another order.

Both work on the unmodified class from outside, through a ``TorchFunctionMode``, and on its float32 weights: a weight is
widened or permuted where it is used, a large one in chunks of rows, so that no second model lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .reorderings import REORDERED

LINEAR = {F.linear}
MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
ADDED_MATMUL = {torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm}
LAYER_NORM = {F.layer_norm, torch.layer_norm}
SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
MEAN = {torch.mean, torch.Tensor.mean}
CONVOLUTION = {F.conv2d}
BATCH_NORM = {F.batch_norm}
AVERAGE_POOL = {F.adaptive_avg_pool2d}
CROSS_ENTROPY = {F.cross_entropy}
ELEMENTWISE_LOSSES = {F.mse_loss, F.binary_cross_entropy_with_logits}
MADE = {torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros}
DTYPE = torch.Tensor.dtype.__get__
CASTS = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.type}
CHUNK = 1 << 22
COUNTED = "_paddle_parity_counted"


class Reordered(TorchFunctionMode):
    """Permute the contracted axis of every product, the reduced axis of every norm and softmax, and those of losses.

    In exact arithmetic nothing changes, so what changes is rounding: the spread over several seeds is the error
    that torch itself has no claim to. x [..., k] with w [n, k]; a [..., k] with b [..., k, n], and c added to them;
    pictures [batch, channels, height, width]. A batch norm that is trained sums over rows and places, which are
    permuted; in eval mode it has no axis to permute, and its few operations are done in another order, by lot.

    torch has more than one way to compute some of this, and odd seeds go the other one. Of its two convolutions for the
    CPU, oneDNN's and, where a build or a flag leaves that out, a matmul of its own, they take the second: on few places
    (2 x 2 of 512 channels) its error is, by CPU, up to 4 times the first's. And they compute few rows among copies of
    them: with AVX-512 fewer than 16 rows are added up in 16 parts, and with 384 terms are 1.05e-7 off where the same
    rows among more are 3.5e-7 off.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.other_way = seed % 2 == 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = by_place(func, args, kwargs)
        if func in LINEAR:
            order = self._order(args[0].shape[-1])
            return self._among_many(args[0][..., order], lambda x: in_chunks(
                x, args[1], lambda rows, to: torch.index_select(rows, 1, order, out=to), *args[2:], **kwargs))
        if func in MATMUL and args[1].dim() > 1:
            order = self._order(args[0].shape[-1])
            return self._among_many(args[0][..., order], lambda a: func(
                a, args[1][..., order, :], *args[2:], **kwargs))
        if func in ADDED_MATMUL:
            return self._added_matmul(func, *args, **kwargs)
        if func in LAYER_NORM:
            return self._layer_norm(*args, **kwargs)
        if func in CONVOLUTION:
            with torch.backends.mkldnn.flags(enabled=False) if self.other_way else nullcontext():
                return self._convolution(*args, **kwargs)
        if func in BATCH_NORM:
            if kwargs.get("training", args[5] if len(args) > 5 else False):
                return self._trained_batch_norm(*args, **kwargs)
            return _batch_norm(self._lot(len(NORMALISE)), *args, **kwargs)
        if func in AVERAGE_POOL and args[1] in (1, (1, 1)):
            places = args[0].flatten(2)
            return func(places[..., self._order(places.shape[-1])].view(args[0].shape), *args[1:], **kwargs)
        if func in SOFTMAX:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            order = self._order(args[0].shape[dim])
            permuted = func(args[0].index_select(dim, order), *args[1:], **kwargs)
            return permuted.index_select(dim, torch.argsort(order))
        if func in CROSS_ENTROPY and args[0].dim() == 2 and args[1].dim() == 1:
            return self._cross_entropy(*args, **kwargs)
        if func in ELEMENTWISE_LOSSES and args[0].shape == args[1].shape and kwargs.get("reduction") != "none":
            return self._elementwise_loss(func, *args, **kwargs)
        if func in REORDERED:
            return REORDERED[func](self._order, func, *args, **kwargs)
        if func in MEAN and -1 in (*args[1:2], kwargs.get("dim")):
            return func(args[0][..., self._order(args[0].shape[-1])], *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _added_matmul(self, func: Any, c: torch.Tensor, *factors: torch.Tensor, **named: Any) -> torch.Tensor:
        a, b = (*factors, *(named.pop(name) for name in ("mat1", "mat2", "batch1", "batch2") if name in named))
        order = self._order(a.shape[-1])
        return self._among_many(a[..., order], lambda a: func(_rows_of(c, a), a, b[..., order, :], **named))

    def _among_many(self, a: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``product`` of a [..., rows, k], for odd seeds among copies of the rows where they are few."""
        rows = a.shape[-2] if a.dim() > 1 else 0
        if not self.other_way or not 0 < rows < MANY:
            return product(a)
        return product(_copied(a, -(-MANY // rows)))[..., :rows, :].contiguous()

    def _layer_norm(self, x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None,
                    bias: torch.Tensor | None = None, eps: float = 1e-5, *rest: Any) -> torch.Tensor:
        order = self._order(x.shape[-1])
        permuted = F.layer_norm(x[..., order], shape, None if weight is None else weight[..., order],
                                None if bias is None else bias[..., order], eps)
        return permuted[..., torch.argsort(order)]

    def _trained_batch_norm(self, x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        """Statistics of the batch x [batch, channels, ...], whose rows and places are permuted. torch adds up in
        double, Paddle one place after the other: odd seeds add up by a matmul.
        """
        flat = x.reshape(*x.shape[:2], -1)
        rows, places = self._order(len(x)), self._order(flat.shape[-1])
        norm = _batch_norm_by_matmul if self.other_way else F.batch_norm
        found = norm(flat[rows][..., places], *given, **named)
        return found[torch.argsort(rows)][..., torch.argsort(places)].view(x.shape)

    def _cross_entropy(self, x: torch.Tensor, labels: torch.Tensor, **named: Any) -> torch.Tensor:
        """Rows and classes permuted: x [n, classes], labels [n], of which those that are no class stay as they are; and
        a ``weight`` [classes]."""
        rows, classes = self._order(len(x)), self._order(x.shape[1])
        places = torch.argsort(classes)

        def moved(label: torch.Tensor) -> torch.Tensor:
            return torch.where((label >= 0) & (label < len(places)), places[label.clamp(0, len(places) - 1)], label)
        named["ignore_index"] = int(moved(torch.tensor(named.get("ignore_index", -100))))
        if named.get("weight") is not None:
            named["weight"] = named["weight"][classes]
        found = F.cross_entropy(x[rows][:, classes], moved(labels[rows]), **named)
        return found[torch.argsort(rows)] if found.dim() else found

    def _elementwise_loss(self, func: Any, x: torch.Tensor, y: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        """All elements permuted; a ``weight`` or ``pos_weight`` is of as many in the end."""
        order = self._order(x.numel())
        named |= {name: named[name].expand(x.shape).reshape(-1)[order] for name in ("weight", "pos_weight")
                  if named.get(name) is not None}
        return func(x.reshape(-1)[order], y.reshape(-1)[order], *rest, **named)

    def _convolution(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: Any = 1,
                     padding: Any = 0, dilation: Any = 1, groups: int = 1) -> torch.Tensor:
        """Input channels permuted, and by lot height and width exchanged, which adds a kernel up the other way. A
        picture may lack its batch."""
        if groups == 1:
            order = self._order(weight.shape[1])
            x, weight = x.index_select(-3, order), weight[:, order]
        if self._lot(2):
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        turned = [size[::-1] if isinstance(size, (tuple, list)) else size for size in (stride, padding, dilation)]
        return F.conv2d(x.mT.contiguous(), weight.mT.contiguous(), bias, *turned, groups).mT.contiguous()

    def _order(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self.generator)

    def _lot(self, many: int) -> int:
        return int(torch.randint(many, (), generator=self.generator))


PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
PLACES = dict.fromkeys(PRODUCTS, ("input", "weight", "bias")) | {
    torch.matmul: ("input", "other"), torch.bmm: ("input", "mat2"), torch.softmax: ("input",), torch.mean: ("input",),
    torch.addmm: ("input",), torch.baddbmm: ("input",)}
"""By functions whose arguments torch hands on as they were given, by place or by name: which names have a place."""


def by_place(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None,
             ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``func``, by place wherever :data:`PLACES` says which."""
    left = dict(kwargs or {})
    while len(args) < len(names := PLACES.get(func, ())) and names[len(args)] in left:
        args = (*args, left.pop(names[len(args)]))
    return args, left


MANY = 64
"""Rows that torch computes as it does any number of them; it is 16 with AVX-512."""


def _copied(rows: torch.Tensor, times: int) -> torch.Tensor:
    """rows [..., m, k], one after the other so many times: [..., times m, k]."""
    return rows.repeat(*(1 for _ in rows.shape[:-2]), times, 1)


def _rows_of(c: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """What is added to a product of a [..., rows, k], whose rows may be copies: c [rows, n] as often, or what is added
    to each row.
    """
    rows = c.shape[-2] if c.dim() > 1 else 1
    return c if rows == 1 else _copied(c, a.shape[-2] // rows)


NORMALISE = (
    lambda x, mean, deviation, weight, bias: x * (weight / deviation) + (bias - mean * (weight / deviation)),
    lambda x, mean, deviation, weight, bias: (x - mean) * (weight / deviation) + bias,
    lambda x, mean, deviation, weight, bias: (x - mean) / deviation * weight + bias,
    lambda x, mean, deviation, weight, bias: (x - mean) * weight / deviation + bias,
    lambda x, mean, deviation, weight, bias: (x / deviation - mean / deviation) * weight + bias,
    lambda x, mean, deviation, weight, bias: (x * weight - (mean * weight - bias * deviation)) / deviation,
)
"""One batch norm in eval mode, its operations in six orders."""


def _batch_norm(order: int, x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor,
                weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, training: bool = False,
                momentum: float = 0.1, eps: float = 1e-5) -> torch.Tensor:
    """``F.batch_norm`` of running statistics, in one of the orders of ``NORMALISE``. x [batch, channels, ...]."""
    weight, bias = torch.ones_like(mean) if weight is None else weight, torch.zeros_like(mean) if bias is None else bias
    columns = (one.view(-1, *(1 for _ in x.shape[2:])) for one in (mean, (variance + eps).sqrt(), weight, bias))
    return NORMALISE[order](x, *columns)


def _batch_norm_by_matmul(x: torch.Tensor, mean: torch.Tensor | None, variance: torch.Tensor | None,
                          weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, training: bool = True,
                          momentum: float = 0.1, eps: float = 1e-5) -> torch.Tensor:
    """``F.batch_norm`` of a batch x [batch, channels, places], whose running ``mean`` and ``variance`` it moves."""
    columns = x.movedim(1, -1).reshape(-1, x.shape[1])
    shares = columns.new_full((1, len(columns)), 1 / len(columns))
    centred = columns - shares @ columns
    squares = shares @ centred.square()
    found = centred / (squares + eps).sqrt()
    if mean is not None and variance is not None:
        with torch.no_grad():
            mean.lerp_((shares @ columns)[0], momentum)
            variance.lerp_(squares[0] * (len(columns) / (len(columns) - 1)), momentum)
    found = found if weight is None else found * weight
    found = found if bias is None else found + bias
    return found.view(len(x), -1, x.shape[1]).movedim(-1, 1)


class Float64(TorchFunctionMode):
    """Run a float32 model in double: every float32 tensor is widened where it is used, which is exact.

    A class's own casts to float32 (GPT-J's query, key and logits, BLOOM's softmax) are ignored, what it makes in
    float32 is made in double, and where it asks for a dtype it is told float32: GPT-2's upcast attention refuses to go
    on in any other. Methods that write into a tensor keep the tensor they write into. Numbers that come of integers
    alone are left as torch computes them: T5 rounds the logarithm of a distance down to the row of a table, and where
    that should be whole float64 may find another row.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = by_place(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if _is_of_integers(func, args, kwargs):
            return _counted(func(*args, **kwargs))
        if func in CASTS and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            narrowing = func is torch.Tensor.float or torch.float32 in (*args[1:], kwargs.get("dtype"))
            return args[0].double() if narrowing else func(*args, **kwargs)
        if func in LINEAR:
            x, weight, *bias = args
            return in_chunks(x.double(), weight, _widened_into, *map(_widened, bias),
                             **{key: _widened(value) for key, value in kwargs.items()})
        if func is F.embedding:
            return func(*args, **kwargs).double()
        if func == DTYPE:
            return torch.float32 if args[0].dtype is torch.float64 else args[0].dtype
        if func in SOFTMAX | MADE and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if name in UNTOUCHED or name == "__get__":
            return func(*args, **kwargs)
        written = 1 if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else 0
        widened = (*args[:written], *(_widened(value) for value in args[written:]))
        return func(*widened, **{key: _widened(value) for key, value in kwargs.items()})


UNTOUCHED = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "storage_offset", "element_size",
             "numpy", "data_ptr", "__len__", "double"}


def in_chunks(x: torch.Tensor, weight: torch.Tensor,
              prepare: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
              bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` of x [..., k] with weight [n, k], some 4 million elements of it at a time.

    ``prepare(rows, to)`` puts what is used of these rows into ``to``, of x's dtype; its memory is used again. Where a
    gradient of the weight is asked for it is used as a whole, and ``to`` is None.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return F.linear(x, prepare(weight, None), bias)
    rows = min(weight.shape[0], max(1, CHUNK // weight.shape[1]))
    buffer = x.new_empty((rows, weight.shape[1]))
    if rows == weight.shape[0]:
        return F.linear(x, prepare(weight, buffer), bias)
    found = x.new_empty((*x.shape[:-1], weight.shape[0]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start: start + rows]
        found[..., start: start + rows] = F.linear(x, prepare(part, buffer[: len(part)]),
                                                   None if bias is None else bias[start: start + rows])
    return found


def _widened_into(rows: torch.Tensor, to: torch.Tensor | None) -> torch.Tensor:
    return rows.double() if to is None else to.copy_(rows)


def _is_of_integers(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether integers are cast, or all floating tensors among the arguments were made of integers."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return all(hasattr(tensor, COUNTED) for tensor in floating) if floating else bool(tensors) and func in CASTS


def _counted(result: Any) -> Any:
    if isinstance(result, torch.Tensor) and result.is_floating_point():
        setattr(result, COUNTED, True)
    return result


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(one) for one in value)
    return value
