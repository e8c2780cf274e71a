"""Files of ``torch.save``, read without running what a pickle may ask for, tensor by tensor.

Such a file is a zip archive of a pickle and one record a storage. Each is checked against the
archive's CRC-32 before it is used.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astropt_ds.convert.unpickle import Refused, unpickle
from astropt_ds.errors import UserError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: magic, lengths of name and extra field


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

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a tensor is not to be changed by the pickle that holds it")

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


def number(value: Any, otherwise: float) -> float:
    """A stored number, which may be a tensor of one element; the other where there is none.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, StoredTensor) and math.prod(value.shape) == 1:
        return value.read().item()
    if value is None:
        return otherwise
    if isinstance(value, int | float):
        return value
    raise ValueError(f"{type(value).__name__} for a number")


class TorchFile:
    """A file of ``torch.save``.

    Args:
        path: of the file.
        stubs: classes, as ``module.name``, that it may hold instances of.

    Attributes:
        content: what was saved, tensors as :class:`StoredTensor`, instances as :class:`Stub`.
        saved_as: the name that it had then, without its suffix, unless that is ``archive``.

    Raises:
        UserError: it is no such file, is damaged, or asks for anything else.
    """

    def __init__(self, path: Path, stubs: Iterable[str] = ()) -> None:
        self.path = path
        self._checked: set[str] = set()
        try:
            with zipfile.ZipFile(path) as archive:
                records = {info.filename: info for info in archive.infolist()}
                self.saved_as = self._find_folder(records)
                prefix = f"{self.saved_as}/"
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
            self.content = unpickle(text, stubs, partial(StoredTensor, self))
        except Refused as error:
            raise UserError(f"{path}: refused: its pickle {error}") from None
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
        try:
            buffer = torch.empty(size, dtype=torch.uint8)
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
        info = self._records[record]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{record} is compressed, as torch never does")
        return archive.read(info)

    def _damaged(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"{self.path}: damaged, or no file that torch.save wrote ({reason})")
