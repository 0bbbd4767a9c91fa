"""Checkpoints of full size that take no room: safetensors with whole headers, whose data is a hole in the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import no_init_weights

CODES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(torch_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers' class saves, tied ones once; no weight is allocated."""
    with torch.device("meta"), no_init_weights():
        model = torch_class(config)
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def sparse_checkpoint(directory: Path, config: Any, shapes: Shapes, dtype: str, shard_bytes: int) -> Path:
    """A sharded checkpoint with an index, of these tensors and this apparent size; every value in it is 0."""
    directory.mkdir(parents=True)
    code, size = CODES[dtype]
    shards = list(_shards(shapes, size, shard_bytes))
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, name)
        _hollow_file(directory / name, {tensor: shapes[tensor] for tensor in shard}, code, size)
    total = size * sum(map(prod, shapes.values()))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places}), "utf-8")
    config.save_pretrained(directory)
    return directory


def room_taken(directory: Path) -> int:
    """Bytes of disk, as opposed to the sizes that the files say they have."""
    return sum(512 * file.stat().st_blocks for file in directory.iterdir())


def _shards(shapes: Shapes, size: int, shard_bytes: int) -> Iterator[list[str]]:
    shard, filled = [], 0
    for name, shape in shapes.items():
        if shard and filled + size * prod(shape) > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size * prod(shape)
    yield shard


def _hollow_file(file: Path, shapes: Shapes, code: str, size: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + size * prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)
