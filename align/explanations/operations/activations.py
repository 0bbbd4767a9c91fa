"""Another activation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.activations import ACT2FN

from .. import surgery
from ..place import Place
from .variant import Idea, Variant

GELUS = ("gelu", "gelu_new", "quick_gelu", "gelu_10")
OTHER_ACTIVATIONS = ("relu", "silu", "tanh", "sigmoid", "linear", "mish", "leaky_relu", "relu2", "relu6", "laplace")
SAME_ACTIVATION = {"gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new",
                   "gelu_accurate": "gelu_new", "swish": "silu"}


def activations(place: Place) -> Iterator[Variant]:
    known = {type(ACT2FN[name]): name for name in reversed(list(ACT2FN)) if name != "prelu"}
    own = place.traits.activations
    known |= {type(module): own[type(module).__name__] for _, module in place.modules(nn.Module)
              if type(module).__name__ in own}
    for path, module in place.modules(*known):
        right = SAME_ACTIVATION.get(known[type(module)], known[type(module)])
        gelu = right in GELUS
        for name in GELUS + OTHER_ACTIVATIONS:
            if name != right:
                kind = "gelu-variant" if gelu and name in GELUS else "activation"
                told = f"is {_spoken(name)} instead of {_spoken(right)}"
                yield Variant(kind, f"{place.paddle(path.rpartition('.')[0])} activation", told,
                              surgery.forward(path, lambda module, run, name=name: lambda x: ACT2FN[name](x)))


def _spoken(name: str) -> str:
    return {"gelu": "gelu (erf)", "gelu_new": "gelu_new (tanh approximation)", "linear": "left out"}.get(name, name)


IDEAS = (
    Idea("another gelu, another activation", activations),
)
