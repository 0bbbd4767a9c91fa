"""Carrying out a plan in bounded memory: read, transpose, cast, hash, write, one tile at a time.

A transposed tensor is written in tiles of whole target rows, gathered from strips of 64 source rows. Each row
of a strip is padded by 64 bytes: at power-of-two widths the rows of an unpadded strip fall on the same cache
sets and evict each other, which costs a factor of two to four.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod

import numpy as np
import xxhash

from .checkpoint import Checkpoint, TensorInfo, read_into
from .dtypes import Dtype, cast, has_nonfinite
from .errors import BadInput
from .plan import Check, Move, Plan
from .writer import Layout, Staging

TILE = 34 << 20
CHUNK = 8 << 20
STRIP_ROWS = 64
STRIP_PADDING = 64
THREADS = 2

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Digests:
    """xxh3-128 of every tensor's bytes, by name, on both sides."""

    source: dict[str, str]
    target: dict[str, str]


def carry_out(plan: Plan, checkpoint: Checkpoint, layout: Layout, staging: Staging, *,
              allow_nonfinite: bool = False, advance: Advance = lambda nbytes: None) -> Digests:
    """Write every move of ``plan`` into ``staging``, which holds the files of ``layout`` already.

    ``advance`` is told the bytes written. Raises :class:`BadInput` for NaN, inf and tied copies that differ.
    """
    worker = _Worker(checkpoint, layout, staging, allow_nonfinite, advance)
    by_size = sorted(plan.moves, key=lambda move: -move.nbytes)
    unmoved = checkpoint.tensors.keys() - {move.source for move in plan.moves}
    tasks = [lambda move=move: worker.carry(move) for move in by_size]
    tasks += [lambda name=name: worker.hash_source(name) for name in sorted(unmoved)]
    tasks += [lambda check=check: worker.check(check) for check in plan.checks]
    _run_all(tasks, worker.stop)
    return Digests(worker.source_digests, worker.target_digests)


def digest_of(tensors: Mapping[str, TensorInfo | Move], digests: Mapping[str, str]) -> str:
    """One digest for a set of tensors: xxh3-128 over the lines "name dtype shape digest", sorted by name.

    It does not depend on the files, the shards or the order in which they hold the tensors.
    """
    lines = (f"{name} {tensors[name].dtype.name} {list(tensors[name].shape)} {digest}\n"
             for name, digest in sorted(digests.items()))
    return xxhash.xxh3_128("".join(lines).encode()).hexdigest()


