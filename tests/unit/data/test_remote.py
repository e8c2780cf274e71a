import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.data.cache import Cache
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.manifest import MANIFEST
from astropt_ds.data.store import Folder
from astropt_ds.data.transfer import open_transfer
from astropt_ds.errors import UserError
from tests.conftest import REPOSITORY, TINY, free_port


@pytest.fixture(scope="module")
def shards(real_shards):
    return real_shards


@pytest.fixture(scope="module")
def tiny(shards):
    return (*TINY, f"data.path={shards}")


def loaders(tiny, ranks, *overrides):
    found = [Galaxies(load_config("1m", [*tiny, *overrides])) for _ in range(ranks)]
    for rank, loader in enumerate(found):
        loader.open(rank, ranks)
    return found


def consumed(loader, steps):
    """(rows, patches) of the first steps, and no fault."""
    rows, patches = [], []
    for batches in loader.steps(0, steps):
        for batch in batches:
            assert batch.problem is None and not batch.faults
            rows.append(batch.rows.clone())
            patches.append(batch.patches.clone())
    loader.close()
    return torch.cat(rows), torch.cat(patches)


def requests(log):
    return Counter(line for line in log.read_text().splitlines()[1:] if line.endswith(".tar"))


def largest_shard(shards):
    entries = Folder(shards).manifest.splits.values()
    return max(shard.bytes for split in entries for shard in split.shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_galaxies_in_the_same_order(
    tiny, shards, serve, tmp_path, workers
):
    (local,) = loaders(tiny, 1)
    expected = consumed(local, 12)
    url, _, log = serve()
    pipe = f"pipe:cat {shards}/{{}}"
    for where in (url, f"{url}/", pipe):
        cache = f"data.cache={tmp_path / 'cache'}"
        (remote,) = loaders(tiny, 1, f"data.path={where}", cache, f"data.workers={workers}")
        rows, patches = consumed(remote, 12)
        assert torch.equal(rows, expected[0]) and torch.equal(patches, expected[1])
    assert set(requests(log).values()) == {1}  # a shard is fetched once, whoever needs it


def test_all_processes_of_a_machine_fetch_a_shard_once_between_them(tiny, serve, tmp_path):
    url, _, log = serve()
    where = (f"data.path={url}", f"data.cache={tmp_path}", "data.workers=2")
    found = loaders(tiny, 3, *where)
    streams = [loader.steps(0, 12) for loader in found]
    for steps in zip(*streams, strict=True):  # side by side, as the ranks of a run
        for batches in steps:
            assert all(batch.problem is None for batch in batches)
    for loader in found:
        loader.close()
    assert len(requests(log)) >= 4 and set(requests(log).values()) == {1}


def test_the_cache_stays_within_its_bound_and_drops_what_was_used_least(shards, tmp_path):
    transfer = open_transfer(f"pipe:cat {shards}/{{}}")
    entries = Folder(shards).manifest.splits["train"].shards
    limit = 2 * largest_shard(shards) + 4096
    cache = Cache(tmp_path, limit, retries=0)

    def held():
        files = [path for path in tmp_path.iterdir() if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= limit
        return {path.name.partition("-")[2] for path in files}

    first, second, third = entries[:3]
    for shard in (first, second, first, third):
        descriptor = cache.open(transfer, shard.name, shard.bytes, shard.sha256)
        assert os.pread(descriptor, 10**8, 0) == (shards / shard.name).read_bytes()
        os.close(descriptor)
        held()
    assert held() == {first.name, third.name}


def test_a_file_that_made_room_stays_readable_for_who_has_it_open(shards, tmp_path):
    transfer = open_transfer(f"pipe:cat {shards}/{{}}")
    entries = Folder(shards).manifest.splits["train"].shards
    cache = Cache(tmp_path, largest_shard(shards), retries=0)
    opened = [cache.open(transfer, s.name, s.bytes, s.sha256) for s in entries]
    for shard, descriptor in zip(entries, opened, strict=True):
        assert os.pread(descriptor, 10**8, 0) == (shards / shard.name).read_bytes()
        os.close(descriptor)


def test_what_a_dead_process_left_half_fetched_makes_room(shards, tmp_path):
    transfer = open_transfer(f"pipe:cat {shards}/{{}}")
    shard = Folder(shards).manifest.splits["train"].shards[0]
    (tmp_path / "0-dead.tar.partial").write_bytes(bytes(shard.bytes))
    cache = Cache(tmp_path, shard.bytes, retries=0)
    os.close(cache.open(transfer, shard.name, shard.bytes, shard.sha256))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("fault", ["cut", "flip", "503"])
def test_a_transfer_that_fails_is_tried_again_and_verified(tiny, shards, serve, tmp_path, fault):
    url, _, log = serve(fault=fault)
    where = (f"data.path={url}", f"data.cache={tmp_path}", "data.retries=1")
    (remote,) = loaders(tiny, 1, *where)
    (local,) = loaders(tiny, 1)
    rows, patches = consumed(remote, 1)
    expected = consumed(local, 1)
    assert torch.equal(rows, expected[0]) and torch.equal(patches, expected[1])
    # those that were needed; what was fetched ahead may have been at its first try at the end
    assert {2} <= set(requests(log).values()) <= {1, 2}


def test_damage_that_stays_stops_the_run_and_names_the_shard(tiny, shards, tmp_path):
    first = Folder(shards).manifest.splits["train"].shards[0].name
    damage = f"pipe:head -c 5000 {shards}/{first} | cat - {shards}/{{}}"
    transfer = open_transfer(damage)
    shard = Folder(shards).manifest.splits["train"].shards[1]
    with pytest.raises(
        UserError, match=rf"{shard.name}: cannot be fetched, tried 2 times"
    ) as error:
        Cache(tmp_path, 10**9, retries=1).open(transfer, shard.name, shard.bytes, shard.sha256)
    assert f"{shard.bytes + 5000} bytes came; the manifest says {shard.bytes}" in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_dies_is_a_clear_stop_and_no_hang(tiny, shards, serve, tmp_path, workers):
    url, server, _ = serve()
    (loader,) = loaders(
        tiny,
        1,
        *(f"data.path={url}", f"data.cache={tmp_path}", "data.retries=1", "data.window=1"),
        f"data.workers={workers}",
    )
    found = []
    for number, batches in enumerate(loader.steps(0, 40)):
        found += [batch.problem for batch in batches]
        if number == 0:
            server.send_signal(signal.SIGKILL)
        if found[-1]:
            break
    loader.close()
    assert found[0] is None
    assert found[-1].startswith(f"{url}/train-") and "cannot be fetched, tried 2 times" in found[-1]


@pytest.mark.needs("s3")
def test_s3_is_read_like_a_folder(tiny, shards, tmp_path, monkeypatch):
    if importlib.util.find_spec("moto") is None:
        pytest.skip("no S3 server: tests/requirements-s3.txt is not installed")
    port = free_port()
    server = subprocess.Popen(
        [Path(sys.executable).parent / "moto_server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        _fill_bucket(shards)
        where = ("data.path=s3://survey/dr10/shards", f"data.cache={tmp_path}", "data.workers=1")
        (remote,) = loaders(tiny, 1, *where)
        (local,) = loaders(tiny, 1)
        rows, patches = consumed(remote, 10)
        expected = consumed(local, 10)
        assert torch.equal(rows, expected[0]) and torch.equal(patches, expected[1])
    finally:
        server.kill()


def _fill_bucket(shards):
    """By a process of its own, so that no thread of its client is around when workers fork."""
    script = (
        "import sys, time, fsspec\n"
        "for attempt in range(100):\n"
        "    try:\n"
        "        s3 = fsspec.filesystem('s3'); s3.mkdir('survey'); break\n"
        "    except Exception:\n"
        "        time.sleep(0.1)\n"
        "s3.put(sys.argv[1] + '/', 'survey/dr10/shards/', recursive=True)\n"
    )
    subprocess.run([sys.executable, "-c", script, shards], check=True)


@pytest.mark.parametrize(
    "path, cache, message",
    [
        ("http://127.0.0.1:9/shards", None, "is remote and needs data.cache"),
        ("http://127.0.0.1:9/shards", "cache", "manifest.json: cannot be fetched, tried 1 times"),
        ("pipe:cat /nowhere", "cache", "no {} for the file's name"),
        ("pipe:cat /nowhere/{}", "cache", "cannot be fetched.*exit code 1: cat: /nowhere"),
        ("wrong://host/shards", "cache", "data.path=wrong://host/shards: Protocol not known"),
    ],
)
def test_places_that_cannot_be_read_are_one_line(tiny, tmp_path, path, cache, message):
    overrides = [f"data.path={path}", "data.retries=0"]
    if cache:
        overrides.append(f"data.cache={tmp_path / cache}")
    with pytest.raises(UserError, match=message) as error:
        loaders(tiny, 1, *overrides)
    assert "\n" not in str(error.value)


def test_a_cache_that_could_not_hold_two_windows_is_refused(tiny, shards, tmp_path):
    where = (f"data.path=pipe:cat {shards}/{{}}", f"data.cache={tmp_path}")
    with pytest.raises(
        UserError, match="data.cache_gb=0.0001: two windows of data.window=1 shards"
    ):
        loaders(tiny, 1, *where, "data.cache_gb=0.0001", "data.window=1")


def test_a_command_that_says_much_on_the_side_is_no_trouble(shards, tmp_path):
    name = Folder(shards).manifest.splits["train"].shards[0].name
    chatty = f"pipe:head -c 1000000 /dev/zero >&2; cat {shards}/{{}}"
    open_transfer(chatty).fetch(name, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == (shards / name).read_bytes()


def test_a_command_ends_with_the_process_that_reads_from_it(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from astropt_ds.data.transfer import open_transfer\n"
        "endless = open_transfer('pipe:echo $$ > ' + sys.argv[1] + '; yes # {}')\n"
        "endless.fetch('x', Path('/dev/null'))\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "pid"]
    reader = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    reader.kill()
    reader.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, "the command outlives its reader"
        time.sleep(0.05)


def _open_and_drop(folder, source, limit, seed, failed):
    """Open files of a cache that holds two of them, over and over."""
    cache, transfer = Cache(folder, limit, retries=0), open_transfer(f"pipe:cat {source}/{{}}")
    entries = Folder(source).manifest.splits["train"].shards
    rng = np.random.default_rng(seed)
    try:
        for _ in range(60):
            shard = entries[rng.integers(len(entries))]
            descriptor = cache.open(transfer, shard.name, shard.bytes, shard.sha256)
            assert os.fstat(descriptor).st_size == shard.bytes
            os.close(descriptor)
    except BaseException as error:
        failed.put(repr(error))


def test_processes_that_drop_each_others_files_still_get_theirs(shards, tmp_path):
    context = multiprocessing.get_context("fork")
    failed = context.Queue()
    arguments = (tmp_path, shards, int(2.5 * largest_shard(shards)))
    processes = [
        context.Process(target=_open_and_drop, args=(*arguments, seed, failed)) for seed in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert failed.empty(), failed.get()


def test_a_command_that_writes_nothing_for_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("astropt_ds.data.transfer.STALL_TIMEOUT", 0.3)
    before = threading.active_count()
    with pytest.raises(OSError, match="no byte for"):
        open_transfer("pipe:sleep 100 # {}").fetch(MANIFEST, tmp_path / "file")
    assert threading.active_count() == before
