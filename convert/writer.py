"""Where every byte of the result will lie, known before the first is written; and the directory it appears in.

Safetensors and ``.pdparams`` alike come down to a :class:`Layout`: files of known size, small pieces of text at
known places, and for each tensor the place of its bytes. The stream then writes into these places in any order.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, current_thread, main_thread
from typing import Any

from .checkpoint import Matrix, read_json
from .dtypes import Dtype
from .errors import MARKER, BadInput
from .pickles import NAME_TABLE
from .plan import Move

DTYPES_OF_SAFETENSORS = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""In the order in which safetensors lays tensors into a file."""
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class FileLayout:
    """One file: its size in bytes, and the (offset, bytes) that are not tensor data."""

    name: str
    size: int
    pieces: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Layout:
    """All files of a result, and for each target tensor its file and the offset of its data in it."""

    files: tuple[FileLayout, ...]
    places: dict[str, tuple[str, int]]
    index: tuple[str, str] | None

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def make_layout(moves: Sequence[Move], file_format: str, shard_size: int, framework: str = "np") -> Layout:
    """Distribute ``moves`` over shards of at most ``shard_size`` bytes (a larger tensor has one of its own).

    ``framework`` is what a safetensors file says it was made for: PaddleNLP reads ``np``, transformers ``pt``. A file
    for transformers is the one that safetensors itself would write, to the byte.
    """
    stem, suffix, lay_out = {
        "safetensors": ("model", "safetensors", partial(_safetensors_file, framework)),
        "pdparams": ("model_state", "pdparams", _pdparams_file),
    }[file_format]
    shards = _shards(moves, shard_size)
    names = [f"{stem}.{suffix}"] if len(shards) == 1 else [
        f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
    files, places = [], {}
    for name, shard in zip(names, shards, strict=True):
        file, offsets = lay_out(name, shard)
        files.append(file)
        places |= {target: (name, offset) for target, offset in offsets.items()}
    return Layout(tuple(files), places, None if len(shards) == 1 else (f"{stem}.{suffix}.index.json", json.dumps({
        "metadata": {"total_size": sum(move.nbytes for move in moves)},
        "weight_map": {target: file for target, (file, _) in places.items()},
    }, indent=2)))


def parse_size(text: str) -> int:
    """``5GB`` or ``512MiB`` in bytes; ValueError when it is neither."""
    digits = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(digits):].strip().upper()
    size = int(float(digits) * UNITS[unit]) if unit in UNITS else 0
    if size <= 0:
        raise ValueError(text)
    return size


