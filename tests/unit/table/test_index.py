"""Galaxies are found by id, and ids that are there twice are told."""

import numpy as np
import pyarrow as pa
import pytest

from astropt_ds.errors import UserError
from astropt_ds.table import index
from astropt_ds.table.index import INDEX, find, load_index, write_index


class Ids:
    """A part that is only ids."""

    def __init__(self, ids):
        self.table = pa.table({"id": pa.array(ids, pa.string())})
        self.rows = len(ids)

    def read(self, columns=None, rows=None):
        return self.table if rows is None else self.table.take(pa.array(rows))


def parts_of(count, parts=3):
    return [Ids([f"g{i}" for i in range(count) if i % parts == p]) for p in range(parts)]


def places(found):
    return {(part, row) for _, part, row in found[1].tolist()}


@pytest.mark.parametrize("bucket", [2_000_000, 10, 1])
def test_every_id_is_found_where_it_is_in_however_many_buckets(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(index, "BUCKET_ROWS", bucket)
    assert write_index(tmp_path, parts_of(500)).count == 0
    found = load_index(tmp_path)
    for number in (0, 1, 2, 255, 499):
        assert places(find(found, [f"g{number}"])) == {(number % 3, number // 3)}
    everyone = places(find(found, [f"g{i}" for i in range(500)]))
    assert everyone == {(i % 3, i // 3) for i in range(500)}
    assert not places(find(found, ["nobody"])) and not places(find(found, []))
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def test_the_index_is_the_same_whatever_the_buckets(tmp_path, monkeypatch):
    write_index(tmp_path, parts_of(300))
    whole = (tmp_path / INDEX).read_bytes()
    monkeypatch.setattr(index, "BUCKET_ROWS", 7)
    write_index(tmp_path, parts_of(300))
    assert (tmp_path / INDEX).read_bytes() == whole
    hashes = np.load(tmp_path / INDEX, mmap_mode="r")["hash"]
    assert (hashes[1:] > hashes[:-1]).all()


@pytest.mark.parametrize("bucket", [2_000_000, 3])
def test_duplicates_are_counted_and_named(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(index, "BUCKET_ROWS", bucket)
    parts = [Ids(["a", "b", "c", "b"]), Ids(["d", "a", "b"]), Ids([])]
    found = write_index(tmp_path, parts)
    assert found.count == 3 and sorted(found.ids) == ["a", "b"]


def test_of_very_many_duplicates_some_are_named_and_all_counted(tmp_path):
    found = write_index(tmp_path, [Ids([f"g{i}" for i in range(5000)])] * 2)
    assert found.count == 5000 and len(set(found.ids)) == index.LISTED


def test_ids_of_one_hash_are_no_duplicates_and_real_ones_among_them_are(tmp_path, monkeypatch):
    def narrow(ids):
        return np.zeros(len(ids), np.uint64)

    monkeypatch.setattr(index, "hash_ids", narrow)
    found = write_index(tmp_path, [Ids(["a", "b"]), Ids(["a", "c"])])
    assert found.count == 1 and found.ids == ["a"]
    assert places(find(load_index(tmp_path), ["c"])) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_table_without_rows_has_an_index(tmp_path):
    assert write_index(tmp_path, [Ids([])]).count == 0
    assert not places(find(load_index(tmp_path), ["a"]))


def test_an_index_that_is_lost_or_damaged_is_told(tmp_path):
    with pytest.raises(UserError, match=r"_index.npy: cannot be read .*; tools/export_embeddings"):
        load_index(tmp_path)
    (tmp_path / INDEX).write_bytes(b"no index")
    with pytest.raises(UserError, match=r"_index.npy: cannot be read"):
        load_index(tmp_path)
