"""Pickles of checkpoints, read without running what they may ask for.

The unpickler knows how tensors and numbers are put together and the stubs that its caller names,
and refuses everything else by name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch

# Of record, dtype, shape, stride and offset, in elements of that dtype.
MakeTensor: TypeAlias = Callable[[str, torch.dtype, tuple[int, ...], tuple[int, ...], int], Any]

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


MOST_DIMENSIONS = 16
MOST_TUPLES = 30_000  # a tensor has four or so
NUMPY_SCALARS = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool", "int32", "int64", "float16", "float32", "float64")
}


class Stub:
    """An instance of a class that is not to be run: its attributes and nothing else.

    Attributes:
        values: what the class was called with, if it was.
    """

    def __init__(self, *values: Any) -> None:
        self.values = values


class Refused(Exception):
    """A pickle asks for what might run anything; the message says for what."""


def unpickle(text: bytes, stubs: Iterable[str], make_tensor: MakeTensor) -> Any:
    """What a pickle of ``torch.save`` holds.

    Args:
        text: of the pickle.
        stubs: classes, as ``module.name``, whose instances become :class:`Stub`.
        make_tensor: of a tensor's record and layout.

    Raises:
        Refused: it asks for anything else.
        Exception: of any kind, where it is damaged.
    """
    _check_room(text)
    return _Unpickler(text, stubs, make_tensor).load()


def _check_room(text: bytes) -> None:
    """See that a pickle is no shorter than it says, and no bomb.

    The unpickler allocates what it is told to before it reads on, and tuples in tuples, without
    end, overflow the interpreter's stack.

    Raises:
        ValueError: it is one.
    """
    tuples = 0
    for opcode, argument, _ in pickletools.genops(text):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(text):
            raise ValueError(f"memo {argument} in {len(text)} bytes")
        tuples += opcode.name.startswith("TUPLE")
    if tuples > MOST_TUPLES:
        raise ValueError(f"{tuples} tuples, where {MOST_TUPLES} are the most")


class _Unpickler(pickle.Unpickler):
    """Knows tensors, ordered dictionaries, numpy's scalars as plain numbers, and stubs.

    What it hands to a pickle, which may set attributes on it, is made anew for each file.
    """

    def __init__(self, text: bytes, stubs: Iterable[str], make_tensor: MakeTensor) -> None:
        super().__init__(io.BytesIO(text))

        def tensor(
            storage: tuple[str, torch.dtype],
            offset: int,
            shape: tuple[int, ...],
            stride: tuple[int, ...],
            *_: Any,
        ) -> Any:
            record, dtype = storage
            numbers = (offset, *shape, *stride)
            if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
                raise pickle.UnpicklingError(f"strides {stride!r} of shape {shape!r}")
            if any(type(number) is not int or number < 0 for number in numbers):
                raise pickle.UnpicklingError(f"a tensor of {numbers!r}")
            return make_tensor(record, dtype, tuple(shape), tuple(stride), offset)

        def parameter(data: Any, *_: Any) -> Any:
            return data

        def size(numbers: tuple[int, ...] = ()) -> tuple[int, ...]:
            if len(numbers) > MOST_DIMENSIONS:
                raise pickle.UnpicklingError(f"a size of {len(numbers)} dimensions")
            return tuple(numbers)

        def ordered() -> OrderedDict:  # empty: a copy of what is given would take memory
            return OrderedDict()

        class NumpyDtype:
            def __init__(self, code: str, *_: Any) -> None:
                self.name = np.dtype(code).name  # refuses what is no dtype

            def __setstate__(self, state: tuple[Any, ...]) -> None:
                if state[1] not in ("<", "|"):
                    raise pickle.UnpicklingError(f"byte order {state[1]!r}")

        def scalar(dtype: NumpyDtype, data: bytes) -> bool | int | float:
            if dtype.name not in NUMPY_SCALARS or not isinstance(data, bytes):
                raise pickle.UnpicklingError(f"a numpy scalar of {dtype.name}")
            return np.frombuffer(data, NUMPY_SCALARS[dtype.name], count=1).item()

        def encode(text: str, encoding: str) -> bytes:
            return text.encode("latin1")

        def subclassed(rebuild: Any, _kind: Any, arguments: tuple, _attributes: Any) -> Any:
            return rebuild(*arguments)

        self._known: dict[str, Any] = {
            "collections.OrderedDict": ordered,
            # AstroPT's best_val_loss is a numpy scalar, whose bytes protocol 2 holds as text
            "numpy.dtype": NumpyDtype,
            "numpy.core.multiarray.scalar": scalar,
            "numpy._core.multiarray.scalar": scalar,
            "_codecs.encode": encode,
            "torch.Size": size,
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
            raise Refused(
                f"asks for {asked}, which is no part of a checkpoint's tensors and might "
                "run anything"
            ) from None

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, dtype, key, _location, _numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind} of {dtype}")
        return f"data/{key}", dtype
