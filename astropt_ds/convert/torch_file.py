"""Files of ``torch.save``, read without running what a pickle may ask for, tensor by tensor.

Such a file is a zip archive of a pickle and one record a storage. The pickle is read by an
unpickler that knows how tensors are put together and the stubs that its caller names, and refuses
everything else by name. Records are checked against the archive's CRC-32 before they are used.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astropt_ds.errors import UserError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: magic, lengths of name and extra field
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Stub:
    """An instance of a class that is not to be run: its attributes and nothing else.

    Attributes:
        values: what the class was called with, if it was.
    """

    def __init__(self, *values: Any) -> None:
        self.values = values


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file.

    Attributes:
        file: where it is.
        record: of its storage.
        dtype: of its values.
        shape: of it.
        stride: of it, in elements, as torch has it.
        offset: of its first element in the storage.
    """

    file: TorchFile
    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """The whole tensor.

        Raises:
            UserError: its record is damaged.
        """
        span = 0
        if math.prod(self.shape):
            span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        values = self.file.read(self.record, self.dtype, self.offset, span)
        return values.as_strided(self.shape, self.stride)

    def part(self, start: int, length: int) -> Tensor:
        """So many elements from ``start`` on of a 1-D tensor.

        Raises:
            UserError: its record is damaged, or it is shorter.
        """
        if len(self.shape) != 1 or self.stride != (1,) or start + length > self.shape[0]:
            raise UserError(
                f"{self.file.path}: {self.record} of shape {list(self.shape)} has no elements "
                f"{start} to {start + length}"
            )
        return self.file.read(self.record, self.dtype, self.offset + start, length)


class TorchFile:
    """A file of ``torch.save``.

    Args:
        path: of the file.
        stubs: classes, as ``module.name``, that it may hold instances of.

    Attributes:
        content: what was saved, tensors as :class:`StoredTensor`, instances as :class:`Stub`.

    Raises:
        UserError: it is no such file, is damaged, or asks for anything else.
    """

    def __init__(self, path: Path, stubs: Iterable[str] = ()) -> None:
        self.path = path
        self._checked: set[str] = set()
        try:
            with zipfile.ZipFile(path) as archive:
                records = {info.filename: info for info in archive.infolist()}
                self._folder = self._find_folder(records)
                prefix = f"{self._folder}/"
                self._records = {n.removeprefix(prefix): info for n, info in records.items()}
                order = self._whole(archive, "byteorder") if "byteorder" in self._records else b""
                text = self._whole(archive, "data.pkl")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except UserError:
            raise
        except Exception as error:  # a damaged archive may fail in any way
            raise self._damaged(error) from None
        if order not in (b"", b"little"):
            raise UserError(f"{path}: has byte order {order!r}; only b'little' is read")
        try:
            _check_sizes(text)
            self.content = _Unpickler(text, self, stubs).load()
        except UserError:
            raise
        except Exception as error:  # so may a damaged pickle
            raise self._damaged(error) from None

    def read(self, record: str, dtype: torch.dtype, start: int, length: int) -> Tensor:
        """So many elements of a storage from ``start`` on; 1-D.

        Raises:
            UserError: the record is missing, shorter or damaged.
        """
        info = self._records.get(record)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path}: has no record {record} as torch writes it")
        first, size = start * dtype.itemsize, length * dtype.itemsize
        if min(start, length) < 0 or first + size > info.file_size:
            raise UserError(f"{self.path}: {record} ends before its tensor does")
        buffer = torch.empty(size, dtype=torch.uint8)
        try:
            if record not in self._checked:
                with zipfile.ZipFile(self.path) as archive, archive.open(info) as stream:
                    while stream.read(1 << 20):
                        pass  # at the end it compares the checksum
                self._checked.add(record)
            with self.path.open("rb") as file:
                file.seek(info.header_offset)
                _, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                file.seek(name + extra + first, io.SEEK_CUR)
                file.readinto(buffer.numpy().data)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        except Exception as error:
            raise self._damaged(error) from None
        return buffer.view(dtype)

    def _find_folder(self, records: dict[str, zipfile.ZipInfo]) -> str:
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{self.path}: a zip archive, but not one that torch.save wrote")
        return pickles[0].removesuffix("/data.pkl")

    def _whole(self, archive: zipfile.ZipFile, record: str) -> bytes:
        return archive.read(self._records[record])

    def _damaged(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"{self.path}: damaged, or no file that torch.save wrote ({reason})")


def _check_sizes(text: bytes) -> None:
    """See that a pickle is whole, and asks for no memory beyond its own size.

    The unpickler would allocate what a damaged or malicious one tells it to before it reads on.
    """
    for code, argument, _ in pickletools.genops(text):
        memo = code.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if memo and isinstance(argument, int) and argument > len(text):
            raise pickle.UnpicklingError(f"memo {argument} in {len(text)} bytes")


class _Unpickler(pickle.Unpickler):
    """Knows tensors, ordered dictionaries and stubs.

    What it hands to a pickle, which may set attributes on it, is made anew for each file.
    """

    def __init__(self, text: bytes, file: TorchFile, stubs: Iterable[str]) -> None:
        super().__init__(io.BytesIO(text))
        self._file = file

        def tensor(
            storage: tuple[str, torch.dtype, int],
            offset: int,
            shape: tuple[int, ...],
            stride: tuple[int, ...],
            *_: Any,
        ) -> StoredTensor:
            record, dtype, _numel = storage
            return StoredTensor(file, record, dtype, tuple(shape), tuple(stride), offset)

        def parameter(data: StoredTensor, *_: Any) -> StoredTensor:
            return data

        def subclassed(
            rebuild: Any, _kind: Any, arguments: tuple, _attributes: Any
        ) -> StoredTensor:
            return rebuild(*arguments)

        self._known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": parameter,
            "torch._tensor._rebuild_from_type_v2": subclassed,  # a tensor with attributes
            "torch.Tensor": type("Tensor", (), {}),
            **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
            **{str(dtype): dtype for dtype in STORAGES.values()},
            **{name: type(name.rpartition(".")[2], (Stub,), {}) for name in stubs},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[f"{module}.{name}"]
        except KeyError:
            asked = " ".join(f"{module}.{name}".split())
            raise UserError(
                f"{self._file.path}: refused: its pickle asks for {asked}, which is no part of a "
                "checkpoint's tensors and might run anything"
            ) from None

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind} of {dtype}")
        return f"data/{key}", dtype, numel
