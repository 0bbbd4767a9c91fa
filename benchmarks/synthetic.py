"""Seeded checkpoints with weights like trained ones, streamed to disk: the memory does not grow with the model.

The numbers below are those of a trained encoder (all-MiniLM-L6-v2): the standard deviation of a linear layer times the
root of its inputs is 0.85 to 1.87; the scales of its channels are log-normal with sigma 0.1 to 0.3; single channels are
an order of magnitude larger; and what is left has heavier tails than a normal distribution. As in trained models, the
large channels are the same ones in every tensor of a width.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np

from convert.dtypes import BY_NAME, Dtype, cast

from .shapes import Shape, Tensor

SEED = 20261121
CHUNK_ELEMENTS = 1 << 21
THREADS, AHEAD = 2, 3
GAIN = (0.85, 1.87)
CHANNEL_SIGMA = 0.2
EMBEDDING_STD, NORM_STD, BIAS_STD = 0.055, 0.2, 0.1
OUTLIER_FACTOR = (10.0, 30.0)
CHANNELS_PER_OUTLIER = 1024
TAIL, TAIL_STD = 0.05, 1.1565

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Scales:
    """What a tensor's noise is multiplied by: rows [rows, 1] and columns [columns], float32."""

    rows: np.ndarray
    columns: np.ndarray


