"""A tiny decoder of transformers and ours with the same weights, run and recorded side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import paddle
import torch
from transformers import DynamicCache
from transformers.modeling_utils import no_init_weights

LENGTH = 12
MASKS = {
    "none": None,
    "right": [[1] * 12, [1] * 9 + [0] * 3, [1] * 5 + [0] * 7],
    "left": [[1] * 12, [0] * 3 + [1] * 9, [0] * 7 + [1] * 5],
    "both": [[1] * 12, [0] * 2 + [1] * 7 + [0] * 3, [0] * 5 + [1] * 5 + [0] * 2],
}
Layout = Callable[[str, np.ndarray], tuple[str, np.ndarray]]


def pair(torch_class: Any, paddle_class: Any, config: Any, layout: Layout, seed: int = 0) -> tuple[Any, Any]:
    """The class of transformers with random weights of trained scale, and ours with the same weights.

    ``layout`` takes a name and an array of torch's to Paddle's. No initialiser of transformers is run: OPT's fails
    on layer norms without weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with no_init_weights():
        theirs = torch_class(config).eval()
    theirs.tie_weights()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_((0.2 if weight.dim() == 2 else 0.1) * torch.randn(weight.shape, generator=generator))
            if ("norm" in name and name.endswith("weight")) or "ln_f.weight" in name:
                weight += 1.0
    ours = paddle_class.from_config(config.to_dict())
    ours.load(laid_out(theirs, layout))
    ours.eval()
    return theirs, ours


def laid_out(net: Any, layout: Layout) -> dict[str, np.ndarray]:
    return dict(layout(name, weight.detach().numpy()) for name, weight in net.named_parameters())


def ids(seed: int = 0, batch: int = 3, length: int = LENGTH, low: int = 3, high: int = 61) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (batch, length))


def padded(name: str, pad: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(inputs, where there is a token [batch, time])."""
    if MASKS[name] is None:
        return {"input_ids": ids()}, np.ones_like(ids(), bool)
    mask = np.array(MASKS[name])
    return {"input_ids": np.where(mask == 1, ids(), pad), "attention_mask": mask}, mask == 1


def run(net: Any, **inputs: Any) -> dict[str, np.ndarray]:
    """The net's outputs by name as numpy arrays, whichever framework it belongs to."""
    module, convert = (torch, torch.tensor) if isinstance(net, torch.nn.Module) else (paddle, paddle.to_tensor)
    with module.no_grad():
        outputs = net(**{name: convert(value) for name, value in inputs.items() if value is not None})
    return {name: value.numpy() for name, value in outputs.items() if hasattr(value, "numpy")}


def recorded(net: Any, layers: Mapping[str, Any], **inputs: Any) -> dict[str, np.ndarray]:
    """Outputs of these layers of the net."""
    seen = {}

    def hook(name: str) -> Any:
        def record(_: Any, __: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()
        return record
    for name, layer in layers.items():
        register = getattr(layer, "register_forward_post_hook", None) or layer.register_forward_hook
        register(hook(name))
    run(net, **inputs)
    assert len(seen) == len(layers)
    return seen


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all() and np.linalg.norm(expected) > 0
    return np.linalg.norm(actual.astype("float64") - expected) / np.linalg.norm(expected.astype("float64"))


def worst(theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], valid: np.ndarray) -> float:
    """The largest distance over outputs [batch, time, width], or [batch * time, width], rows of real tokens only."""
    def rows(array: np.ndarray) -> np.ndarray:
        return array.reshape(*valid.shape, -1)[valid]
    assert theirs.keys() == ours.keys()
    return max(distance(rows(ours[name]), rows(array)) for name, array in theirs.items())


def assert_cache_agrees(theirs: Any, ours: Any, tokens: np.ndarray, mask: np.ndarray | None) -> None:
    """Eight tokens, then one, then three: logits as torch's with its cache, and as in one pass; the same cache."""
    valid = np.ones_like(tokens, bool) if mask is None else mask == 1
    whole = run(ours, input_ids=tokens, attention_mask=mask)["logits"]
    torch_cache, paddle_cache = DynamicCache(), None
    for start, stop in [(0, 8), (8, 9), (9, 12)]:
        step = {"input_ids": tokens[:, start:stop]} | ({} if mask is None else {"attention_mask": mask[:, :stop]})
        with torch.no_grad():
            expected = theirs(**{name: torch.tensor(array) for name, array in step.items()},
                              past_key_values=torch_cache, use_cache=True).logits.numpy()
        with paddle.no_grad():
            actual = ours(**{name: paddle.to_tensor(array) for name, array in step.items()},
                          past_key_values=paddle_cache, use_cache=True)
        paddle_cache, logits, rows = actual["past_key_values"], actual["logits"].numpy(), valid[:, start:stop]
        assert distance(logits[rows], expected[rows]) <= 1e-5
        assert distance(logits[rows], whole[:, start:stop][rows]) <= 1e-5
    for layer, (key, value) in zip(torch_cache.layers, paddle_cache, strict=True):
        keep = np.broadcast_to(valid[:, None], key.shape[:3])
        assert distance(key.numpy()[keep], layer.keys.numpy()[keep]) <= 1e-5
        assert distance(value.numpy()[keep], layer.values.numpy()[keep]) <= 1e-5


def gradients(theirs: Any, ours: Any, layout: Layout, **inputs: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(ours, torch's) by Paddle's name, of the loss; a tied weight once."""
    theirs(**{name: torch.tensor(array) for name, array in inputs.items()}).loss.backward()
    ours(**{name: paddle.to_tensor(array) for name, array in inputs.items()})["loss"].backward()
    expected = dict(layout(name, weight.grad.numpy()) for name, weight in theirs.named_parameters()
                    if weight.grad is not None)
    found = {name: weight.grad.numpy() for name, weight in ours.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    return {name: (found[name], array) for name, array in expected.items()}
