"""A data set that is elsewhere, read through a local cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from astropt_ds.config import DataConfig
from astropt_ds.data.cache import Cache
from astropt_ds.data.manifest import MANIFEST, Manifest, ShardEntry, SplitEntry, parse_manifest
from astropt_ds.data.store import Folder, Store
from astropt_ds.data.transfer import PIPE, Transfer, open_transfer, with_retries
from astropt_ds.errors import UserError


def open_store(path: str, config: DataConfig) -> Store:
    """The data set at a path, URL or ``pipe:`` command.

    Raises:
        UserError: there is none, or it cannot be reached.
    """
    return Remote(path, config) if path.startswith(PIPE) or "://" in path else Folder(Path(path))


class Remote:
    """A data set that is fetched from; its manifest at once, the rest when needed.

    Raises:
        UserError: no ``data.cache``, or the manifest cannot be fetched or is none of ours.
    """

    def __init__(self, url: str, config: DataConfig) -> None:
        if config.cache is None:
            raise UserError(
                f"data.path={url}: is remote and needs data.cache, a local folder with room for "
                f"data.cache_gb={config.cache_gb:g}"
            )
        self.transfer = open_transfer(url)
        self.cache = Cache(Path(config.cache), int(config.cache_gb * 1e9), config.retries)
        self.manifest = _fetch_manifest(self.transfer, config.retries)
        self._ahead = ThreadPoolExecutor(max_workers=1)  # starts no thread before its first task

    def __str__(self) -> str:
        return str(self.transfer)

    def file(self, name: str) -> str:
        """A file's full name, for messages."""
        return self.transfer.full(name)

    def open_index(self, split: SplitEntry) -> int:
        """A descriptor of a split's index."""
        return self.cache.open(self.transfer, split.index, split.index_bytes, split.index_sha256)

    def open_shard(self, shard: ShardEntry) -> int:
        """A descriptor of a shard, fetched if it is not in the cache."""
        return self.cache.open(self.transfer, shard.name, shard.bytes, shard.sha256)

    def read_ahead(self, shards: Iterable[ShardEntry]) -> None:
        """Fetch these in the background, those that no other process is fetching."""
        for shard in shards:
            self._ahead.submit(self._fetch, shard)

    def check(self, split: SplitEntry, part: slice) -> None:
        """Nothing: a shard that cannot be had is told when it is fetched."""

    def cached_bytes(self, split: SplitEntry, window: int) -> int:
        """Two windows of shards and the index, or else the cache would drop what is needed next."""
        sizes = sorted((shard.bytes for shard in split.shards), reverse=True)
        return split.index_bytes + sum(sizes[: 2 * window])

    def _fetch(self, shard: ShardEntry) -> None:
        with suppress(UserError):  # told when the shard is needed
            self.cache.fetch_unless_busy(self.transfer, shard.name, shard.bytes, shard.sha256)


def _fetch_manifest(transfer: Transfer, retries: int) -> Manifest:
    where = transfer.full(MANIFEST)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        with_retries(lambda: transfer.fetch(MANIFEST, path), retries, where)
        return parse_manifest(path.read_bytes(), where)
