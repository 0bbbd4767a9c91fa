"""Every activation that transformers 4.55.4 knows by name (``ACT2FN``), as exact in float32 as torch's.

Paddle's float32 ``tanh`` and ``erf`` are 3.4e-7 and 3.9e-7 off at worst, torch's 3e-8. So 0.5 (1 + tanh u) is
written sigmoid(2 u), which is the same number, and where a tanh or an erf stands alone it is taken in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F
from paddle.nn.initializer import Constant

from convert.errors import BadInput


def activation(name: str) -> nn.Layer:
    """The activation that transformers calls ``name``, as a layer from any shape to the same shape."""
    if name == "prelu":
        return PReLU()
    if name not in FUNCTIONS:
        raise BadInput(f"unknown activation {name!r}; known are {', '.join(sorted([*FUNCTIONS, 'prelu']))}.")
    return Pointwise(name)


class Pointwise(nn.Layer):
    """A function without parameters, applied to each element."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class PReLU(nn.Layer):
    """max(0, x) + weight min(0, x) with one learned slope, 0.25 at first (He et al. 2015)."""

    def __init__(self):
        super().__init__()
        self.weight = self.create_parameter([1], default_initializer=Constant(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight)


def tanh(x: Tensor) -> Tensor:
    return paddle.tanh(x.astype("float64")).astype(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate=False)


def gelu_10(x: Tensor) -> Tensor:
    """gelu clipped to [-10, 10], for quantisation (Wu et al. 2020, arXiv 2004.09602)."""
    return paddle.clip(gelu(x), -10.0, 10.0)


def gelu_tanh(x: Tensor, slope: float = math.sqrt(2.0 / math.pi)) -> Tensor:
    """0.5 x (1 + tanh(slope (x + 0.044715 x^3))), the approximation of Hendrycks and Gimpel 2016.

    f(x) = x + f(-x) on the right, where the gradient of a sigmoid near 1 would come of what 1 - sigmoid leaves.
    """
    left = paddle.clip(paddle.where(x > 0, -x, x), min=-30.0)
    return relu(x) + left * F.sigmoid(2.0 * slope * (left + 0.044715 * left * left * left))


def gelu_fast(x: Tensor) -> Tensor:
    return gelu_tanh(x, 0.7978845608)


def quick_gelu(x: Tensor) -> Tensor:
    return x * F.sigmoid(1.702 * x)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x) (Elfwing et al. 2017). The gradient of Paddle's own is -inf at -87 and NaN below -88."""
    return x * F.sigmoid(x)


def mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + e^x)) (Misra 2019) = x sigmoid(x + log(1 + e^x / 2)), which cancels nowhere."""
    return x * F.sigmoid(x + paddle.log1p(0.5 * paddle.exp(paddle.clip(x, max=20.0))))


def laplace(x: Tensor, mu: float = 0.707107, sigma: float = 0.282095) -> Tensor:
    """0.5 (1 + erf((x - mu) / (sigma sqrt 2))), the attention function of Mega (Ma et al. 2022)."""
    z = (x.astype("float64") - mu) / (sigma * math.sqrt(2.0))
    return (0.5 * (1.0 + paddle.erf(z))).astype(x.dtype)


def relu(x: Tensor) -> Tensor:
    """max(0, x), and NaN of NaN: Paddle's own makes a zero of it."""
    return paddle.where(x <= 0, paddle.zeros_like(x), x)


def relu2(x: Tensor) -> Tensor:
    """max(0, x)^2 (So et al. 2021, Primer)."""
    return paddle.square(relu(x))


def linear(x: Tensor) -> Tensor:
    return x


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_10": gelu_10,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_fast,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": linear,
    "mish": mish,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu2": relu2,
    "relu6": F.relu6,
    "sigmoid": F.sigmoid,
    "silu": silu,
    "swish": silu,
    "tanh": tanh,
}
