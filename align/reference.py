"""The torch side: the unmodified transformers class, eager attention, float32, eval mode.

Weights are loaded by transformers itself from the source, and rounded through the dtype of the conversion where
that cast them. Nothing of ``models/`` is used here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import BadInput, require

from .inputs import Inputs
from .runs import Run
from .tasks import token_rows

OnModule = Callable[[str], None]
LOSS_KEYS = ("labels", "next_sentence_label", "start_positions", "end_positions")


class Reference:
    """The model that is right by definition."""

    framework = "torch"

    def __init__(self, run: Run) -> None:
        for framework in ("torch", "transformers"):
            require(framework)
        import torch
        self.run = run
        self.version = torch.__version__
        self.weights_digest = run.source_digest
        self.model = _load(run)

    def record(self, inputs: Inputs, on_module: OnModule = lambda name: None) -> tuple[dict[str, np.ndarray],
                                                                                      dict[str, np.ndarray]]:
        """One forward pass: (valid rows of every module's output and of the outputs, whole inputs of the modules).

        Names are the Paddle side's. Outputs are [tokens, ...] where there is one row per token.
        """
        recorded: dict[str, np.ndarray] = {}
        entering: dict[str, np.ndarray] = {}

        def before(name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            value = arguments[0] if arguments else named.get("hidden_states")
            if value is not None and value.dtype.is_floating_point:
                entering[name] = value.numpy().copy()

        def after(name: str, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            recorded[name] = token_rows(name, first.numpy(), inputs.mask)
            on_module(name)

        with ExitStack() as hooks:
            for torch_path, name in self.run.modules:
                module = self._module(torch_path)
                if module is None:
                    continue
                hooks.callback(module.register_forward_pre_hook(
                    lambda _, arguments, named, name=name: before(name, arguments, named), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(
                    lambda _, arguments, output, name=name: after(name, output)).remove)
            outputs = self.outputs(inputs.arrays)
        recorded |= {name: token_rows(name, array, inputs.mask) for name, array in outputs.items()}
        return recorded, entering

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every floating tensor that the class returns, by transformers' names; ``loss`` when labels are given."""
        import torch
        with torch.no_grad():
            result = self.model(**{name: torch.from_numpy(array) for name, array in arrays.items()}, return_dict=True)
        return {name: value.numpy() for name, value in result.items()
                if isinstance(value, torch.Tensor) and value.dtype.is_floating_point}

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Cross entropy without reduction, 0 where the label is -100. logits [n, classes], labels [n]."""
        import torch
        return torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), reduction="none").numpy()

    def contrastive_loss(self, hidden: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
        """In-batch contrastive loss of mean-pooled rows: the first half against the second half, as MiniLM trained."""
        import torch
        weights = torch.from_numpy(mask.astype(np.float32)).unsqueeze(-1)
        pooled = (torch.from_numpy(hidden) * weights).sum(1) / weights.sum(1)
        first, second = torch.nn.functional.normalize(pooled, dim=-1).chunk(2)
        return torch.nn.functional.cross_entropy(scale * first @ second.T, torch.arange(len(first))).numpy()

    def _module(self, path: str) -> Any:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None


def _load(run: Run) -> Any:
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cls = getattr(transformers, run.head.architecture)
    config = cls.config_class.from_dict(dict(run.config))
    config.pad_token_id = run.target_config.get("pad_token_id")
    with _as_directory(run) as directory:
        model, info = cls.from_pretrained(directory, config=config, torch_dtype=torch.float32,
                                          attn_implementation="eager", output_loading_info=True)
    absent = sorted(set(info["missing_keys"]) - {move.source for move in run.plan.moves})
    if absent or info["mismatched_keys"]:
        raise BadInput(f"transformers does not find {(absent or info['mismatched_keys'])[0]} in {run.source}; a "
                       "reference with random weights proves nothing.")
    if run.conversion.dtype != "keep":
        _round_through(model, getattr(torch, run.conversion.dtype))
    return model.eval()


def _round_through(model: Any, dtype: Any) -> None:
    import torch
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).float())


@contextmanager
def _as_directory(run: Run) -> Any:
    """transformers loads directories with standard names; a lone file gets one made of links."""
    if run.source.is_dir():
        yield run.source
        return
    suffix = ".safetensors" if run.source.suffix == ".safetensors" else ".bin"
    with tempfile.TemporaryDirectory() as directory:
        name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        os.symlink(run.source.resolve(), Path(directory) / name)
        os.symlink((run.source.parent / "config.json").resolve(), Path(directory) / "config.json")
        yield directory
