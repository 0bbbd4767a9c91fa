"""Reading a checkpoint: the headers first, checked in full; arrays on demand.

Safetensors, sharded or not, ``torch.save`` files of both ages and ``.pdparams`` all come down to the same thing:
names, dtypes, shapes, and the region of a file where the bytes lie. torch is never imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .dtypes import Dtype, by_code
from .errors import BadInput, remedy
from .pickles import StoredTensor, cut_short, read_pdparams, read_torch_legacy, read_torch_zip

MAX_HEADER = 100_000_000
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
SPAN = 1 << 20
PICKLED = b"\x80"
KINDS = ("What is read: safetensors, what torch.save wrote (.bin, .pt, .pth), .pdparams, and a directory that holds "
         "one of these or an index of shards.")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is, and where its bytes lie. ``strides`` only where not in C order."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Matrix:
    """A tensor as rows and columns of an open file: (i, j) lies ``i * pitch + j * step`` elements behind ``offset``.

    The last axis is the columns, the others are the rows. ``T`` is the transpose, which moves nothing; so a rule
    applies to a matrix as it does to an array.
    """

    file: Path
    handle: int
    offset: int
    dtype: Dtype
    rows: int
    columns: int
    pitch: int
    step: int = 1

    @property
    def T(self) -> Matrix:
        return replace(self, rows=self.columns, columns=self.rows, pitch=self.step, step=self.pitch)

    @property
    def straight(self) -> bool:
        """Whether the file holds it row by row, so that reading along a row is cheap."""
        return min(self.rows, self.columns) <= 1 or self.step <= self.pitch or self.pitch == 0

    @property
    def flat(self) -> Matrix:
        """The same elements in the same order as one row, where they lie at even distances."""
        if self.columns == 1:
            return replace(self, rows=1, columns=self.rows, step=self.pitch)
        if self.pitch == self.columns * self.step:
            return replace(self, rows=1, columns=self.rows * self.columns)
        return self

    def __getitem__(self, rows: slice) -> Matrix:
        start, stop, _ = rows.indices(self.rows)
        return replace(self, offset=self._place(start, 0), rows=max(0, stop - start))

    def above(self, others: Sequence[Matrix]) -> Stacked:
        """This one and below it the ``others``, as one."""
        return Stacked((self, *others))

    def read(self, rows: range, columns: range, out: np.ndarray) -> None:
        """Fill ``out``, [rows, columns] in C order, with a block."""
        if self.step != 1:
            for row, line in zip(rows, out, strict=True):
                self._gather(row, columns, line)
        elif len(rows) == 1 or self.pitch == len(columns):
            read_into(self.handle, out, self._place(rows.start, columns.start), self.file)
        else:
            for row, line in zip(rows, out, strict=True):
                position = self._place(row, columns.start)
                if os.preadv(self.handle, [line], position) != line.nbytes:
                    read_into(self.handle, line, position, self.file)

    def _gather(self, row: int, columns: range, line: np.ndarray) -> None:
        for part in cut(columns, SPAN // max(1, self.step * self.dtype.size)):
            span = np.empty((len(part) - 1) * self.step + 1, self.dtype.storage)
            read_into(self.handle, span, self._place(row, part.start), self.file)
            line[part.start - columns.start: part.stop - columns.start] = span[:: self.step] if self.step else span

    def _place(self, row: int, column: int) -> int:
        return self.offset + (row * self.pitch + column * self.step) * self.dtype.size


@dataclass(frozen=True)
class Stacked:
    """Matrices of equal width one below the other, or ``beside`` each other, as one; what :class:`Matrix` offers."""

    blocks: tuple[Matrix, ...]
    beside: bool = False

    @property
    def dtype(self) -> Dtype:
        return self.blocks[0].dtype

    @property
    def rows(self) -> int:
        return self.blocks[0].rows if self.beside else sum(block.rows for block in self.blocks)

    @property
    def columns(self) -> int:
        return sum(block.columns for block in self.blocks) if self.beside else self.blocks[0].columns

    @property
    def T(self) -> Stacked:
        return Stacked(tuple(block.T for block in self.blocks), not self.beside)

    @property
    def straight(self) -> bool:
        return all(block.straight for block in self.blocks)

    @property
    def flat(self) -> Stacked:
        return self

    def read(self, rows: range, columns: range, out: np.ndarray) -> None:
        """Fill ``out``, [rows, columns] in C order, with a block."""
        along, start = columns if self.beside else rows, 0
        for block in self.blocks:
            length = block.columns if self.beside else block.rows
            wanted = range(max(along.start, start), min(along.stop, start + length))
            if wanted:
                place = slice(wanted.start - along.start, wanted.stop - along.start)
                inside = range(wanted.start - start, wanted.stop - start)
                self._read_of(block, inside, rows, columns, out, place)
            start += length

    def _read_of(self, block: Matrix, inside: range, rows: range, columns: range, out: np.ndarray,
                 place: slice) -> None:
        if not self.beside:
            block.read(inside, columns, out[place])
            return
        for number, row in enumerate(rows):
            block.read(range(row, row + 1), inside, out[number: number + 1, place])


@dataclass(frozen=True)
class Loaded:
    """A tensor of permuted axes that no matrix describes, in memory whole: what :class:`Matrix` offers, as one row."""

    array: np.ndarray
    dtype: Dtype
    rows: int = 1
    straight: bool = True

    @property
    def columns(self) -> int:
        return self.array.size

    @property
    def flat(self) -> Loaded:
        return self

    def read(self, rows: range, columns: range, out: np.ndarray) -> None:
        out[0] = self.array.reshape(-1)[columns.start: columns.stop]


@dataclass
class Checkpoint:
    """All tensors of a checkpoint, by name, over however many files. Opens files on demand, closes them all."""

    path: Path
    tensors: dict[str, TensorInfo]
    files: list[Path]
    _handles: dict[Path, int] = field(default_factory=dict)

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in C order; bfloat16 as its uint16 bits."""
        info = self.tensors[name]
        if info.strides is None:
            return self.read_rows(name, 0, info.shape[0]) if info.shape else self._read(info, 0, 1).reshape(())
        flat = self._read(info, 0, info.nbytes // info.dtype.size)
        size = info.dtype.size
        view = np.lib.stride_tricks.as_strided(flat, info.shape, [stride * size for stride in info.strides])
        return np.ascontiguousarray(view)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``[start:stop]`` of the first axis, read from disk and nothing more."""
        info = self.tensors[name]
        row = prod(info.shape[1:])
        return self._read(info, start * row, (stop - start) * row).reshape(stop - start, *info.shape[1:])

    def read_elements(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``[start:stop]`` of the tensor laid flat."""
        return self._read(self.tensors[name], start, stop - start)

    def matrix(self, name: str) -> Matrix | Loaded:
        """The tensor as rows and columns to be read from its file, whatever order its elements lie in."""
        info = self.tensors[name]
        lying = _rows_and_columns(info)
        if lying is None:
            return Loaded(self.read(name), info.dtype)
        return Matrix(info.file, self.handle(info), info.offset, info.dtype, *lying)

    def handle(self, info: TensorInfo) -> int:
        """A file descriptor open for reading; the kernel is told to read far ahead, as ``cp`` tells it."""
        if info.file not in self._handles:
            self._handles[info.file] = os.open(info.file, os.O_RDONLY)
            os.posix_fadvise(self._handles[info.file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._handles[info.file]

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, info: TensorInfo, start: int, count: int) -> np.ndarray:
        array = np.empty(count, info.dtype.storage)
        read_into(self.handle(info), array, info.offset + start * info.dtype.size, info.file)
        return array


def cut(whole: range, length: int) -> Iterator[range]:
    """``whole`` in consecutive pieces of ``length``, at least 1; the last may be shorter."""
    step = max(1, length)
    for start in range(whole.start, whole.stop, step):
        yield range(start, min(start + step, whole.stop))


def read_into(handle: int, array: np.ndarray, offset: int, file: Path) -> None:
    """Fill the contiguous ``array`` from ``offset`` of an open file; BadInput when the file ends too soon."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise BadInput(f"{file.name} ended while it was read; did something change it? Nothing was written.")
        done += count


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check every header under ``path``, a directory or one file.

    In a directory safetensors come before ``.bin`` before ``.pdparams``, and an index after a single file.
    Raises :class:`BadInput` for anything missing, damaged, overlapping, outside the directory or hostile.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist.")
    files = _files_of(path) if path.is_dir() else {path: None}
    tensors: dict[str, TensorInfo] = {}
    for file, expected in files.items():
        found = _read_header(file)
        missing = sorted((expected or set()) - found.keys())
        if missing:
            raise BadInput(f"the index says that {file.name} holds {missing[0]}, but it does not "
                           f"({len(missing)} such tensors). {remedy(path)}")
        repeated = sorted(found.keys() & tensors.keys())
        if repeated:
            raise BadInput(f"{repeated[0]} is in {tensors[repeated[0]].file.name} and again in {file.name}.")
        tensors.update(found)
    if not tensors:
        raise BadInput(f"{path} holds no tensor.")
    return Checkpoint(path, tensors, list(files))


def framework_of(file: Path) -> str | None:
    """What a file of tensors was written for: ``pt`` is torch; None where a safetensors file does not say."""
    if file.suffix != ".safetensors":
        return "np" if file.suffix == ".pdparams" else "pt"
    with open(file, "rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    metadata = header.get("__metadata__")
    return metadata.get("format") if isinstance(metadata, dict) else None


def weights_in(directory: Path) -> list[str]:
    """The files of weights in ``directory`` each of which is, or is the index of, a whole checkpoint."""
    return [name for name in (*SINGLE_FILES, *INDEX_FILES) if (directory / name).is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or :class:`BadInput` that says what is wrong with the file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path.name} holds a {type(content).__name__}; an object is needed.")
    return content


def read_config(source: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint: in its directory, or beside its one file."""
    directory = source if source.is_dir() else source.parent
    if not (directory / "config.json").is_file():
        raise BadInput(f"there is no config.json in {directory or Path('.')}; it says how many layers and heads the "
                       "model has. Put the one that belongs to the checkpoint there.")
    return read_json(directory / "config.json")


@contextmanager
def opened(path: str | Path) -> Iterator[Checkpoint]:
    """:func:`open_checkpoint`, closed at the end."""
    with open_checkpoint(path) as checkpoint:
        yield checkpoint


def _rows_and_columns(info: TensorInfo) -> tuple[int, int, int, int] | None:
    """Rows, columns, pitch and step of a tensor; None where its leading axes do not fold into one.

    A matrix keeps both axes, also one of length 1: a rule may cut it along either.
    """
    if info.strides is None:
        columns = info.shape[-1] if info.shape else 1
        return prod(info.shape[:-1]), columns, columns, 1
    if len(info.shape) == 2:
        return (*info.shape, *info.strides)
    *leading, (columns, step) = [axis for axis in zip(info.shape, info.strides, strict=True) if axis[0] != 1]
    rows, pitch = leading.pop() if leading else (1, columns * step)
    while leading:
        length, stride = leading.pop()
        if stride != rows * pitch:
            return None
        rows *= length
    return rows, columns, pitch, step


def _files_of(directory: Path) -> dict[Path, set[str] | None]:
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (directory / single).is_file():
            return {directory / single: None}
        if (directory / index).is_file():
            return _indexed(directory, directory / index)
    raise BadInput(f"{directory} has none of {', '.join(SINGLE_FILES)}, nor an index of shards. "
                   "Give a checkpoint directory or one file.")


def _indexed(directory: Path, index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index.name} has no weight_map.")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise BadInput(f"{index.name} places {name} in {shard!r}, which is outside its directory. Refused.")
        shards.setdefault(directory / shard, set()).add(name)
    absent = sorted(shard.name for shard in shards if not shard.is_file())
    if absent:
        raise BadInput(f"{index.name} names {absent[0]}, which is not there ({len(absent)} of {len(shards)} shards "
                       f"are missing). {remedy(directory)}")
    return dict(sorted(shards.items()))


def _read_header(file: Path) -> dict[str, TensorInfo]:
    if file.suffix == ".safetensors":
        return _read_safetensors_header(file)
    if file.suffix == ".pdparams":
        read = read_pdparams
    else:
        read = read_torch_zip if _starts_with(file, b"PK") else read_torch_legacy
    try:
        return {name: _placed(name, tensor, file) for name, tensor in read(file).items()}
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged pickle makes its readers stumble over
        if not any(_starts_with(file, magic) for magic in (b"PK", PICKLED)):
            raise BadInput(f"{file.name} is not a checkpoint. {KINDS}") from error
        raise BadInput(f"{file.name} cannot be read as a checkpoint ({type(error).__name__}: {error}). "
                       "It is damaged or of another format.") from error


def _starts_with(file: Path, magic: bytes) -> bool:
    with open(file, "rb") as handle:
        return handle.read(len(magic)) == magic


def _placed(name: str, tensor: StoredTensor, file: Path) -> TensorInfo:
    region, size = tensor.region, file.stat().st_size
    if tensor.strides is None and region.nbytes != prod(tensor.shape) * tensor.dtype.size:
        raise BadInput(f"{file.name}: {name} has {region.nbytes:,} bytes, its shape {list(tensor.shape)} needs "
                       f"{prod(tensor.shape) * tensor.dtype.size:,}. The file is damaged.")
    if region.offset + region.nbytes > size:
        raise BadInput(cut_short(file, region.offset + region.nbytes))
    return TensorInfo(name, tensor.dtype, tensor.shape, file, region.offset, region.nbytes, tensor.strides)


def _read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Format: 8 bytes of header length, a JSON header, then the data, which must be covered without gap."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise BadInput(f"{file.name} is not a whole safetensors file: it announces a header of {length:,} bytes "
                           f"and has {size:,} in all. {remedy(file)}")
        text = handle.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_repeats)
        header.pop("__metadata__", None)
        entries = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                   for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file.name} has a damaged header ({type(error).__name__}: {error}). "
                       f"{remedy(file)}") from error
    tensors = {name: _safetensors_info(file, 8 + length, name, *entry) for name, entry in entries.items()}
    end = _check_cover(file, 8 + length, tensors)
    if end != size:
        raise BadInput(cut_short(file, end))
    return tensors


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _safetensors_info(file: Path, base: int, name: str, code: Any, shape: tuple[Any, ...], *span: Any) -> TensorInfo:
    numbers = (*shape, *span)
    if len(span) != 2 or any(type(number) is not int or number < 0 for number in numbers):
        raise BadInput(f"{file.name}: {name} has shape {list(shape)} and offsets {list(span)}, which cannot be.")
    dtype, (start, stop) = by_code(code, f"{file.name}: {name}"), span
    needed = prod(shape) * dtype.size
    if stop - start != needed:
        raise BadInput(f"{file.name}: {name} has {stop - start:,} bytes, its shape {list(shape)} of {dtype.name} needs "
                       f"{needed:,}. The file is damaged.")
    return TensorInfo(name, dtype, shape, file, base + start, needed)


def _check_cover(file: Path, base: int, tensors: dict[str, TensorInfo]) -> int:
    """The end of the data, after making sure that the tensors lie one behind the other."""
    position = base
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            problem = "overlaps the tensor before it" if info.offset < position else "leaves a gap before it"
            raise BadInput(f"{file.name}: {info.name} {problem}. The header is damaged.")
        position += info.nbytes
    return position
