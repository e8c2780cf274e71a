"""Each fault ends as declared: a slot of weight zero that is named, or a clear stop."""

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import psutil
import pytest
import simplejpeg
import torch

from astropt_ds.data.decode import encode_fluxes
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from tests.conftest import REPOSITORY, TINY, blob
from tests.unit.data.loading import galaxies, steps


@pytest.fixture(scope="module")
def shards(real_shards):
    return real_shards


@pytest.fixture(scope="module")
def tiny(shards):
    return (*TINY, f"data.path={shards}")


def flip(shards, tmp_path, row):
    """A copy of the shards with four bytes of one training image flipped."""
    copy = tmp_path / "damaged"
    shutil.copytree(shards, copy)
    split = Split(Folder(copy), "train")
    shard, key = split.place(row)
    data = bytearray((copy / shard).read_bytes())
    middle = int(split.index[row]["offset"]) + int(split.index[row]["size"]) // 2
    for i in range(middle, middle + 4):
        data[i] ^= 0xFF
    (copy / shard).write_bytes(data)
    return copy, shard, key


def test_flipped_bytes_cost_one_slot_its_weight_and_are_named(tiny, shards, tmp_path):
    copy, shard, key = flip(shards, tmp_path, 3)
    bad = galaxies((*tiny, f"data.path={copy}"))
    n = len(Split(Folder(shards), "train"))
    good = galaxies(tiny)
    for (a,), (b,) in zip(steps(bad, 0, n // 12), steps(good, 0, n // 12), strict=True):
        assert torch.equal(a.rows, b.rows)
        hit = a.rows == 3
        assert torch.equal(a.weights, (~hit).float())
        assert torch.equal(a.patches[~hit], b.patches[~hit])
        assert (a.patches[hit] == 0).all()
        assert [(f.shard, f.key) for f in a.faults] == [(shard, key)] * int(hit.sum())
        assert all("checksum" in f.reason for f in a.faults)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda p: shutil.rmtree(p), "is no folder"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json, so no shards"),
        (lambda p: (p / "manifest.json").write_text("{}"), "not a manifest"),
        (lambda p: (p / "manifest.json").write_text("["), "not a manifest"),
        (lambda p: (p / "train-000001.tar").unlink(), "train-000001.tar: missing"),
        (lambda p: (p / "train-000001.tar").write_bytes(b"x"), "1 bytes; the manifest says"),
        (
            lambda p: (p / "train.index.npy").write_bytes(b"x"),
            "not the index that the manifest describes",
        ),
        (lambda p: np.save(p / "train.index.npy", np.zeros(3)), "not the index that"),
    ],
)
def test_damaged_data_sets_are_refused_at_the_start(tiny, shards, tmp_path, harm, message):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    harm(copy)
    with pytest.raises(UserError, match=message) as error:
        galaxies((*tiny, f"data.path={copy}"))
    assert "\n" not in str(error.value)


def rewrite_index(folder, change):
    """Change the training index and make the manifest agree with it."""
    split = Split(Folder(folder), "train")
    index, manifest = np.array(split.index), split.store.manifest
    change(index, split)
    np.save(folder / "train.index.npy", index)
    for number, shard in enumerate(manifest.splits["train"].shards):
        rows = index[split.first[number] : split.first[number + 1]]
        shard.index_crc32 = zlib.crc32(rows.tobytes())
    manifest.save(folder)


def overwrite(folder, row, data):
    """Put other bytes in an image's place, with a checksum that agrees: it was bad when indexed."""

    def change(index, split):
        with (folder / split.place(row)[0]).open("r+b") as file:
            file.seek(int(index[row]["offset"]))
            file.write(data)
        index[row]["size"], index[row]["crc32"] = len(data), zlib.crc32(data)

    rewrite_index(folder, change)


def grey_jpeg():
    return simplejpeg.encode_jpeg(blob(0)[..., :1].copy(), quality=30, colorspace="GRAY")