class Staging:
    """The directory beside the output, or beside what that is a link to, in which a result grows until it is whole.

    Entering removes what an interrupted run left, :meth:`publish` renames the directory into place; leaving
    without it removes everything. A lock keeps two runs from writing to the same output.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._place = place = output.resolve() if output.is_symlink() else output
        self.path = place.parent / f".{place.name}.staging"
        self._retired = place.parent / f".{place.name}.replaced"
        self._lock_path = place.parent / f".{place.name}.lock"
        self._lock: int | None = None
        self._made: list[Path] = []
        self._handles: dict[str, int] = {}
        self._writing: dict[str, Lock] = {}

    def __enter__(self) -> Staging:
        try:
            with undisturbed():
                self._enter()
        except KeyboardInterrupt:
            if self._lock is not None:
                self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        try:
            self._made = [folder for folder in self._place.parents if not folder.exists()]
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            shutil.rmtree(self.path, ignore_errors=True)
            self._settle()
            self.path.mkdir()
        except BlockingIOError as error:
            raise BadInput(f"another conversion is writing to {self.output} right now. Wait for it to end.") from error
        except OSError as error:
            raise BadInput(f"cannot write beside {self.output}: {error.strerror}. Nothing was written.") from error

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            self._leave()

    def _leave(self) -> None:
        self._close()
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self._settle()
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
        for folder in self._made:
            with suppress(OSError):  # it is not empty: the result is in it
                folder.rmdir()

    def allocate(self, layout: Layout) -> None:
        """Create every file at its full size with its pieces; :class:`BadInput` when the disk has no room."""
        free = shutil.disk_usage(self.path).free
        if free < layout.nbytes:
            raise BadInput(f"no space left for {self.output}: {layout.nbytes:,} bytes are needed, {free:,} are free. "
                           "Nothing was written.")
        for file in layout.files:
            handle = os.open(self.path / file.name, os.O_CREAT | os.O_RDWR, 0o644)
            self._handles[file.name], self._writing[file.name] = handle, Lock()
            try:
                os.posix_fallocate(handle, 0, file.size)
                for offset, piece in file.pieces:
                    os.pwrite(handle, piece, offset)
            except OSError as error:
                raise BadInput(f"no space left for {self.output}: {error.strerror}. Nothing was written.") from error
        if layout.index:
            (self.path / layout.index[0]).write_text(layout.index[1])

    def write(self, file: str, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``; :class:`BadInput` when the disk is full.

        The kernel lets one writer at a time into a file and the others spin; here they wait.
        """
        done = 0
        with self._writing[file]:
            while done < len(data):
                try:
                    done += os.pwrite(self._handles[file], data[done:], offset + done)
                except OSError as error:
                    raise BadInput(f"writing {self.output} failed: {error.strerror}. Nothing was written.") from error

    def matrix(self, file: str, offset: int, dtype: Dtype, size: int) -> Matrix:
        """``size`` elements that were written at ``offset``, to be read again."""
        return Matrix(self.path / file, self._handles[file], offset, dtype, 1, size, size)

    def publish(self) -> None:
        """Make the result appear under its name, in the place of an older one that may be replaced."""
        self._close()
        if self._place.exists():
            self._place.rename(self._retired)
        self.path.rename(self._place)

    def _locked(self) -> int:
        """The file that is locked is the one that others find: a run that ends takes the one that it held away."""
        while True:
            handle = os.open(self._lock_path, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(self._lock_path)):
                    return handle
            except FileNotFoundError:
                pass
            except OSError:
                os.close(handle)
                raise
            os.close(handle)

    def _settle(self) -> None:
        """The result that was to be replaced goes if its successor is there, and comes back if not."""
        if self._retired.exists() and not self._place.exists():
            self._retired.rename(self._place)
        shutil.rmtree(self._retired, ignore_errors=True)

    def _close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C meanwhile is heeded afterwards, so that what is tidied up is tidied up whole."""
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    heard: list[tuple[Any, ...]] = []
    before = signal.signal(signal.SIGINT, lambda *given: heard.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard and callable(before):
            before(*heard[0])


def refuse_overlap(source: Path, output: Path) -> None:
    """The output must not be the source's directory, nor hold it: it would be replaced."""
    replaced, held = output.resolve(), (source if source.is_dir() else source.parent).resolve()
    if replaced == held or replaced in held.parents:
        raise BadInput(f"--output {output} would replace the source {source}. Give another --output.")


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Only a directory that a conversion of ours made may be replaced, and only with ``--overwrite``."""
    if not output.exists() and not output.is_symlink():
        return
    ours = output.is_dir() and (output / MARKER).is_file()
    if not ours:
        raise BadInput(f"{output} exists and is not a conversion of ours; it is not touched. Give another --output.")
    if not overwrite:
        raise BadInput(f"{output} exists. Give --overwrite to replace it, or another --output.")


def marker_of(directory: Path) -> dict[str, Any]:
    """What the conversion that made ``directory`` left about itself; empty when it is not one of ours."""
    try:
        return read_json(directory / MARKER)
    except BadInput:
        return {}


def _shards(moves: Sequence[Move], shard_size: int) -> list[list[Move]]:
    shards: list[list[Move]] = [[]]
    filled = 0
    for move in moves:
        if shards[-1] and filled + move.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(move)
        filled += move.nbytes
    return shards


def _safetensors_file(framework: str, name: str, moves: Iterable[Move]) -> tuple[FileLayout, dict[str, int]]:
    """Wider dtypes first, so that every tensor is aligned; for transformers by name besides, as safetensors does.

    For PaddleNLP a scalar gets the shape [1]: its reader cannot read a tensor without dimensions (it fails with
    ``slice indices must be integers``).
    """
    header: dict[str, object] = {"__metadata__": {"format": framework}}
    offsets, position = {}, 0
    for_torch = framework == "pt"
    place = _of_safetensors if for_torch else (lambda move: -move.dtype.size)
    for move in sorted(moves, key=place):
        header[move.target] = {"dtype": move.dtype.code, "shape": list(move.shape) or [1] * (not for_torch),
                               "data_offsets": [position, position + move.nbytes]}
        offsets[move.target] = position
        position += move.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    piece = struct.pack("<Q", len(text)) + text
    return (FileLayout(name, start + position, ((0, piece),)),
            {target: start + offset for target, offset in offsets.items()})


def _of_safetensors(move: Move) -> tuple[int, str]:
    """Where safetensors itself puts a tensor."""
    return DTYPES_OF_SAFETENSORS.index(move.dtype.code), move.target


def _pdparams_file(name: str, moves: Iterable[Move]) -> tuple[FileLayout, dict[str, int]]:
    """A protocol-4 pickle of {name: numpy array} and the table of names, as ``paddle.save`` writes it.

    Written opcode by opcode (see CPython's Lib/pickletools.py), without frames and memo, so that each tensor's
    data lies in one piece at an offset known beforehand.
    """
    moves = list(moves)
    pieces, offsets, position = [], {}, 0
    text = b"\x80\x04}("
    for move in moves:
        text += _pickled_text(move.target) + _array_opening(move)
        pieces.append((position, text))
        offsets[move.target] = position + len(text)
        position += len(text) + move.nbytes
        text = b"tb"
    table = b"}(" + b"".join(2 * _pickled_text(move.target) for move in moves) + b"u"
    text += _pickled_text(NAME_TABLE) + table + b"u."
    pieces.append((position, text))
    return FileLayout(name, position + len(text), tuple(pieces)), offsets


def _array_opening(move: Move) -> bytes:
    """The opcodes of a numpy array up to its data: _reconstruct(ndarray, (0,), b"b"), then its state."""
    code = move.dtype.storage.str[1:]
    state = b"".join(b"J" + struct.pack("<i", number) if number < 2**31 else
                     b"\x8a\x08" + struct.pack("<q", number) for number in move.shape)
    dtype = (_pickled_global("numpy", "dtype") + _pickled_text(code) + b"\x89\x88\x87R"
             + b"(K\x03" + _pickled_text("<") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb")
    return (_pickled_global("numpy.core.multiarray", "_reconstruct") + _pickled_global("numpy", "ndarray")
            + b"K\x00\x85C\x01b\x87R(K\x01(" + state + b"t" + dtype + b"\x89\x8e" + struct.pack("<Q", move.nbytes))


def _pickled_global(module: str, name: str) -> bytes:
    return _pickled_text(module) + _pickled_text(name) + b"\x93"


def _pickled_text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded
