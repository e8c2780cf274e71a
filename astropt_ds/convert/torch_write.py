"""Files that ``torch.load`` reads, written tensor by tensor.

``torch.save`` wants all tensors in memory at once, and the classes of all instances at hand.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astropt_ds.convert.unpickle import STORAGES
from astropt_ds.model_folder.weights import as_bytes

FOLDER = "archive"
ALIGNMENT = 64  # of a record's bytes in the file, as torch.save aligns them
HEADER_BYTES = 30  # of a zip record, before its name
LARGE = 1 << 30  # bytes from which on a record has the field for large ones
LARGE_FIELD_BYTES = 20
PADDING, PADDING_BYTES = 0x4246, 4  # the kind of extra field that torch pads with; its header


@dataclass(frozen=True)
class Announced:
    """A tensor that is read only when its turn to be written comes.

    Attributes:
        shape: of it.
        dtype: of it in the file.
        read: returns it, of any floating dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


def write_torch_file(path: Path, content: Any, stand_ins: Mapping[Any, str]) -> None:
    """Write what ``torch.load`` returns as ``content``; the same input gives the same bytes.

    Args:
        path: of the file.
        content: plain values, :class:`Announced` tensors and instances of the stand-ins.
        stand_ins: classes, and the ``module.name`` that each is written as.
    """
    text = io.BytesIO()
    pickler = _Pickler(text, stand_ins)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        _write(archive, "data.pkl", text.getvalue())
        _write(archive, "byteorder", b"little")
        for number, tensor in enumerate(pickler.announced):
            values = tensor.read().to(tensor.dtype)
            if tuple(values.shape) != tensor.shape:
                raise ValueError(f"shape {list(values.shape)} where {tensor.shape} was announced")
            _write(archive, f"data/{number}", as_bytes(values))
        _write(archive, "version", b"3\n")


def _write(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    record = zipfile.ZipInfo(f"{FOLDER}/{name}")  # dated 1980, whenever it is written
    large = len(data) >= LARGE
    before = HEADER_BYTES + len(record.filename) + LARGE_FIELD_BYTES * large
    padding = -(archive.start_dir + before + PADDING_BYTES) % ALIGNMENT
    record.extra = PADDING.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(record, "w", force_zip64=large) as stream:
        stream.write(data)


PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Pickler(PythonPickler):
    """The one in Python, since only that lets a class be written under another's name."""

    def __init__(self, file: io.BytesIO, stand_ins: Mapping[Any, str]) -> None:
        super().__init__(file, protocol=2)  # torch.save's
        self.announced: list[Announced] = []
        self._stand_ins = stand_ins

    def persistent_id(self, value: Any) -> tuple[str, type, str, str, int] | None:
        if not isinstance(value, _Storage):
            return None
        kind = next(name for name, dtype in STORAGES.items() if dtype == value.dtype)
        return ("storage", getattr(torch, kind), value.key, "cpu", value.numel)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Announced):
            return NotImplemented
        storage = _Storage(str(len(self.announced)), value.dtype, math.prod(value.shape))
        self.announced.append(value)
        stride = torch.empty(value.shape, device="meta").stride()
        arguments: tuple[Any, ...] = (storage, 0, value.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments

    def save_global(self, value: Any, name: str | None = None) -> None:
        if value in self._stand_ins:
            module, _, name = self._stand_ins[value].rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            self.memoize(value)
        else:
            super().save_global(value, name)
