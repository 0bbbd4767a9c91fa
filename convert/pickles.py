"""Reading other people's pickles as data: tensors become regions of the file, anything else is refused.

Both formats are plain pickles around bulk bytes. The unpicklers below know a short list of names and build
descriptions, never objects; a pickle that asks for any other name wants to run code and is refused by that
name. Bulk bytes are stepped over, not read, so a checkpoint's memory is that of its header.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .dtypes import BY_NAME, Dtype
from .errors import BadInput, remedy

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
FOLLOWED_BY_DESCRIPTOR, DATA_DESCRIPTOR = 8, b"PK\x07\x08"
NAME_TABLE = "StructuredToParameterName@@"
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""What a training's checkpoint calls the weights that it keeps beside its optimizer's state."""
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}


@dataclass(frozen=True)
class Region:
    """``nbytes`` bytes at ``offset`` of a file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a checkpoint describes it; ``strides`` in elements, None where it lies in C order."""

    dtype: Dtype
    shape: tuple[int, ...]
    region: Region
    strides: tuple[int, ...] | None = None


def read_torch_zip(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a ``torch.save`` file of the zip format (torch >= 1.6), its records left where they are."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        records = {entry.filename: entry for entry in archive.infolist()}
        name = next((name for name in records if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if name is None:
            raise BadInput(f"{path.name} is a zip archive without data.pkl; it is not a torch checkpoint.")
        root = name.removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in records else "little"
        if order != "little":
            raise BadInput(f"{path.name} was written on a big-endian machine; save it again on a little-endian one.")

        def region(key: str, elements: int, size: int) -> Region:
            entry = records.get(f"{root}data/{key}")
            if entry is None:
                raise BadInput(f"{path.name} has no record data/{key}; the file is damaged. {remedy(path)}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise BadInput(f"{path.name} has compressed records; torch.save does not write such files.")
            return _record(file, archive, entry, elements * size)

        unpickler = _TorchUnpickler(io.BytesIO(archive.read(name)), path.name, region)
        return _tensors_of(unpickler.load(), path)


def _record(file: io.BufferedReader, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, nbytes: int) -> Region:
    """Where the bytes of a stored record lie. Every header about it must agree: its own checksum is not taken."""
    archive.open(entry).close()  # compares the name in front of the data with that in the directory
    file.seek(entry.header_offset + 26)
    offset = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    file.seek(offset + entry.file_size)
    followed = file.read(4) == DATA_DESCRIPTOR or not entry.flag_bits & FOLLOWED_BY_DESCRIPTOR
    if entry.file_size != nbytes or not followed:
        raise ValueError(f"record {entry.filename} has another size than announced")
    return Region(offset, nbytes)


def read_torch_legacy(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a ``torch.save`` file older than the zip format.

    Layout (``torch.serialization._legacy_save``): pickles of magic number, protocol, system info, the object
    and the storage keys, then for each key its number of elements (int64) and its bytes.
    """
    with open(path, "rb") as file:
        for expected in (TORCH_MAGIC, 1001):
            if _TorchUnpickler(file, path.name).load() != expected:
                raise BadInput(f"{path.name} is neither safetensors nor a file that torch.save wrote.")
        if _TorchUnpickler(file, path.name).load().get("little_endian") is not True:
            raise BadInput(f"{path.name} was written on a big-endian machine; save it again on a little-endian one.")
        storages: dict[str, tuple[int, int]] = {}

        def remember(key: str, elements: int, size: int) -> str:
            storages[key] = (elements, size)
            return key

        described = _tensors_of(_TorchUnpickler(file, path.name, remember).load(), path)
        regions, offset = {}, 0
        keys = _TorchUnpickler(file, path.name).load()
        offset = file.tell()
        for key in keys:
            if key not in storages:
                raise BadInput(f"{path.name} lists a storage {key!r} that no tensor uses; the file is damaged.")
            elements, size = storages[key]
            file.seek(offset)
            if struct.unpack("<q", file.read(8)) != (elements,):
                raise ValueError(f"storage {key} has another size than announced")
            regions[key] = Region(offset + 8, elements * size)
            offset += 8 + elements * size
        if offset != path.stat().st_size:
            raise BadInput(cut_short(path, offset))
        return {name: _with_region(tensor, regions[tensor.region[0]]) for name, tensor in described.items()}


def read_pdparams(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a ``paddle.save`` state dictionary; numpy's uint16 is bfloat16, as paddle.load takes it."""
    with open(path, "rb") as file:
        state = _PaddleUnpickler(file, path.name).load()
    if not isinstance(state, dict):
        raise BadInput(f"{path.name} holds a {type(state).__name__}, not a dictionary of tensors.")
    state.pop(NAME_TABLE, None)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Array):
            raise BadInput(f"{path.name}: {name!r} is a {type(value).__name__}; names and tensors are needed, "
                           "nothing else. Save net.state_dict() alone.")
    return {name: array.described(path.name, name) for name, array in state.items()}


def cut_short(path: Path, promised: int) -> str:
    """The sentence for a file whose size is not what its header promises."""
    actual = path.stat().st_size
    problem = "is cut short" if actual < promised else "is longer than it should be"
    return (f"{path.name} {problem}: its header promises {promised:,} bytes, it has {actual:,}. {remedy(path)}")


def _refuse(file: str, module: str, name: str) -> None:
    raise BadInput(f"{file} wants to run code ({module}.{name}) while it is loaded. Nothing of it was run. "
                   "Get the weights as safetensors, or as torch.save(net.state_dict(), …) writes them.")


class _DataUnpickler(pickle._Unpickler):
    """The pure-Python unpickler: a damaged length cannot make it allocate what the file does not hold.

    A pickle may set the state of what it made itself, and of nothing else: BUILD would write into any object, also
    into one of ours.
    """

    def _build(self) -> None:
        if type(self.stack[-2]) not in (OrderedDict, _Array, _ArrayDtype):
            raise ValueError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        self.load_build()

    dispatch: ClassVar = pickle._Unpickler.dispatch | {pickle.BUILD[0]: _build}


class _TorchUnpickler(_DataUnpickler):
    """What torch.save writes: tensors described by their storage."""

    def __init__(self, file: io.BufferedIOBase, name: str, storage: Any = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._name, self._storage = name, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            raise BadInput(f"{self._name} holds a tensor whose dtype is not one of {', '.join(BY_NAME)}.")
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            ("torch", "Size"): tuple,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return BY_NAME[STORAGES[name]]
        return _refuse(self._name, module, name)

    def persistent_load(self, pid: Any) -> tuple[Any, Dtype]:
        _, dtype, key, _, elements, *view = pid
        if any(item is not None for item in view):
            raise BadInput(f"{self._name} stores views of storages, as torch < 0.4 did; save it again with a newer "
                           "torch.")
        return self._storage(key, elements, dtype.size), dtype


def _rebuild_tensor(storage: tuple[Any, Dtype], offset: int, shape: tuple[int, ...], strides: tuple[int, ...],
                    *rest: Any) -> StoredTensor:
    where, dtype = storage
    return _with_region(StoredTensor(dtype, tuple(shape), (where, offset), tuple(strides)), where)


def _with_region(tensor: StoredTensor, where: Any) -> StoredTensor:
    """``tensor`` placed inside the storage at ``where``; a key instead of a region is resolved later."""
    offset = tensor.region[1]
    if not isinstance(where, Region):
        return StoredTensor(tensor.dtype, tensor.shape, (where, offset), tensor.strides)
    size = tensor.dtype.size
    if min(offset, *tensor.shape, *tensor.strides, 0) < 0:
        raise ValueError("a tensor has a negative size, stride or offset")
    contiguous = tensor.strides == _c_strides(tensor.shape) or prod(tensor.shape) <= 1
    span = prod(tensor.shape) if contiguous else 1 + sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (offset + span) * size > where.nbytes:
        raise ValueError("a tensor reaches beyond its storage")
    return StoredTensor(tensor.dtype, tensor.shape, Region(where.offset + offset * size, span * size),
                        None if contiguous else tensor.strides)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1:]) for axis in range(len(shape)))


def _unwrapped(state: Any, path: Path) -> Any:
    """The weights of a training's checkpoint; ``state`` itself where it is none. What may be either is refused."""
    wrappers = [key for key in WRAPPERS if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)]
    if not wrappers:
        return state
    beside = [str(key) for key, value in state.items() if isinstance(value, StoredTensor)]
    if len(wrappers) > 1 or beside:
        raise BadInput(f"{path.name} holds weights under {' and '.join([*wrappers, *beside[:1]])}. Save those alone "
                       "that are meant.")
    return state[wrappers[0]]


def _tensors_of(state: Any, path: Path) -> dict[str, StoredTensor]:
    state = _unwrapped(state, path)
    if not isinstance(state, Mapping):
        raise BadInput(f"{path.name} holds a {type(state).__name__}, not a dictionary of tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise BadInput(f"{path.name}: {name!r} is a {type(value).__name__}; names and tensors are needed, "
                           "nothing else. Save net.state_dict() alone.")
    return dict(state)


class _Array:
    """What a pickled numpy array says of itself; its bytes stay in the file."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def described(self, file: str, name: str) -> StoredTensor:
        _, shape, dtype, fortran, data = self.state
        if fortran or not isinstance(data, Region) or dtype.code not in _NUMPY_CODES or dtype.byteorder not in "<|":
            raise BadInput(f"{file}: {name} is stored in a way this reader does not know.")
        return StoredTensor(BY_NAME[_NUMPY_CODES[dtype.code]], tuple(shape), data)


class _ArrayDtype:
    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.byteorder = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byteorder = state[1]


_NUMPY_CODES = {"f8": "float64", "f4": "float32", "f2": "float16", "u2": "bfloat16", "i8": "int64", "i4": "int32",
                "i2": "int16", "i1": "int8", "u1": "uint8", "b1": "bool"}


class _PaddleUnpickler(_DataUnpickler):
    """What paddle.save writes: numpy arrays, over whose bytes it steps."""

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        super().__init__(file, encoding="latin1")
        self._file, self._name = file, name

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _ArrayDtype,
            ("collections", "OrderedDict"): OrderedDict,
        }
        return known[module, name] if (module, name) in known else _refuse(self._name, module, name)

    def _push_region(self, nbytes: int) -> None:
        frame = self._unframer.current_frame
        if frame is not None and frame.getbuffer().nbytes - frame.tell() >= nbytes:
            offset = self._file.tell() - (frame.getbuffer().nbytes - frame.tell())
            frame.seek(nbytes, io.SEEK_CUR)
        else:
            offset = self._file.tell()
            if offset + nbytes > Path(self._file.name).stat().st_size:
                raise BadInput(cut_short(Path(self._file.name), offset + nbytes))
            self._file.seek(nbytes, io.SEEK_CUR)
        self.append(Region(offset, nbytes))

    def _load_short(self) -> None:
        self._push_region(self.read(1)[0])

    def _load_long(self) -> None:
        self._push_region(struct.unpack("<I", self.read(4))[0])

    def _load_very_long(self) -> None:
        self._push_region(struct.unpack("<Q", self.read(8))[0])

    dispatch: ClassVar = _DataUnpickler.dispatch | {
        pickle.SHORT_BINBYTES[0]: _load_short,
        pickle.BINBYTES[0]: _load_long,
        pickle.BINBYTES8[0]: _load_very_long,
    }
