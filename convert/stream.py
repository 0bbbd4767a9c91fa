"""Carrying out a plan in bounded memory: read, transpose, cast, hash, write, a piece at a time.

Everything is a *flow*: the elements of a tensor in the order in which they are wanted, flat, in pieces of at most
``CHUNK`` bytes, whatever order they lie in. A flow against the grain of its file goes through tiles: rows are read and
dealt out to *panels*, which hold ``PANEL`` bytes of each row, and every panel is transposed by itself into a *sheet*,
``NEAR`` bytes at a time. So elements change places within the nearest cache, and what goes to memory and back moves 128
bytes at a time; transposing 64 rows at a time right into the tile took twice as long.

The fewer tiles, the fewer times a file is read. A tile of whole rows of what is wanted is written from end to end, and
what is written is hashed on the way; where rows are so long that a few of them fill a tile, they are broken off: each
break costs a call, worth ``BREAK`` bytes of reading, and the hash another reading. For the first tile rows of at most
``CHUNK`` bytes are read whole: so every element is hashed and checked in the order of the file, and nothing is read
once more for it. For the other tiles they are read whole where at most ``GAP`` bytes are unwanted: a call costs as
much as reading these, for it hands the interpreter over to the other thread and waits for it.

The thread with the larger tile begins with the largest matrices against the grain, the other with what needs no tile,
and they meet in between. The smaller tile holds a matrix of 4096 x 4096 in half precision.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod

import numpy as np
import xxhash

from .checkpoint import Checkpoint, Loaded, Matrix, Stacked, TensorInfo, cut
from .dtypes import BY_NAME, Dtype, cast, has_nonfinite, to_float32
from .errors import BadInput
from .plan import Check, Move, Plan
from .rules import Filling
from .writer import Layout, Staging

TILES = (43 << 20, 32 << 20)
CHUNK = 512 << 10
BREAK = 64 << 10
GAP = 64 << 10
PANEL = 128
LEAST = 32 << 10
SHEET = 1 << 20
NEAR = 512 << 10
GRAIN = 16
LARGEST = 8
CAST_BYTES = 32
INTERPRETER = 43_000_000
IN_ORDER = sys.maxsize
FLOAT32 = BY_NAME["float32"]

Advance = Callable[[int], None]
Elements = Matrix | Stacked | Loaded
Piece = tuple[int, np.ndarray]
Seen = Callable[[int | None, np.ndarray], None]
Task = Callable[["Buffers"], None]


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
    whole = {name for move in plan.moves if is_hashed(move) for name in move.sources}
    unmoved = checkpoint.tensors.keys() - whole
    tasks = [partial(worker.carry, *group) if group[0].sources else partial(worker.make, group)
             for group in alike(plan.moves)]
    tasks += [partial(worker.hash_source, name) for name in sorted(unmoved)]
    tasks += [partial(worker.check, check) for check in plan.checks]
    run_all(tasks, worker.stop)
    return Digests(worker.source_digests, worker.target_digests)


def digest_of(tensors: Mapping[str, TensorInfo | Move], digests: Mapping[str, str]) -> str:
    """One digest for a set of tensors: xxh3-128 over the lines "name dtype shape digest", sorted by name.

    It does not depend on the files, the shards or the order in which they hold the tensors, nor on whether a format
    can hold a scalar without dimensions.
    """
    lines = (f"{name} {tensors[name].dtype.name} {[*tensors[name].shape] * (tensors[name].shape != (1,))} {digest}\n"
             for name, digest in sorted(digests.items()))
    return xxhash.xxh3_128("".join(lines).encode()).hexdigest()


def chunks_of(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """The elements of a tensor in C order, flat, in pieces of at most ``CHUNK`` bytes.

    The memory of a piece is used again.
    """
    return (piece for _, piece in flow(checkpoint.matrix(name), Buffers()))


class Buffers:
    """The memory of one thread for a tile, and for what is read, turned and written of it, used again: fresh memory
    costs its page faults every time.

    ``tile`` is how many bytes a tile has at most.
    """

    def __init__(self, tile: int | None = None) -> None:
        self.tile = max(tile or TILES[0], LARGEST)
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[np.ndarray]:
        """``nbytes`` of uint8, whose content is anything."""
        free = self._free[nbytes]
        buffer = free.pop() if free else np.empty(nbytes, np.uint8)
        try:
            yield buffer
        finally:
            free.append(buffer)


def flow(matrix: Elements, buffers: Buffers, *, break_cost: int = IN_ORDER,
         seen: Seen = lambda start, elements: None) -> Iterator[Piece]:
    """All elements of ``matrix`` in C order as (number of the first, elements); the memory of a piece is used again.

    Who can take pieces out of order says how many bytes of reading a break in the order is worth. ``seen`` is told
    every element once, as it comes from the file and is still in the cache: with the number of the first in the order
    in which the file has them, or None where they are not consecutive in it.
    """
    return _straight(matrix.flat, buffers, seen) if matrix.straight else _turned(matrix.T, buffers, break_cost, seen)


def cast_flow(pieces: Iterator[Piece], source: Dtype, target: Dtype) -> Iterator[Piece]:
    """A flow in another dtype; its pieces are so small that what a cast holds in between stays in the cache."""
    for start, piece in pieces:
        for part in cut(range(len(piece)), len(piece) if source == target else CHUNK // CAST_BYTES):
            yield start + part.start, cast(piece[part.start: part.stop], source, target)


def together(left: Iterator[Piece], right: Iterator[Piece]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two flows of equally many elements, both in order, side by side in pieces of equal length."""
    nothing = (0, np.empty(0))
    ours, theirs = next(left, nothing)[1], next(right, nothing)[1]
    while length := min(len(ours), len(theirs)):
        yield ours[:length], theirs[:length]
        ours, theirs = (rest if len(rest) else next(side, nothing)[1]
                        for rest, side in ((ours[length:], left), (theirs[length:], right)))
    if len(ours) or len(theirs):
        raise ValueError("one of two flows ended before the other")


