"""The weights of a model folder: safetensors, in several files with an index where they are large.

Each file's own header holds the sha256 of its tensors and the model's architecture, so that a
damaged file, or one beside the config.json of another model, is noticed. Files that others wrote
have neither, and load as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.errors import UserError
from astropt_ds.files import sync_file, write_durably
from astropt_ds.model import parameter_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # a file's most, as the Hugging Face hub has it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DIGEST = "sha256"
StoredAs: TypeAlias = tuple[tuple[int, ...], torch.dtype | str]  # a tensor's shape and dtype


def write_weights(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights tensor by tensor: no more than one is in memory at a time.

    The safetensors library would want all of them at once. The format is its own: the header's
    length, the header as JSON, and the tensors end to end.

    Args:
        folder: the model's.
        model: whose weights they are.
        dtype: of the weights in the files.
        tensors: all of them, in the order of :func:`parameter_shapes`, of any floating dtype.
        shard_bytes: of tensors in a file, unless one alone is larger.

    Raises:
        UserError: a value is too large for the dtype.
    """
    shapes = parameter_shapes(model)
    shards = _shards(shapes, dtype, shard_bytes)
    waiting = iter(tensors)
    files = {}
    for number, names in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, model, {n: shapes[n] for n in names}, dtype, waiting)
        files.update(dict.fromkeys(names, name))
    if (surplus := next(waiting, None)) is not None:
        raise ValueError(f"{surplus[0]} where nothing was announced")
    if len(shards) > 1:
        total = sum(map(math.prod, shapes.values())) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": files}
        write_durably(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int
) -> list[list[str]]:
    """The names of each file, in order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_file(
    path: Path,
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    unknown = "0" * hashlib.sha256().digest_size * 2
    described = {"format": "pt", "architecture": _architecture(model), DIGEST: unknown}
    header: dict[str, Any] = {"__metadata__": described}
    stored_as = next(name for name, known in DTYPE_NAMES.items() if known == dtype)
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored_as, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are to start at a multiple of eight bytes
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for expected, shape in shapes.items():
            name, values = next(tensors, ("nothing", torch.empty(0)))
            if name != expected or values.numel() != math.prod(shape):
                raise ValueError(f"{name} where {expected} was announced")
            data = as_bytes(cast(name, values, dtype))
            digest.update(data)
            file.write(data)
        file.seek(8 + text.index(unknown.encode()))
        file.write(digest.hexdigest().encode())
    sync_file(path)


def cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype.

    Raises:
        UserError: one is too large for it.
    """
    found = values.to(dtype)
    if dtype == torch.float16 and (found.isinf() & values.isfinite()).any():
        raise UserError(f"fp16: {name} has values beyond 65504; bf16 or fp32 would be right")
    return found


def as_bytes(values: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in row-major order."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def _architecture(model: ModelConfig) -> str:
    return json.dumps(model.architecture(), sort_keys=True)


class StoredWeights:
    """The weights of a model folder, verified.

    Args:
        folder: the model's.
        model: whose weights they are to be.
        verify: whether checksums are compared, for which all is read.

    Attributes:
        dtype: of the weights; fp32 where they differ.

    Raises:
        UserError: a file is missing or damaged, or does not hold this model; all that is wrong
            with its tensors is named.
    """

    def __init__(self, folder: Path, model: ModelConfig, verify: bool = True) -> None:
        self._files = _files(folder)
        if model.layers > len(self._files):  # of the shapes of a billion there would be no end
            raise UserError(f"{folder}: layers={model.layers} of {len(self._files)} tensors")
        paths = sorted(set(self._files.values()))
        found: dict[str, StoredAs] = {}
        for path in paths:
            tensors = _checked(path, model, verify)
            found.update({n: t for n, t in tensors.items() if self._files.get(n, path) == path})
        where = folder / INDEX if (folder / INDEX).exists() else folder / WEIGHTS
        check_tensors(where, found, parameter_shapes(model))
        self.dtype = common_dtype(found)

    def tensor(self, name: str) -> Tensor:
        """One of them.

        Raises:
            UserError: its file is not what it was.
        """
        path = self._files[name]
        with _opened(path) as file:  # anew each time: the pages of a mapped file count as memory
            return file.get_tensor(name)


def _files(folder: Path) -> dict[str, Path]:
    """Where each tensor is.

    Raises:
        UserError: it cannot be told.
    """
    path = folder / INDEX
    if path.exists() and (folder / WEIGHTS).exists():
        raise UserError(f"{path}: beside {WEIGHTS}, which it does not list; one of them is stale")
    if not path.exists():
        path = folder / WEIGHTS
        return dict.fromkeys(_header(path)[0], path)
    try:
        names = json.loads(path.read_text())["weight_map"]
        return {name: folder / Path(file).name for name, file in names.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the index of a model's files ({error!r})") from None


def _header(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """The tensors of a file, with shape and dtype, and its metadata.

    Raises:
        UserError: missing or damaged.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        tensors = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
        return tensors, file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is no whole safetensors file ({reason})") from None


def _checked(path: Path, model: ModelConfig, verify: bool) -> dict[str, StoredAs]:
    """The tensors of a file whose bytes and model are those that its header tells."""
    tensors, metadata = _header(path)
    if "architecture" in metadata and (told := _differences(metadata["architecture"], model)):
        raise UserError(f"{path}: is of another model than config.json beside it: {told}")
    if verify and DIGEST in metadata and _data_digest(path) != metadata[DIGEST]:
        raise UserError(f"{path}: does not match the checksum in its header; it is damaged")
    return {
        name: (shape, DTYPE_NAMES.get(dtype, dtype)) for name, (shape, dtype) in tensors.items()
    }


def _differences(architecture: str, model: ModelConfig) -> str:
    """What differs; a key that an older version did not write has its default."""
    try:
        theirs = ModelConfig.model_validate_json(architecture).architecture()
    except ValidationError as error:
        keys = [".".join(map(str, fault["loc"])) for fault in error.errors()]
        return f"its header is damaged or of a newer version ({', '.join(keys) or 'no model'})"
    ours = model.architecture()
    differing = [key for key in ours if theirs[key] != ours[key]]
    return ", ".join(f"{key}={theirs[key]}, not {ours[key]}" for key in differing)


def _data_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def common_dtype(found: Mapping[str, StoredAs]) -> torch.dtype:
    """That of all tensors; fp32 where they differ."""
    dtypes = {dtype for _, dtype in found.values()}
    only = dtypes.pop()
    return only if not dtypes and isinstance(only, torch.dtype) else torch.float32


def check_tensors(
    where: Path | str,
    found: Mapping[str, StoredAs],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """See that stored tensors are those of a model, and name all that is wrong with them.

    Args:
        where: they are stored.
        found: shape and dtype of each.
        wanted: shape of each.

    Raises:
        UserError: they are not.
    """
    both = [name for name in wanted if name in found]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "not of this model": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {list(found[name][0])} for {list(wanted[name])}"
            for name in both
            if found[name][0] != wanted[name]
        ],
        "of a dtype other than fp32, bf16 and fp16": [
            f"{name} {str(found[name][1]).removeprefix('torch.')}"
            for name in both
            if found[name][1] not in DTYPES.values()
        ],
    }
    told = [f"{fault}: {_listed(names)}" for fault, names in faults.items() if names]
    if told:
        # a forged file's names may have line breaks
        raise UserError(f"{where}: " + " ".join("; ".join(told).split()))


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