def chunks_of(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """The elements of a tensor in C order, flat, in pieces of at most 8 MiB."""
    info = checkpoint.tensors[name]
    if info.strides is not None:
        whole = checkpoint.read(name).reshape(-1)
    elements, per_chunk = prod(info.shape), CHUNK // info.dtype.size
    for start in range(0, elements, per_chunk):
        stop = min(start + per_chunk, elements)
        yield checkpoint.read_elements(name, start, stop) if info.strides is None else whole[start:stop]


def strips_of(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Columns ``[start:stop]`` of a matrix as (first row, [<= 64, stop - start]); the buffer is used again."""
    info = checkpoint.tensors[name]
    rows, columns = info.shape
    size = info.dtype.size
    whole = checkpoint.read(name) if info.strides is not None else None
    strip = np.empty((STRIP_ROWS, stop - start + STRIP_PADDING // size), info.dtype.storage)[:, : stop - start]
    for first in range(0, rows, STRIP_ROWS):
        count = min(STRIP_ROWS, rows - first)
        for row in range(count):
            if whole is None:
                read_into(checkpoint.handle(info), strip[row], info.offset + ((first + row) * columns + start) * size,
                          info.file)
            else:
                strip[row] = whole[first + row, start:stop]
        yield first, strip[:count]


def column_tiles(shape: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns of a ``shape`` matrix whose transpose fills about one tile."""
    rows, columns = shape
    width = max(1, TILE // max(1, rows * size))
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


class _Worker:
    """What the threads share. Each tensor is one task, so that its digest is taken in order."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, staging: Staging, allow_nonfinite: bool,
                 advance: Advance) -> None:
        self.checkpoint, self.layout, self.staging = checkpoint, layout, staging
        self.allow_nonfinite, self.advance = allow_nonfinite, advance
        self.source_digests: dict[str, str] = {}
        self.target_digests: dict[str, str] = {}
        self.stop = threading.Event()
        for info in checkpoint.tensors.values():
            checkpoint.handle(info)

    def carry(self, move: Move) -> None:
        file, offset = self.layout.places[move.target]
        digest = xxhash.xxh3_128()
        for tile in self._tiles(move):
            if self.stop.is_set():
                return
            data = memoryview(np.ascontiguousarray(tile).reshape(-1).view(np.uint8))
            digest.update(data)
            self.staging.write(file, data, offset)
            offset += len(data)
            self.advance(len(data))
        self.target_digests[move.target] = digest.hexdigest()

    def hash_source(self, name: str) -> None:
        digest = xxhash.xxh3_128()
        for chunk in chunks_of(self.checkpoint, name):
            digest.update(chunk.view(np.uint8))
        self.source_digests[name] = digest.hexdigest()

    def check(self, check: Check) -> None:
        """A source tensor that is made anew must hold what is made: the same bits, or for a mask the same truth."""
        filling, held = check.move.filling, self.checkpoint.tensors[check.source]
        if filling.copies:
            agree = self._same_bits(check.source, filling.copies)
            told = f"is not the same as {filling.copies}, although the two are tied"
        else:
            made = filling.make(check.move.shape)
            agree = held.shape == made.shape and np.array_equal(self.checkpoint.read(check.source) != 0, made != 0)
            told = f"is not the {filling.name} that this family has"
        if not agree:
            raise BadInput(f"{check.source} in the source {told}. Nothing was written.")

    def _tiles(self, move: Move) -> Iterator[np.ndarray]:
        if move.source is None:
            yield cast(move.filling.make(move.shape), move.source_dtype, move.dtype)
        elif move.transposed:
            yield from self._transposed(move)
        else:
            yield from self._copied(move)

    def _copied(self, move: Move) -> Iterator[np.ndarray]:
        digest = xxhash.xxh3_128()
        for chunk in chunks_of(self.checkpoint, move.source):
            digest.update(chunk.view(np.uint8))
            yield self._cast(move, chunk)
        if move.filling is None:
            self.source_digests[move.source] = digest.hexdigest()

    def _transposed(self, move: Move) -> Iterator[np.ndarray]:
        rows = move.source_shape[0]
        digest = xxhash.xxh3_128()
        tiles = list(column_tiles(move.source_shape, max(move.source_dtype.size, move.dtype.size)))
        for start, stop in tiles:
            tile = np.empty((stop - start, rows), move.dtype.storage)
            for first, strip in strips_of(self.checkpoint, move.source, start, stop):
                if len(tiles) == 1:
                    for row in strip:
                        digest.update(row.view(np.uint8))
                tile[:, first: first + len(strip)] = move.rule.apply(self._cast(move, strip))
            yield tile
        if len(tiles) == 1:
            self.source_digests[move.source] = digest.hexdigest()
        else:
            self.hash_source(move.source)

    def _cast(self, move: Move, array: np.ndarray) -> np.ndarray:
        self._refuse_nonfinite(array, move.source_dtype, f"{move.source} holds NaN or inf")
        result = cast(array, move.source_dtype, move.dtype)
        if move.dtype != move.source_dtype:
            self._refuse_nonfinite(result, move.dtype, f"{move.source} overflows {move.dtype.name}")
        return result

    def _refuse_nonfinite(self, array: np.ndarray, dtype: Dtype, told: str) -> None:
        if not self.allow_nonfinite and has_nonfinite(array, dtype):
            raise BadInput(f"{told}. Nothing was written. --allow-nonfinite converts it all the same.")

    def _same_bits(self, one: str, other: str) -> bool:
        first, second = self.checkpoint.tensors[one], self.checkpoint.tensors[other]
        return first.shape == second.shape and first.dtype == second.dtype and all(
            np.array_equal(left.view(np.uint8), right.view(np.uint8))
            for left, right in zip(chunks_of(self.checkpoint, one), chunks_of(self.checkpoint, other), strict=True))


def _run_all(tasks: list[Callable[[], None]], stop: threading.Event) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            failed = any(future.done() and not future.cancelled() and future.exception() for future in futures)
            if failed or not all(future.done() for future in futures):
                stop.set()
                pool.shutdown(cancel_futures=True)
        for future in done:
            future.result()