@pytest.mark.parametrize(
    "data, reason",
    [
        (grey_jpeg(), "has 1 channel; 3 would be right"),
        (simplejpeg.encode_jpeg(blob(0), quality=20)[:300], "cannot be decoded"),
        (encode_fluxes(np.zeros((8, 8, 3))), "holds float32; uint8 would be right"),
        (simplejpeg.encode_jpeg(blob(0, 32), quality=50), "is 32 x 32 pixels, smaller than 64"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_the_wrong_kind_keeps_its_slot_and_is_named(
    tiny, shards, tmp_path, workers, data, reason
):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    overwrite(copy, 5, data)
    loader = galaxies((*tiny, f"data.path={copy}"), data__workers=workers)
    n = len(Split(Folder(shards), "train"))
    faults = []
    for (batch,) in steps(loader, 0, -(-n // 12)):  # an epoch, and into the next
        hit = batch.rows == 5
        assert torch.equal(batch.weights, (~hit).float()) and batch.problem is None
        faults += batch.faults
    loader.close()
    (fault,) = set(faults)
    assert (fault.shard, fault.key) == Split(Folder(shards), "train").place(5)
    assert reason in fault.reason


def read_all(tiny, folder, harm=None, **overrides):
    """(problem, sum of weights) of each batch up to the first with a problem.

    ``harm`` is done to the opened data before the first of it is read.
    """
    loader = galaxies((*tiny, f"data.path={folder}"), **overrides)
    if harm:
        harm()
    found = []
    for batches in loader.steps(0, 30):
        found += [(batch.problem, batch.weights.sum()) for batch in batches]
        if found[-1][0]:
            break
    loader.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda path: path.unlink(), "train-000002.tar: No such file or directory"),
        (lambda path: os.truncate(path, 9000), "train-000002.tar: 9000 bytes; the manifest says"),
    ],
)
def test_a_shard_lost_or_cut_under_way_is_a_clear_stop(
    tiny, shards, tmp_path, workers, harm, message
):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    path = copy / "train-000002.tar"
    found = read_all(tiny, copy, lambda: harm(path), data__workers=workers, data__window=1)
    assert message in found[-1][0] and found[-1][1] == 0
    assert all(problem is None for problem, _ in found[:-1])


def test_damaged_rows_of_the_index_are_a_clear_stop(tiny, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    path = copy / "train.index.npy"
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    last = Folder(copy).manifest.splits["train"].shards[-1].name
    assert f"the rows of {last} do not match their checksum" in read_all(tiny, copy)[-1][0]


def test_closed_loaders_leave_no_file_open(tiny):
    loader = galaxies(tiny)
    gc.collect()  # loaders of other tests must not end in the middle of this one
    before = psutil.Process().num_fds()
    for batches in loader.steps(0, 10):
        assert [batch.problem for batch in batches] == [None]
    assert psutil.Process().num_fds() > before
    loader.close()
    assert psutil.Process().num_fds() == before


def test_a_damaged_tar_header_harms_nobody_who_reads_by_index(tiny, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    split = Split(Folder(copy), "train")
    shard, _ = split.place(7)
    with (copy / shard).open("r+b") as file:
        file.seek(int(split.index[7]["offset"]) - 512)
        file.write(b"\xff" * 512)
    assert all(problem is None and weight == 12 for problem, weight in read_all(tiny, copy))


def test_a_shard_that_the_manifest_does_not_list_is_refused(tiny, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shutil.copy(copy / "train-000000.tar", copy / "train-000099.tar")
    with pytest.raises(UserError, match="train-000099.tar: is not in the manifest"):
        galaxies((*tiny, f"data.path={copy}"))


def test_a_killed_worker_is_a_clear_stop_and_no_hang(tiny):
    loader = galaxies(tiny, data__workers=2)
    found = []
    for number, batches in enumerate(loader.steps(0, 30)):
        found += [batch.problem for batch in batches]
        if number == 3:
            os.kill(loader._pool._workers[1].process.pid, signal.SIGKILL)
    assert found[:4] == [None] * 4 and len(found) == 30
    assert "killed by signal 9" in next(problem for problem in found if problem)
    loader.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_leaves_its_workers_reading(tiny, number):
    """So that the run can finish its step and save."""
    loader = galaxies(tiny, data__workers=2)
    for batches in loader.steps(0, 12):
        assert [batch.problem for batch in batches] == [None]
        for worker in loader._pool._workers:
            os.kill(worker.process.pid, number)
    loader.close()


def test_workers_end_with_the_process_that_made_them(tiny, tmp_path):
    overrides = [*tiny, "data.workers=2"]
    script = (
        "import os, sys, time\n"
        "from astropt_ds.config_source import load_config\n"
        "from astropt_ds.data.loader import Galaxies\n"
        "g = Galaxies(load_config('1m', sys.argv[1:])); g.open(0, 1)\n"
        "print(*(w.process.pid for w in g._pool._workers), flush=True)\n"
        "time.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *overrides],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(running, pids)):
        assert time.monotonic() < deadline, "the workers outlive their run"
        time.sleep(0.05)


def test_a_process_that_forgets_its_workers_ends_all_the_same(tiny):
    script = (
        "import sys\n"
        "from astropt_ds.config_source import load_config\n"
        "from astropt_ds.data.loader import Galaxies\n"
        "g = Galaxies(load_config('1m', sys.argv[1:])); g.open(0, 1)\n"
        "next(next(g.steps(0, 9)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, *tiny, "data.workers=2"]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0


def running(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_fewer_shards_than_workers_is_no_error(tiny, second):
    found = read_all(tiny, second, data__workers=5, data__image_size=64)
    assert all(problem is None and weight == 12 for problem, weight in found)


def test_the_hash_changes_with_the_data(tiny, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    overwrite(copy, 0, b"other bytes")
    assert galaxies((*tiny, f"data.path={copy}")).hash != galaxies(tiny).hash
