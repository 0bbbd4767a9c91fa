"""transformers' own ``generate`` on the reference, which is what a continuation is held against.

Where it draws, transformers' own warpers come first, Gumbel noise is added behind them, and the largest is taken: see
search.py. A class that is no ``GenerationMixin`` (code that a checkpoint brings along, a net of the user's) is called
by one of ours, so that it is continued by the same loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, PretrainedConfig, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..reference import Reference, called
from ..torch_side import tensors_of
from .feeding import MASK, PLACES, Feed, rows_axis
from .search import Strategy, gumbel


@dataclass(frozen=True)
class Generated:
    """``tokens`` [rows, strategy.tokens]; for each step that was made, ``ids`` [flat rows, tokens so far], what was
    continued, and ``logits`` [flat rows, vocabulary], float32. A row has as many flat rows as there are beams.
    """

    tokens: np.ndarray
    ids: Sequence[np.ndarray]
    logits: Sequence[np.ndarray]


def takes(side: Reference) -> frozenset[str]:
    """The arguments of the reference's ``forward`` that its ``generate`` hands on: OpenAI's first GPT has a mask and
    positions, and transformers gives it neither.
    """
    named = frozenset(inspect.signature(side.model.forward).parameters)
    if not isinstance(side.model, GenerationMixin) or "decoder_input_ids" in named:
        return named
    ids = torch.zeros(1, 2, dtype=torch.int64)
    given = side.model.prepare_inputs_for_generation(
        ids, attention_mask=torch.ones_like(ids), cache_position=torch.arange(2), use_cache=False)
    return named - ({MASK, PLACES} - given.keys())


def caches(side: Reference) -> bool:
    """Whether the reference can keep what it has computed of a text."""
    return {"past_key_values", "use_cache"} <= takes(side)


def ends_of(side: Reference) -> tuple[int, ...]:
    """What the generation config beside the checkpoint says of how texts end; nothing where there is none."""
    found = getattr(getattr(side.model, "generation_config", None), "eos_token_id", None)
    return (found,) if isinstance(found, int) else tuple(found or ())


def generate(side: Reference, feed: Feed, strategy: Strategy, cached: bool) -> Generated:
    """What ``model.generate`` makes of the rows of ``feed.start``."""
    start = feed.start
    model = side.model if isinstance(side.model, GenerationMixin) else _Called(side, feed)
    given = start.source or {"input_ids": start.ids, "attention_mask": start.mask}
    watch, length = _Watch(), start.ids.shape[1]
    found = model.generate(
        **tensors_of(given), generation_config=_config(strategy, start.ids, cached), use_model_defaults=False,
        logits_processor=[*_warpers(strategy, length), watch])
    tokens = np.full((len(start.ids), strategy.tokens), strategy.pad, np.int64)
    new = found.sequences[:, length:].numpy()
    tokens[:, : new.shape[1]] = new
    if strategy.beams > 1:
        tokens = _padded_behind_ends(tokens, strategy)
    return Generated(tokens, watch.ids, [logits.numpy() for logits in found.logits])


def _config(strategy: Strategy, ids: np.ndarray, cached: bool) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=strategy.tokens, min_new_tokens=strategy.least or None, do_sample=False,
        num_beams=strategy.beams, length_penalty=strategy.length_penalty, early_stopping=strategy.early_stopping,
        eos_token_id=list(strategy.ends) or None, pad_token_id=strategy.pad, decoder_start_token_id=int(ids[0, -1]),
        use_cache=cached, return_dict_in_generate=True, output_logits=True)


def _warpers(strategy: Strategy, length: int) -> list[LogitsProcessor]:
    if strategy.temperature is None:
        return []
    return [*([TemperatureLogitsWarper(float(strategy.temperature))] if strategy.temperature != 1 else []),
            *([TopKLogitsWarper(strategy.top_k)] if strategy.top_k is not None else []),
            *([TopPLogitsWarper(strategy.top_p)] if strategy.top_p is not None else []), _Noise(strategy.seed, length)]


def _padded_behind_ends(tokens: np.ndarray, strategy: Strategy) -> np.ndarray:
    """transformers' beams are filled with another token where padding has the id 0."""
    ended = np.isin(tokens, strategy.ends).cumsum(1) > 0
    behind = np.concatenate([np.zeros((len(tokens), 1), bool), ended[:, :-1]], 1)
    return np.where(behind, strategy.pad, tokens)


