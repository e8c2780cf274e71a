import os
import subprocess
import sys

import pytest

from astropt_ds.config_run import RunConfig
from astropt_ds.errors import UserError
from astropt_ds.training import folder
from astropt_ds.training.folder import RunFolder
from astropt_ds.training.ranks import start


@pytest.fixture(scope="module")
def ranks():
    with start() as ranks:
        yield ranks


def test_a_folder_is_made_and_nothing_but_its_lock_is_left_in_it(ranks, tmp_path):
    made = RunFolder(RunConfig(dir=str(tmp_path / "a" / "run")), ranks)
    made.close()
    assert [path.name for path in made.path.iterdir()] == [".lock"]


def test_two_runs_cannot_be_at_work_in_one_folder(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE_S", 0.3)
    config = RunConfig(dir=str(tmp_path / "run"))
    first = RunFolder(config, ranks)
    with pytest.raises(UserError, match="another run is at work in it") as caught:
        RunFolder(config, ranks)
    assert f".lock is held by process {os.getpid()} on {os.uname().nodename}" in str(caught.value)
    first.close()
    RunFolder(config, ranks).close()


def test_the_folder_of_a_killed_run_is_free(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE_S", 5.0)
    (tmp_path / "run").mkdir()
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    script += "print('locked', flush=True); import time; time.sleep(100)"
    lock = tmp_path / "run" / folder.LOCK
    other = subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE)
    assert other.stdout.readline()
    other.kill()
    RunFolder(RunConfig(dir=str(tmp_path / "run")), ranks).close()
    other.wait()


def test_what_a_killed_run_was_writing_is_gone(ranks, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    script = "import os, pathlib, sys; from astropt_ds.files import replace_durably; "
    script += "os.replace = lambda *_: os.kill(os.getpid(), 9); "
    script += "replace_durably(pathlib.Path(sys.argv[1]), 'step-00000001')"
    subprocess.run([sys.executable, "-c", script, run / "latest"])
    assert [path.suffix for path in run.iterdir()] == [".partial"]
    RunFolder(RunConfig(dir=str(run)), ranks).close()
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_where_no_folder_can_be_is_told(ranks, tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder can be made there"):
        RunFolder(RunConfig(dir=str(tmp_path / where)), ranks)


def test_no_folder_is_told(ranks):
    with pytest.raises(UserError, match="run.dir is missing: a folder for the run"):
        RunFolder(RunConfig(), ranks)