def make_checkpoint(shape: Shape, directory: Path, seed: int = SEED, advance: Advance = lambda nbytes: None) -> Path:
    """Write the checkpoint of ``shape`` into the new ``directory``; ``advance`` is told the bytes written."""
    directory.mkdir(parents=True)
    dtype = BY_NAME[shape.dtype]
    shards = shards_of(shape.tensors, dtype.size, shape.shard_bytes)
    stem, suffix, write = {"safetensors": ("model", "safetensors", _write_safetensors),
                           "bin": ("pytorch_model", "bin", _write_zip)}[shape.container]
    names = [f"{stem}.{suffix}"] if len(shards) == 1 else [
        f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, shard in zip(names, shards, strict=True):
            write(directory / name, shard, dtype, lambda tensor: _prefetched(pool, tensor, dtype, seed, advance))
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": shape.nbytes}, "weight_map": places}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), "utf-8")
    (directory / "config.json").write_text(json.dumps(shape.config, indent=2), "utf-8")
    return directory


def shards_of(tensors: Sequence[Tensor], size: int, shard_bytes: int) -> list[list[Tensor]]:
    """``tensors`` in order over files of at most ``shard_bytes``; a larger tensor has a file of its own."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.elements * size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.elements * size
    return shards


def values(tensor: Tensor, seed: int, start: int, stop: int) -> np.ndarray:
    """Rows ``[start:stop]`` of ``tensor`` in float32; a vector is one row. Different chunks are independent."""
    _, columns = _as_matrix(tensor)
    generator = np.random.default_rng([seed, crc32(tensor.name.encode()), start])
    noise = generator.standard_normal((stop - start, columns), dtype=np.float32)
    noise *= (np.float32(1) + np.float32(TAIL) * noise * noise) / np.float32(TAIL_STD)
    scales = scales_of(tensor, seed)
    if tensor.kind == "norm":
        return (1 + np.float32(NORM_STD) * noise) * scales.columns
    noise *= scales.rows[start:stop]
    noise *= scales.columns
    return noise


@lru_cache(maxsize=4)
def scales_of(tensor: Tensor, seed: int) -> Scales:
    """The scales of a tensor's channels: outliers among a linear's outputs, else among the columns."""
    rows, columns = _as_matrix(tensor)
    generator = np.random.default_rng([seed, crc32(tensor.name.encode())])
    row_scales, column_scales = np.ones(rows), np.ones(columns)
    if tensor.kind in ("linear", "embedding"):
        row_scales = generator.lognormal(0, CHANNEL_SIGMA, rows)
        column_scales = generator.lognormal(0, CHANNEL_SIGMA, columns)
    if tensor.kind == "linear":
        row_scales *= outliers(rows, seed) * generator.uniform(*GAIN) / np.sqrt(columns)
    elif tensor.kind == "embedding":
        column_scales *= outliers(columns, seed) * EMBEDDING_STD
    elif tensor.kind == "norm":
        column_scales *= outliers(columns, crc32(tensor.name.encode()))
    else:
        column_scales *= BIAS_STD
    return Scales(row_scales.astype(np.float32)[:, None], column_scales.astype(np.float32))


def outliers(channels: int, seed: int) -> np.ndarray:
    """[channels]: 1 for most of them, 10 to 30 for one in 1024, at least for one."""
    generator = np.random.default_rng([seed, channels])
    count = min(channels, max(1, channels // CHANNELS_PER_OUTLIER))
    factors = np.ones(channels)
    factors[generator.choice(channels, count, replace=False)] = generator.uniform(*OUTLIER_FACTOR, count)
    return factors


def _as_matrix(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape if len(tensor.shape) == 2 else (1, tensor.elements)


def _prefetched(pool: ThreadPoolExecutor, tensor: Tensor, dtype: Dtype, seed: int, advance: Advance) -> Iterator[bytes]:
    """The tensor's bytes in order, a few chunks ahead of who takes them."""
    rows, columns = _as_matrix(tensor)
    step = max(1, CHUNK_ELEMENTS // columns)
    waiting: deque = deque()
    for start in range(0, rows, step):
        waiting.append(pool.submit(_encoded, tensor, dtype, seed, start, min(start + step, rows)))
        if len(waiting) == AHEAD:
            yield _taken(waiting, advance)
    while waiting:
        yield _taken(waiting, advance)


def _taken(waiting: deque, advance: Advance) -> memoryview:
    data = waiting.popleft().result()
    advance(len(data))
    return data


def _encoded(tensor: Tensor, dtype: Dtype, seed: int, start: int, stop: int) -> memoryview:
    array = cast(values(tensor, seed, start, stop), BY_NAME["float32"], dtype)
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _write_safetensors(file: Path, tensors: Iterable[Tensor], dtype: Dtype,
                       data_of: Callable[[Tensor], Iterator[bytes]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.elements * dtype.size
        header[tensor.name] = {"dtype": dtype.code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            stream.writelines(data_of(tensor))


def _write_zip(file: Path, tensors: Iterable[Tensor], dtype: Dtype,
               data_of: Callable[[Tensor], Iterator[bytes]]) -> None:
    """As ``torch.save`` lays it out: a pickle of the tensors' places, and one stored record for each storage."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(tensors, dtype))
        archive.writestr("archive/byteorder", "little")
        for number, tensor in enumerate(tensors):
            record = zipfile.ZipInfo(f"archive/data/{number}")
            record.file_size = tensor.elements * dtype.size
            with archive.open(record, "w") as stream:
                for data in data_of(tensor):
                    stream.write(data)
        archive.writestr("archive/version", "3\n")


STORAGES = {"float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float32": "FloatStorage"}


def _pickled(tensors: Iterable[Tensor], dtype: Dtype) -> bytes:
    """A dict of ``torch._utils._rebuild_tensor_v2`` calls, opcode by opcode, so that torch need not be imported."""
    items = b"".join(_text(tensor.name) + _rebuilt(tensor, number, STORAGES[dtype.name])
                     for number, tensor in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


def _rebuilt(tensor: Tensor, number: int, storage: str) -> bytes:
    strides = [int(np.prod(tensor.shape[axis + 1:])) for axis in range(len(tensor.shape))]
    place = (b"(" + _text("storage") + f"ctorch\n{storage}\n".encode() + _text(str(number)) + _text("cpu")
             + _number(tensor.elements) + b"tQ")
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + _number(0) + _numbers(tensor.shape) + _numbers(strides)
            + b"\x89ccollections\nOrderedDict\n)RtR")


def _numbers(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()
