"""A table tells whether it is complete, and of what kind."""

import json

import pytest

from astropt_ds.errors import UserError
from astropt_ds.table.manifest import MANIFEST, PartEntry, TableManifest

PART = PartEntry(name="part-000000.parquet", rows=3, bytes=10, sha256="0" * 64)


def manifest(**values):
    return TableManifest(file_format="parquet", rows=3, asked=4, parts=[PART], **values)


def test_what_is_saved_is_loaded(tmp_path):
    saved = manifest(
        failures={"is no image": 1}, duplicates=1, duplicated=["Größe"], facts={"a": 1}
    )
    saved.save(tmp_path)
    assert TableManifest.load(tmp_path) == saved
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other-2"}, "format 'other-2'; 'astropt_ds-embeddings-1' would be right"),
        ({"rows": "many"}, r"not a table's \(rows: "),
        ({"surplus": 1}, r"not a table's \(surplus: "),
        ({"parts": None}, r"not a table's \(parts: "),
    ],
)
def test_a_manifest_that_is_none_is_refused_by_name_and_key(tmp_path, change, message):
    manifest().save(tmp_path)
    values = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=f"{MANIFEST}: {message}"):
        TableManifest.load(tmp_path)


def test_one_that_is_cut_off_or_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="No such file.*the same command finishes it"):
        TableManifest.load(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "astropt')
    with pytest.raises(UserError, match=r"not a table's \(JSON: "):
        TableManifest.load(tmp_path)
