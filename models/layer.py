"""Linear, embedding and norms as torch has them, initialised as transformers does it."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F
from paddle.nn.initializer import Constant, Normal

LARGEST_EPSILON = 1e-3


def linear(inputs: int, outputs: int, std: float, bias: bool = True) -> nn.Linear:
    """``x @ weight + bias`` with weight [inputs, outputs], which is the transpose of torch's."""
    return nn.Linear(inputs, outputs, paddle.ParamAttr(initializer=Normal(0.0, std)), None if bias else False)


class Embedding(nn.Embedding):
    """A table [rows, width], initialised with standard deviation ``std``.

    ``constant_row`` is torch's ``padding_idx``: looked up like any other, but the lookup passes no gradient
    back to it. Paddle's own ``padding_idx`` returns zeros instead of the row.
    """

    def __init__(self, rows: int, width: int, std: float, constant_row: int | None = None):
        super().__init__(rows, width, weight_attr=paddle.ParamAttr(initializer=Normal(0.0, std)))
        self.std, self.constant_row = std, constant_row

    def forward(self, ids: Tensor) -> Tensor:
        found = F.embedding(ids, self.weight)
        if self.constant_row is None:
            return found
        return paddle.where((ids == self.constant_row).unsqueeze(-1), found.detach(), found)


class VocabularyLinear(nn.Layer):
    """``x @ weight.T + bias`` with weight [vocabulary, width], which may be an embedding's own."""

    def __init__(self, weight: Tensor, bias: bool = True):
        super().__init__()
        self.weight = weight
        self.bias = self.create_parameter([weight.shape[0]], is_bias=True) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        scores = paddle.matmul(hidden, self.weight, transpose_y=True)
        return scores if self.bias is None else scores + self.bias


class LMHead(nn.Layer):
    """``x @ decoder_weight.T`` with decoder_weight [vocabulary, width], which may be an embedding's own.

    PaddleNLP's name for the ``lm_head.weight`` of OPT, BLOOM and ChatGLM.
    """

    def __init__(self, decoder_weight: Tensor):
        super().__init__()
        self.decoder_weight = decoder_weight

    def forward(self, hidden: Tensor) -> Tensor:
        return paddle.matmul(hidden, self.decoder_weight, transpose_y=True)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis for any epsilon, computed in float64 and returned in the input's dtype.

    Paddle's float32 kernel adds up one element after the other: at width 4096 with one outlier channel it is
    1.1e-7 from the true value where torch is 4.7e-8 and float64 rounded once 2.5e-8. The matmuls around it
    cost 100 times as much. The kernel refuses an epsilon above 1e-3; norm(x, e) = norm(c x, c**2 e) for any
    positive c, and with a power of two as c every product is exact. Without ``affine`` nothing is learned.
    """

    def __init__(self, width: int, epsilon: float, affine: bool = True):
        learned = None if affine else False
        super().__init__(width, weight_attr=learned, bias_attr=learned)
        halvings = max(0, math.ceil(math.log(epsilon / LARGEST_EPSILON, 4))) if epsilon > 0 else 0
        self._shrink = 0.5**halvings
        self._epsilon = epsilon * self._shrink**2

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (
            None if learned is None else learned.astype("float64") for learned in (self.weight, self.bias)
        )
        shrunk = x.astype("float64") * self._shrink
        return F.layer_norm(shrunk, self._normalized_shape, weight, bias, self._epsilon).astype(x.dtype)


class BatchNorm2D(nn.BatchNorm2D):
    """Paddle's batch norm, but what goes into the running variance is divided by n - 1, as in torch.

    Paddle divides the variance of a batch of n by n, both for what it gives and for the running one. At 4 pictures of
    2 x 2 places that is 7 % of what a step adds, so that a trained net is another one when it is evaluated.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self._use_global_stats:
            return super().forward(x)
        before, places = self._variance.clone(), x.size // x.shape[1]
        found = super().forward(x)
        added = self._variance - self._momentum * before
        self._variance.set_value(self._variance + added / max(1, places - 1))
        return found


class RMSNorm(nn.Layer):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis (Zhang and Sennrich 2019), in float64 as LayerNorm."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = self.create_parameter([width], default_initializer=Constant(1.0))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.astype("float64")
        scale = paddle.rsqrt(wide.square().mean(axis=-1, keepdim=True) + self.epsilon)
        return (wide * scale * self.weight.astype("float64")).astype(x.dtype)
