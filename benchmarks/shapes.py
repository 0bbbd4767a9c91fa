"""The checkpoints that the claims are measured on: their shapes, and how large they are at each scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from convert.__main__ import family_named
from convert.dtypes import BY_NAME
from convert.plan import expand

FULL, SMALL = "full", "small"


@dataclass(frozen=True)
class Tensor:
    """One torch-side tensor. ``kind`` is linear, embedding, norm or bias."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Shape:
    """A checkpoint to be made. ``container`` is safetensors or bin (zip); no file is larger than ``shard_bytes``."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    positions: int
    dtype: str = "float16"
    container: str = "safetensors"
    shard_bytes: int = 1 << 50

    @property
    def family(self) -> str:
        return "gptj" if self.architecture.startswith("GPTJ") else "bert"

    @property
    def name(self) -> str:
        """What its directory is called; different for different shapes."""
        sharded = "" if self.shard_bytes == Shape.shard_bytes else f"-{self.shard_bytes}"
        return (f"{self.architecture.lower()}-{self.layers}x{self.hidden}x{self.heads}-{self.vocab}-{self.positions}-"
                f"{self.dtype}-{self.container}{sharded}")

    @property
    def config(self) -> Mapping[str, Any]:
        """The ``config.json`` of the checkpoint."""
        own = _gptj_config if self.family == "gptj" else _bert_config
        return {"architectures": [self.architecture], "torch_dtype": self.dtype, "vocab_size": self.vocab, **own(self)}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that transformers' class saves, in the order of the layers."""
        family = family_named(self.family)
        head = family.head(self.architecture)
        stored = [rule for rule in family.rules_of(head) if rule.when(self.config) and rule.moves
                  and rule.otherwise is None]
        sizes = family.sizes(self.config)
        return [Tensor(name, _kind(name, len(rule.shape)), rule.source_shape(sizes, number))
                for rule in expand(stored, family.layers(self.config))
                for number, (name, *_) in enumerate(rule.sources)]

    @property
    def nbytes(self) -> int:
        return BY_NAME[self.dtype].size * sum(tensor.elements for tensor in self.tensors)

    def layered(self, layers: int) -> Shape:
        return replace(self, layers=layers)


@dataclass(frozen=True)
class Scale:
    """What a run measures on. ``large`` is the 28-layer shape; memory is to be flat over the layer counts ``layers``.

    ``deep`` and ``paged`` are the shapes that those counts are given to, for convert and for align; ``fits`` is
    aligned with all weights in memory too. ``pairs``, ``large_pairs`` and ``passes`` are numbers of repetitions of a
    conversion, of one of ``large``, and of an alignment; ``peaks`` of those whose least peak says what paging holds.
    """

    name: str
    copied: Shape
    large: Shape | None
    float32: Shape
    zipped: Shape
    deep: Shape
    layers: tuple[int, int, int]
    paged: Shape
    fits: Shape
    bert: Shape
    gptj: Shape
    pairs: int
    large_pairs: int
    passes: int
    starts: int
    peaks: int

    @property
    def full(self) -> bool:
        return self.name == FULL


def _kind(name: str, dimensions: int) -> str:
    if dimensions == 2:
        return "embedding" if "wte" in name or "embeddings" in name else "linear"
    if name.endswith(".weight"):
        return "norm"
    return "bias"


def _gptj_config(shape: Shape) -> Mapping[str, Any]:
    return {"model_type": "gptj", "n_embd": shape.hidden, "n_layer": shape.layers, "n_head": shape.heads,
            "n_positions": shape.positions, "n_inner": None, "rotary_dim": min(64, shape.hidden // shape.heads),
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False,
            "bos_token_id": shape.vocab - 1, "eos_token_id": shape.vocab - 1}


def _bert_config(shape: Shape) -> Mapping[str, Any]:
    return {"model_type": "bert", "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "intermediate_size": 4 * shape.hidden, "hidden_act": "gelu",
            "max_position_embeddings": shape.positions, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
            "position_embedding_type": "absolute", "pad_token_id": 0, "tie_word_embeddings": True}


_GPTJ_6B = Shape("GPTJForCausalLM", layers=4, hidden=4096, heads=16, vocab=50400, positions=2048)
_GPTJ_SMALL = Shape("GPTJForCausalLM", layers=4, hidden=2048, heads=8, vocab=8192, positions=512)
_GPTJ_PAGED = Shape("GPTJForCausalLM", layers=4, hidden=512, heads=4, vocab=2048, positions=128)
_GPTJ_PLAIN = Shape("GPTJForCausalLM", layers=2, hidden=256, heads=4, vocab=1024, positions=128, dtype="float32",
                    container="bin")
_BERT_BASE = Shape("BertForPreTraining", layers=12, hidden=768, heads=12, vocab=30522, positions=512, dtype="float32",
                   container="bin")

SCALES = {
    SMALL: Scale(
        SMALL, copied=_GPTJ_SMALL, large=None, float32=replace(_GPTJ_SMALL, layers=2, dtype="float32"),
        zipped=replace(_GPTJ_SMALL, container="bin"), deep=replace(_GPTJ_SMALL, hidden=1536), layers=(2, 4, 8),
        paged=_GPTJ_PAGED, fits=_GPTJ_PAGED, bert=replace(_BERT_BASE, layers=4, vocab=8192), gptj=_GPTJ_PLAIN,
        pairs=7, large_pairs=0, passes=1, starts=15, peaks=4),
    FULL: Scale(
        FULL, copied=_GPTJ_6B, large=_GPTJ_6B.layered(28), float32=replace(_GPTJ_6B, dtype="float32"),
        zipped=replace(_GPTJ_6B, container="bin"), deep=_GPTJ_6B, layers=(4, 14, 28), paged=_GPTJ_6B.layered(28),
        fits=_GPTJ_6B.layered(2), bert=_BERT_BASE, gptj=_GPTJ_PLAIN,
        pairs=9, large_pairs=3, passes=2, starts=31, peaks=1),
}
