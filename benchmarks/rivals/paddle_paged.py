"""One forward pass of the Paddle net, weights paged: ``paddle_paged CONVERTED LOGITS.npy ROWS TOKENS``.

The net is built without weights; a layer's come in from the converted checkpoint when it is called, in float32, and go
when it is done.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle

from convert.checkpoint import Checkpoint, open_checkpoint, read_config
from convert.dtypes import to_float32
from models import model_class

from . import ids_of


def page(net: paddle.nn.Layer, weights: Checkpoint) -> None:
    """Hooks that fill each layer of ``net`` when it is called, and empty it again."""
    for path, layer in net.named_sublayers():
        parameters = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
        if not parameters:
            continue

        def fill(layer: paddle.nn.Layer, _: object, path: str = path, parameters: dict = parameters) -> None:
            for name, parameter in parameters.items():
                dtype = weights.tensors[f"{path}.{name}"].dtype.name
                array = to_float32(weights.read(f"{path}.{name}"), dtype)
                paddle.to_tensor(array)._share_buffer_to(parameter)

        def empty(layer: paddle.nn.Layer, *_: object, parameters: dict = parameters) -> None:
            for parameter in parameters.values():
                parameter._clear_dataptr()

        layer.register_forward_pre_hook(fill)
        layer.register_forward_post_hook(empty)


def main(converted: Path, logits: Path, rows: int, tokens: int) -> None:
    config = read_config(converted)
    with paddle.LazyGuard():
        net = model_class(config).from_config(config)
    net.eval()
    with open_checkpoint(converted) as weights, paddle.no_grad():
        page(net, weights)
        np.save(logits, net(paddle.to_tensor(ids_of(config["vocab_size"], rows, tokens)))["logits"].numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
