"""One forward pass of transformers' unmodified class, weights paged: ``torch_paged SOURCE LOGITS.npy ROWS TOKENS``.

The parameters are on the meta device; a layer's come in from the safetensors file when it is called, in float32, and go
when it is done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

from . import ids_of


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that are made within have no memory; buffers and plain attributes do."""
    register = torch.nn.Module.register_parameter

    def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else _frozen(parameter.to("meta")))

    torch.nn.Module.register_parameter = registered
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def build(source: Path) -> torch.nn.Module:
    """The class that the config names, with eager attention, without weights."""
    config = transformers.AutoConfig.from_pretrained(source, attn_implementation="eager")
    with parameters_on_meta():
        return getattr(transformers, config.architectures[0])(config).eval()


def page(model: torch.nn.Module, weights: safe_open) -> None:
    """Hooks that fill each layer of ``model`` when it is called, and empty it again."""
    for path, module in model.named_modules():
        names = list(module._parameters)
        if not names:
            continue
        on_meta = dict(module._parameters)

        def fill(module: torch.nn.Module, _: object, path: str = path, names: list[str] = names) -> None:
            for name in names:
                if module._parameters[name] is not None:
                    module._parameters[name] = _frozen(weights.get_tensor(f"{path}.{name}").float())

        def empty(module: torch.nn.Module, *_: object, on_meta: dict = on_meta) -> None:
            module._parameters.update(on_meta)

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def main(source: Path, logits: Path, rows: int, tokens: int) -> None:
    model = build(source)
    with safe_open(source / "model.safetensors", "pt") as weights, torch.no_grad():
        page(model, weights)
        ids = torch.from_numpy(ids_of(model.config.vocab_size, rows, tokens))
        np.save(logits, model(input_ids=ids, use_cache=False).logits.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
