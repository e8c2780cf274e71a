"""What is killed, damaged or gone is made good by the same command, and nothing else is."""

import os
import signal
import threading

import pytest

from astropt_ds import read_embeddings
from astropt_ds.config import DataConfig
from astropt_ds.data.remote import open_store
from astropt_ds.data.split import Split
from astropt_ds.embedding.claims import Claims
from astropt_ds.embedding.parts import Parts
from astropt_ds.embedding.run import embed
from astropt_ds.errors import RunAgain, UserError
from astropt_ds.table.index import INDEX
from tests.unit.embedding.tables import check, failures_of, quiet, table_of

pytestmark = pytest.mark.usefixtures("many_parts")


def test_a_part_that_is_gone_is_made_again_and_only_that(job):
    embed(job(), quiet)
    parts = sorted(job().output.glob("part-*"))
    before = {part: (part.stat().st_mtime_ns, part.read_bytes()) for part in parts}
    parts[3].unlink()
    embed(job(), quiet)
    changed = [part for part in parts if part.stat().st_mtime_ns != before[part][0]]
    assert changed == [parts[3]] and parts[3].read_bytes() == before[parts[3]][1]


def test_a_flipped_byte_is_a_failure_and_never_another_embedding(job, copied, expected):
    store = open_store(str(copied), DataConfig())
    split = Split(store, "train")
    path = copied / split.entry.shards[0].name
    data = bytearray(path.read_bytes())
    row = split.index[13]
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    whole = path.read_bytes()
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="1 galaxies could not be looked at"):
        embed(job(data=(str(copied),)), quiet)
    ((identifier, reason),) = failures_of(job()).items()
    assert "do not match the checksum" in reason
    others = {i: known for i, known in expected.items() if i != identifier}
    check(read_embeddings(job().output, kind="numpy"), others)
    path.write_bytes(whole)  # a better copy of the shard
    check(table_of(job(data=(str(copied),))), expected)


def test_the_header_of_a_tar_that_is_damaged_costs_no_galaxy_for_good(job, copied, expected):
    split = Split(open_store(str(copied), DataConfig()), "train")
    path = copied / split.entry.shards[0].name
    whole = path.read_bytes()
    row = split.index[3]
    header = int(row["offset"]) + -(-int(row["size"]) // 512) * 512
    path.write_bytes(whole[:header] + b"?" * 512 + whole[header + 512 :])
    with pytest.raises(UserError, match="could not be looked at"):
        embed(job(data=(str(copied),)), quiet)
    assert all("the shard is damaged" in reason for reason in failures_of(job()).values())
    path.write_bytes(whole)
    check(table_of(job(data=(str(copied),))), expected)


def test_an_index_that_is_gone_is_made_again(job):
    one = str(table_of(job())["id"][0])
    (job().output / INDEX).unlink()
    embed(job(), quiet)
    assert list(read_embeddings(job().output, ids=one)["id"]) == [one]


def test_a_missing_shard_is_counted_and_tried_again_when_it_is_there(job, copied, expected):
    path = copied / "train-000002.tar"
    path.rename(copied / "away")
    with pytest.raises(UserError, match="20 galaxies could not be looked at .*tries them again"):
        embed(job(data=(str(copied),)), quiet)
    assert len(read_embeddings(job().output)) == len(expected) - 20
    assert all("train-000002.tar" in reason for reason in failures_of(job()).values())
    (copied / "away").rename(path)
    table = table_of(job(data=(str(copied),)))
    assert sorted(table["id"]) == sorted(expected) and not failures_of(job())


def test_a_part_that_was_damaged_where_it_lies_is_told_when_it_is_read(job):
    embed(job(), quiet)
    path = sorted(job().output.glob("part-*"))[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
        read_embeddings(job().output)
    path.unlink()
    embed(job(), quiet)
    assert len(read_embeddings(job().output)) == 150


def test_a_signal_ends_the_work_and_the_next_call_finishes_it(job, expected, monkeypatch):
    commit = Parts.commit

    def interrupted(self, part, *rest):
        commit(self, part, *rest)
        if part == 2:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    main_thread = threading.main_thread()
    assert threading.current_thread() is main_thread
    monkeypatch.setattr(Parts, "commit", interrupted)
    with pytest.raises(RunAgain, match="SIGTERM"):
        embed(job(), quiet)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list((job().output / "_claims").iterdir())
    assert not (job().output / "_manifest.json").exists()
    with pytest.raises(UserError, match="same command finishes it"):
        read_embeddings(job().output)
    monkeypatch.undo()
    assert sorted(table_of(job())["id"]) == sorted(expected)


def test_a_part_that_another_task_finishes_before_its_claim_is_not_made_again(
    job, tmp_path, monkeypatch
):
    embed(job(output=tmp_path / "theirs"), quiet)
    ours, take = job().output, Claims.take

    def late(self, name):
        if name == "part-000003":
            for file in (f"{name}.parquet", f"_parts/{name}.json"):
                os.link(tmp_path / "theirs" / file, ours / file)
        return take(self, name)

    monkeypatch.setattr(Claims, "take", late)
    embed(job(), quiet)
    assert (ours / "part-000003.parquet").samefile(tmp_path / "theirs" / "part-000003.parquet")
    assert not (ours / "part-000004.parquet").samefile(tmp_path / "theirs" / "part-000004.parquet")


def test_half_written_parts_of_killed_tasks_are_swept_away(job):
    embed(job(), quiet)
    os.unlink(next(job().output.glob("part-*")))
    (job().output / "_part-000000.parquet.0a.partial").write_bytes(b"half")
    (job().output / "_parts" / "_part-000000.json.0a.partial").write_bytes(b"half")
    (job().output / "_index-dead").mkdir()
    embed(job(), quiet)
    assert not list(job().output.rglob("*.partial")) and not list(job().output.glob("_index-*"))