def in_one_order(one: Elements, other: Elements) -> tuple[Elements, Elements]:
    """Two matrices of one shape, both transposed where both lie across: what is compared needs one tile at most."""
    return (one, other) if one.straight or other.straight else (one.T, other.T)


def made(filling: Filling, shape: tuple[int, ...], dtype: Dtype = FLOAT32) -> Iterator[Piece]:
    """The elements of a tensor that a filling makes, as a flow."""
    columns = shape[-1] if shape else 1
    for rows in cut(range(prod(shape[:-1])), CHUNK // max(1, columns * FLOAT32.size)):
        yield rows.start * columns, cast(filling.rows(shape, rows).reshape(-1), FLOAT32, dtype)


def is_hashed(move: Move) -> bool:
    """Whether moving it shows its source whole, so that the source is hashed on the way."""
    return move.gather is None and move.filling is None


def alike(moves: Iterable[Move]) -> list[list[Move]]:
    """``moves`` as tasks: those that make the same tensor together, any other by itself.

    The largest transpose comes first, and what is not transposed behind the smallest, the largest last.
    """
    groups: dict[object, list[Move]] = defaultdict(list)
    for move in moves:
        groups[move.target if move.sources else (move.filling, move.shape, move.dtype)].append(move)
    return sorted(groups.values(),
                  key=lambda group: sum(-move.nbytes if move.transposed else move.nbytes for move in group))


def tiling(rows: int, columns: int, size: int, break_cost: int, nbytes: int) -> tuple[int, int]:
    """Rows and columns of tiles of at most ``nbytes``, about equal, in which elements of ``size`` bytes are transposed.

    Of all such tiles those that cost the fewest bytes of reading, where every break in a row of what is wanted is worth
    ``break_cost`` of them. A row of a tile has at most ``CHUNK`` bytes.
    """
    area, widest = max(1, nbytes // size), max(1, min(columns, CHUNK // size))

    def cut_into(parts: int) -> tuple[int, int]:
        high = _share(rows, parts)
        return high, _share(columns, -(-columns // min(widest, area // high)))

    def cost(tile: tuple[int, int]) -> int:
        high, wide = tile
        breaks = _share(rows, high) - 1
        hashed_later = columns * size if breaks else 0
        return rows * (_read_of_a_row(columns, wide, size) + hashed_later) + columns * breaks * break_cost

    return min(map(cut_into, range(_share(rows, area), _share(rows, max(1, area // widest)) + 1)), key=cost)


def _read_of_a_row(columns: int, wide: int, size: int) -> int:
    """Bytes that the tiles read of a row, a call for a part of it counted as ``GAP`` bytes."""
    row, part, tiles = columns * size, wide * size + GAP, _share(columns, wide)
    return row + (tiles - 1) * min(row, part) if row <= CHUNK else tiles * part


def expected_memory() -> int:
    """Bytes that a conversion holds at most: the interpreter with numpy, and what each thread borrows."""
    return INTERPRETER + sum(tile + SHEET + NEAR + 2 * CHUNK for tile in TILES)


def _share(whole: int, parts: int) -> int:
    return -(-whole // parts)


def run_all(tasks: Sequence[Task], stop: threading.Event) -> None:
    """Carry out ``tasks`` on a thread for each of ``TILES``; the first failure, or Ctrl-C, sets ``stop`` and is raised.

    The thread with the largest tile takes from the front, the others from the back.
    """
    waiting, failures = deque(tasks), []

    def work(tile: int, take: Callable[[], Task]) -> None:
        buffers = Buffers(tile)
        try:
            while (task := _next(take)) is not None and not stop.is_set():
                task(buffers)
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(tile, waiting.pop if number else waiting.popleft))
               for number, tile in enumerate(TILES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        with _setting(stop):
            thread.join()
    if failures:
        raise failures[0]


def _next(take: Callable[[], Task]) -> Task | None:
    """The next task, None when another thread has taken the last one."""
    try:
        return take()
    except IndexError:
        return None


@contextmanager
def _setting(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` when what is done here fails."""
    try:
        yield
    except BaseException:
        stop.set()
        raise


def _straight(matrix: Elements, buffers: Buffers, seen: Seen) -> Iterator[Piece]:
    per_piece = max(1, CHUNK // matrix.dtype.size)
    with buffers.borrow(max(CHUNK, LARGEST)) as buffer:
        for rows in cut(range(matrix.rows), per_piece // max(1, matrix.columns)):
            for columns in cut(range(matrix.columns), per_piece):
                block = _shaped(buffer, len(rows), len(columns), matrix.dtype)
                matrix.read(rows, columns, block)
                start, piece = rows.start * matrix.columns + columns.start, block.reshape(-1)
                seen(start, piece)
                yield start, piece


def _turned(matrix: Matrix, buffers: Buffers, break_cost: int, seen: Seen) -> Iterator[Piece]:
    """The transpose of ``matrix``, which lies row by row."""
    high, wide = tiling(max(1, matrix.rows), max(1, matrix.columns), matrix.dtype.size, break_cost, buffers.tile)
    per_piece = max(1, CHUNK // matrix.dtype.size)
    with buffers.borrow(buffers.tile) as tile:
        for columns in cut(range(matrix.columns), wide):
            for rows in cut(range(matrix.rows), high):
                panels = _panels(tile, len(rows), len(columns), matrix.dtype)
                for first, block in _blocks(matrix, rows, columns, buffers, seen):
                    _deal(block, first - rows.start, panels)
                for across, along, sheet in _sheets(panels, columns, rows, buffers):
                    runs = sheet.reshape(1, -1) if len(along) == matrix.rows else sheet
                    for column, values in zip(across, runs, strict=False):
                        start = column * matrix.rows + along.start
                        for part in cut(range(len(values)), per_piece):
                            yield start + part.start, values[part.start: part.stop]


def _blocks(matrix: Matrix, rows: range, columns: range, buffers: Buffers,
            seen: Seen) -> Iterator[tuple[int, np.ndarray]]:
    """``columns`` of some rows at a time, with the number of the first of these; see the top for what is read."""
    size, everything = matrix.dtype.size, range(matrix.columns)
    first, narrow = columns.start == 0, matrix.columns * size <= CHUNK
    unwanted = (matrix.columns - len(columns)) * size
    read = everything if narrow and (first or unwanted <= GAP) else columns
    wanted = slice(columns.start - read.start, columns.stop - read.start)
    with buffers.borrow(max(CHUNK, LARGEST)) as buffer:
        for some in cut(rows, CHUNK // (len(read) * size)):
            block = _shaped(buffer, len(some), len(read), matrix.dtype)
            matrix.read(some, read, block)
            if first or not narrow:
                seen(some.start * matrix.columns if read == everything else None, block.reshape(-1))
            yield some.start, block[:, wanted]


def _panels(tile: np.ndarray, rows: int, columns: int, dtype: Dtype) -> list[np.ndarray]:
    """A tile as panels, [panels, rows, columns of each]: those of ``PANEL`` bytes a row, and a narrower one behind.

    Where rows are so few that such a panel would not have ``LEAST`` bytes, it is wider.
    """
    each = max(1, PANEL // dtype.size) * max(1, LEAST // (rows * PANEL))
    even = columns - columns % each
    wide, narrow = (_shaped(part, rows, width, dtype) for part, width in (
        (tile, even), (tile[rows * even * dtype.size:], columns - even)))
    return [panels for panels in (wide.reshape(-1, rows, each), narrow[np.newaxis]) if panels.size]


def _deal(block: np.ndarray, row: int, panels: Sequence[np.ndarray]) -> None:
    """Put ``block`` into the panels, beginning at ``row``; what a panel has of a row moves as one element."""
    start = 0
    for group in panels:
        many, _, each = group.shape
        stop, whole = start + many * each, f"V{each * group.itemsize}"
        group.view(whole)[:, row: row + len(block), 0] = block[:, start:stop].view(whole).T
        start = stop


def _sheets(panels: Sequence[np.ndarray], columns: range, rows: range,
            buffers: Buffers) -> Iterator[tuple[range, range, np.ndarray]]:
    """The panels of a tile transposed, ``SHEET`` bytes at a time: which columns, which rows, and the values.

    All rows of as many columns as fit, from several panels where these are short; else some rows of one column.
    """
    size, dtype = panels[0].itemsize, panels[0].dtype
    widest = max(group.shape[-1] for group in panels) * size
    many, grain = SHEET // (len(rows) * size), _grain(size)
    with (buffers.borrow(max(SHEET, LARGEST)) as buffer,
          buffers.borrow(max(NEAR, widest)) as between):
        for across in cut(range(len(columns)), many - many % grain or many):
            for along in cut(range(len(rows)), SHEET // size):
                sheet = buffer[: len(across) * len(along) * size].view(dtype).reshape(len(across), len(along))
                for part, place in _within(panels, across):
                    for some in cut(along, NEAR // (part.shape[1] * size)):
                        _transpose(part[some.start: some.stop],
                                   sheet[place, some.start - along.start: some.stop - along.start], between)
                yield columns[across.start: across.stop], rows[along.start: along.stop], sheet


def _within(panels: Sequence[np.ndarray], across: range) -> Iterator[tuple[np.ndarray, slice]]:
    """What each panel has of the columns ``across`` of a tile, and which of these it is."""
    start = 0
    for panel in chain(*panels):
        stop = start + panel.shape[1]
        wanted = range(max(start, across.start), min(stop, across.stop))
        if wanted:
            yield (panel[:, wanted.start - start: wanted.stop - start],
                   slice(wanted.start - across.start, wanted.stop - across.start))
        start = stop


def _transpose(matrix: np.ndarray, out: np.ndarray, between: np.ndarray) -> None:
    """``matrix`` transposed into ``out``: first ``GRAIN`` bytes of a row at a time, then elements within these.

    At once where its rows are no whole grains.
    """
    rows, columns = matrix.shape
    grain = _grain(matrix.itemsize)
    if columns % grain:
        out[...] = matrix.T
        return
    grains = between[: matrix.nbytes].view(matrix.dtype).reshape(-1, rows, grain)
    whole = f"V{grain * matrix.itemsize}"
    grains.view(whole)[..., 0] = matrix.view(whole).T
    out.reshape(-1, grain, rows)[...] = grains.transpose(0, 2, 1)


def _grain(size: int) -> int:
    """How many elements of ``size`` bytes change places together."""
    return max(1, GRAIN // size)


def _shaped(buffer: np.ndarray, rows: int, columns: int, dtype: Dtype) -> np.ndarray:
    return buffer[: rows * columns * dtype.size].view(dtype.storage).reshape(rows, columns)


@dataclass
class _Running:
    """The xxh3-128 of a tensor of ``size`` elements while they pass by. What comes out of order is left out."""

    size: int
    position: int = 0
    state: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def take(self, start: int | None, array: np.ndarray) -> None:
        if start == self.position:
            self.state.update(_bytes_of(array))
            self.position += array.size

    def watch(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The same flow, taken as it passes."""
        for start, piece in pieces:
            self.take(start, piece)
            yield start, piece

    @property
    def whole(self) -> bool:
        return self.position == self.size


class _Worker:
    """What the threads share."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, staging: Staging, allow_nonfinite: bool,
                 advance: Advance) -> None:
        self.checkpoint, self.layout, self.staging = checkpoint, layout, staging
        self.allow_nonfinite, self.advance = allow_nonfinite, advance
        self.source_digests: dict[str, str] = {}
        self.target_digests: dict[str, str] = {}
        self.stop = threading.Event()
        for info in checkpoint.tensors.values():
            checkpoint.handle(info)

    def carry(self, move: Move, buffers: Buffers) -> None:
        """Move one tensor, and hash it on both sides: while it passes by, or else once more from its file."""
        file, offset = self.layout.places[move.target]
        source, target = _Running(prod(move.source_shape)), _Running(prod(move.shape))
        matrix = move.take(self.checkpoint.matrix)

        def seen(start: int | None, elements: np.ndarray) -> None:
            self._refuse_nonfinite(elements, move.source_dtype, f"{move.source} holds NaN or inf")
            if matrix.straight:
                source.take(start, elements)

        pieces = flow(move.turn(matrix), buffers, break_cost=BREAK, seen=seen)
        results = cast_flow(pieces, move.source_dtype, move.dtype)
        if move.dtype != move.source_dtype:
            results = self._finite(results, move.dtype, f"{move.source} overflows {move.dtype.name}")
        for start, result in target.watch(results):
            if self.stop.is_set():
                return
            self.staging.write(file, _bytes_of(result), offset + start * move.dtype.size)
            self.advance(result.nbytes)
        written = self.staging.matrix(file, offset, move.dtype, target.size)
        self.target_digests[move.target] = self._digest(target, written, buffers)
        if is_hashed(move):
            self.source_digests[move.source] = self._digest(source, matrix, buffers)

    def make(self, moves: Sequence[Move], buffers: Buffers) -> None:
        """Tensors that are made alike are made once."""
        running = _Running(prod(moves[0].shape))
        for start, piece in running.watch(made(moves[0].filling, moves[0].shape, moves[0].dtype)):
            for move in moves:
                if self.stop.is_set():
                    return
                file, offset = self.layout.places[move.target]
                self.staging.write(file, _bytes_of(piece), offset + start * move.dtype.size)
                self.advance(piece.nbytes)
        self.target_digests.update(dict.fromkeys((move.target for move in moves), running.state.hexdigest()))

    def hash_source(self, name: str, buffers: Buffers) -> None:
        matrix = self.checkpoint.matrix(name)
        self.source_digests[name] = self._digest(_Running(matrix.rows * matrix.columns), matrix, buffers)

    def check(self, check: Check, buffers: Buffers) -> None:
        """A source tensor that is not moved must hold what is made: the same values, or for a mask the same truth."""
        filling, held = check.filling, self.checkpoint.tensors[check.source]
        if filling.copies:
            copied = self.checkpoint.tensors[filling.copies]
            agree = (held.shape == copied.shape and held.dtype == copied.dtype
                     and self._same(check.source, copied.name, buffers))
            told = f"is not the same as {filling.copies}, although the two are tied"
        else:
            agree = held.shape == check.shape and all(
                np.array_equal(left != 0, right != 0) if filling.mask else
                np.array_equal(to_float32(left, held.dtype.name), right)
                for left, right in together(flow(self.checkpoint.matrix(check.source), buffers),
                                            made(filling, check.shape)))
            told = f"is not the {filling.name} that this family has"
        if not agree:
            raise BadInput(f"{check.source} in the source {told}. Nothing was written.")

    def _same(self, one: str, other: str, buffers: Buffers) -> bool:
        sides = in_one_order(self.checkpoint.matrix(one), self.checkpoint.matrix(other))
        return all(np.array_equal(left.view(np.uint8), right.view(np.uint8))
                   for left, right in together(*(flow(side, buffers) for side in sides)))

    def _digest(self, running: _Running, matrix: Elements, buffers: Buffers) -> str:
        if not running.whole:
            running = _Running(running.size)
            for _ in running.watch(flow(matrix, buffers)):
                if self.stop.is_set():
                    break
        return running.state.hexdigest()

    def _finite(self, pieces: Iterator[Piece], dtype: Dtype, told: str) -> Iterator[Piece]:
        for start, piece in pieces:
            self._refuse_nonfinite(piece, dtype, told)
            yield start, piece

    def _refuse_nonfinite(self, array: np.ndarray, dtype: Dtype, told: str) -> None:
        if not self.allow_nonfinite and has_nonfinite(array, dtype):
            raise BadInput(f"{told}. Nothing was written. --allow-nonfinite converts it all the same.")


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
