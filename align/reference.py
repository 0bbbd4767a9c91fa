"""The torch side: the unmodified transformers class, eager attention, float32, eval mode.

Weights are loaded by transformers itself from the source, and rounded through the dtype of the conversion where
that cast them. Nothing of ``models/`` is used here.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import BadInput, require

from .inputs import Inputs
from .noise import Kind, NoiseFloor, Pool
from .runs import Run
from .tasks import token_rows
from .tolerance import REORDERED_RUNS

OnModule = Callable[[str], None]
Arrays = dict[str, np.ndarray]
Modules = Sequence[tuple[str, str]]


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

    def record(self, inputs: Inputs, on_module: OnModule = lambda name: None) -> tuple[Arrays, Arrays]:
        """One forward pass: (valid rows of every module's output and of the outputs, whole inputs of the modules).

        Names are the Paddle side's. Outputs are [tokens, ...] where there is one row per token.
        """
        return self._pass(self.model, inputs, self.run.modules, on_module=on_module)

    def noise_floors(self, inputs: Inputs, recorded: Arrays, entering: Arrays,
                     tell: OnModule = lambda told: None) -> dict[str, dict[Kind, NoiseFloor]]:
        """For each name the noise floor of both kinds, from what :meth:`record` gave; empty without the memory.

        The oracle is this very model in float64; the pool is the recorded run and K runs with sums reordered.
        """
        if not self.has_room_for_float64:
            return {}
        tell("torch in float64")
        floors: dict[str, dict[Kind, NoiseFloor]] = {name: {} for name in recorded}
        for kind, replaced in (("propagated", None), ("isolated", entering)):
            outputs, _ = self._pooled(inputs, self.run.modules, replaced, (recorded, entering),
                                      lambda told, kind=kind: tell(f"{kind}, {told}"))
            for name, pool in outputs.items():
                floors[name][kind] = pool.floor()
        return floors

    def norms(self, modules: Modules) -> list[tuple[str, str]]:
        """Those of ``modules`` that are layer norms in torch."""
        import torch
        found = dict(self.model.named_modules())
        return [pair for pair in modules if isinstance(found.get(pair[0]), torch.nn.LayerNorm)]

    def record_inside(self, inputs: Inputs, modules: Modules, replaced: Arrays | None = None) -> tuple[Arrays, Arrays]:
        """As :meth:`record`, of these modules: a block and its sublayers, fed ``replaced`` where that has them."""
        return self._pass(self.model, inputs, modules, replaced)

    def floors_inside(self, inputs: Inputs, modules: Modules, recorded: Arrays,
                      entering: Arrays) -> tuple[dict[str, NoiseFloor], dict[str, NoiseFloor]]:
        """Isolated noise floors of these modules' outputs, and of what arrives at them before it is replaced."""
        outputs, arrivals = self._pooled(inputs, modules, entering, (recorded, entering))
        return tuple({name: pool.floor() for name, pool in pools.items()} for pools in (outputs, arrivals))

    @cached_property
    def has_room_for_float64(self) -> bool:
        """Whether this model fits into the free memory once more, in float64; decided once."""
        return 3 * bytes_of(self.model) < available_memory()

    @cached_property
    def _double(self) -> Any:
        return copy.deepcopy(self.model).double()

    def _pooled(self, inputs: Inputs, modules: Modules, replaced: Arrays | None, plain: tuple[Arrays, Arrays],
                tell: OnModule = lambda told: None) -> tuple[dict[str, Pool], dict[str, Pool]]:
        """Torch's errors against float64, of outputs and of arrivals: the plain run's and K reordered ones'."""
        from .oracle import Float64, Reordered
        with Float64():
            oracle = self._pass(self._double, inputs, modules, replaced)
        pools = tuple({name: Pool(token_rows(name, array, inputs.mask)) for name, array in part.items()}
                      for part in oracle)
        for number in range(REORDERED_RUNS + 1):
            tell(f"torch with its sums reordered, {number} of {REORDERED_RUNS}")
            with Reordered(number) if number else nullcontext():
                run = self._pass(self.model, inputs, modules, replaced) if number else plain
            for part, arrays in zip(pools, run, strict=True):
                for name, pool in part.items():
                    pool.add(token_rows(name, arrays[name], inputs.mask))
        return pools

    def _pass(self, model: Any, inputs: Inputs, modules: Modules, replaced: Arrays | None = None,
              on_module: OnModule = lambda name: None) -> tuple[Arrays, Arrays]:
        """As :meth:`record`, of any model of this class; ``replaced`` takes the place of what enters a module."""
        import torch
        recorded: Arrays = {}
        entering: Arrays = {}

        def before(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            value = arguments[0] if arguments else named.get("hidden_states")
            if value is None or not value.dtype.is_floating_point:
                return None
            entering[name] = value.numpy().copy()
            if replaced is None or name not in replaced:
                return None
            given = torch.from_numpy(replaced[name]).to(value.dtype)
            return ((given, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": given})

        def after(name: str, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            recorded[name] = token_rows(name, first.numpy(), inputs.mask)
            on_module(name)

        found = dict(model.named_modules())
        with ExitStack() as hooks:
            for torch_path, name in modules:
                if torch_path in found:
                    hooks.callback(found[torch_path].register_forward_pre_hook(
                        lambda _, arguments, named, name=name: before(name, arguments, named), with_kwargs=True).remove)
                    hooks.callback(found[torch_path].register_forward_hook(
                        lambda _, arguments, output, name=name: after(name, output)).remove)
            outputs = outputs_of(model, inputs.arrays)
        recorded |= {name: token_rows(name, array, inputs.mask) for name, array in outputs.items()}
        return recorded, entering

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every floating tensor that the class returns, by transformers' names; ``loss`` when labels are given."""
        return outputs_of(self.model, arrays)

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


def outputs_of(model: Any, arrays: Mapping[str, np.ndarray]) -> Arrays:
    import torch
    try:
        with torch.no_grad():
            result = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}, return_dict=True)
    except (RuntimeError, IndexError, ValueError) as error:
        raise BadInput(f"transformers' own {type(model).__name__} fails on this checkpoint, so there is nothing to "
                       f"compare with: {next(iter(str(error).splitlines()), '')}.") from error
    return {name: value.numpy() for name, value in result.items()
            if isinstance(value, torch.Tensor) and value.dtype.is_floating_point}


def bytes_of(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def available_memory() -> int:
    """Bytes that a new process could use without swapping, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _load(run: Run) -> Any:
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cls = getattr(transformers, run.head.architecture)
    config = cls.config_class.from_dict(dict(run.config))
    config.pad_token_id = run.intended_config.get("pad_token_id")
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