class _Noise(LogitsProcessor):
    """Adds the noise of search.py; ``length`` is that of what is continued."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.length
        return scores + torch.from_numpy(np.stack([gumbel(self.seed, row, step, scores.shape[-1])
                                                   for row in range(len(scores))]))


class _Watch(LogitsProcessor):
    """Changes nothing; keeps what was continued at each step."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids.append(input_ids.numpy().copy())
        return scores


class _Called(PreTrainedModel, GenerationMixin):
    """A reference that has no ``generate``, called by transformers' own."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, side: Reference, feed: Feed) -> None:
        super().__init__(PretrainedConfig(vocab_size=side.run.sizes["vocab"]))
        self.side, self.feed = side, feed

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, attention_mask: Any = None,
                                      past_key_values: Any = None, use_cache: bool = False, **_: Any) -> dict[str, Any]:
        """All of the texts, or their last tokens behind what is kept."""
        feed = self.feed.last if past_key_values else self.feed.whole
        return {"fed": feed(input_ids.numpy(), attention_mask.numpy()), "past_key_values": past_key_values,
                "use_cache": use_cache}

    def forward(self, fed: Mapping[str, np.ndarray], past_key_values: Any = None, use_cache: bool = False,
                attention_mask: Any = None, return_dict: bool = True) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast
        kept = {"past_key_values": past_key_values, "use_cache": True} if use_cache else {}
        result = called(self.side.model, tensors_of(fed) | kept)
        return CausalLMOutputWithPast(logits=result["logits"].float(),
                                      past_key_values=result.get("past_key_values") if use_cache else None)

    def _reorder_cache(self, past_key_values: Any, rows: torch.Tensor) -> Any:
        axis = rows_axis(self.side.run)
        return tuple(tuple(part.index_select(axis, rows) for part in layer) for layer in past_key_values)


class TorchKeeping:
    """A reference that keeps keys and values itself: for what :mod:`.explanations.decoding` supposes."""

    def __init__(self, side: Reference) -> None:
        self.side = side

    def continued(self, arrays: Mapping[str, np.ndarray], kept: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """As a candidate's: see feeding.Keeping."""
        with torch.no_grad():
            result = called(self.side.model, {**tensors_of(arrays), **kept, "use_cache": True})
        encoded = result.get("encoder_last_hidden_state")
        logits = self.side.run.batch_first("logits", result["logits"].numpy())
        return logits, {"past_key_values": result["past_key_values"]} | (
            {} if encoded is None else {"encoder_outputs": (encoded,)})

    def selected(self, kept: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        places, axis = torch.from_numpy(rows), rows_axis(self.side.run)
        return {**kept, "past_key_values": _of_layers(kept["past_key_values"], lambda layers: tuple(
            tuple(part.index_select(axis, places) for part in layer) for layer in layers))}

    def shifted(self, kept: Mapping[str, Any], by: int) -> dict[str, Any]:
        """What is kept of each layer given to another one."""
        return {**kept, "past_key_values": _of_layers(
            kept["past_key_values"], lambda layers: (*layers[-by:], *layers[:-by]))} if kept else {}


def _of_layers(kept: Any, change: Callable[[Any], Any]) -> Any:
    """Keys and values by layer, changed, in the class in which they were."""
    if isinstance(kept, tuple):
        return change(kept)
    return type(kept).from_legacy_cache(change(kept.to_legacy_cache()))
