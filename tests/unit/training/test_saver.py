import threading

import pytest
import torch

from astropt_ds.errors import UserError
from astropt_ds.training.fragments import Fragment
from astropt_ds.training.ranks import start
from astropt_ds.training.saver import Saver


@pytest.fixture(scope="module")
def ranks():
    with start() as ranks:
        yield ranks


@pytest.fixture
def saver(ranks):
    found = Saver(ranks)
    yield found
    found.close()


def fragments(value=1.0, owned=True):
    weights = [torch.full((10,), value), torch.full((3,), value)]
    return [Fragment(f"w{i}", "weight", (len(w),), 0, w, owned) for i, w in enumerate(weights)]


class Writer:
    """Writes when it is allowed to, and remembers what it was given."""

    def __init__(self, path):
        self.path, self.go, self.seen = path, threading.Event(), []

    def __call__(self, fragments, ranks):
        assert self.go.wait(30)
        self.seen.append([f.values.clone() for f in fragments])
        return self.path


def test_training_goes_on_while_the_copy_of_its_moment_is_written(saver, tmp_path):
    live, write = fragments(1.0), Writer(tmp_path)
    assert saver.save(5, live, {"checkpoint": write}) == []
    assert saver.finished() == []  # still writing
    for fragment in live:
        fragment.values.fill_(2.0)  # the run goes on
    write.go.set()
    (saved,) = saver.wait()
    assert (saved.kind, saved.step, saved.path, saved.problem) == ("checkpoint", 5, tmp_path, None)
    assert 0 < saved.stall < saved.durable
    assert all((values == 1.0).all() for values in write.seen[0])
    assert saver.wait() == saver.finished() == []  # it is told once


def test_one_save_is_in_flight_and_the_next_waits_for_it(saver, tmp_path):
    first, second = Writer(tmp_path / "1"), Writer(tmp_path / "2")
    saver.save(1, fragments(1.0), {"checkpoint": first})
    threading.Timer(0.3, first.go.set).start()
    (told,) = saver.save(2, fragments(2.0), {"checkpoint": second})
    assert told.path == tmp_path / "1"
    assert not second.seen
    second.go.set()
    (saved,) = saver.wait()
    assert saved.path == tmp_path / "2" and saved.stall >= 0.25  # it had to wait
    assert (first.seen[0][0] == 1.0).all() and (second.seen[0][0] == 2.0).all()


def test_what_cannot_be_written_is_told_and_the_rest_is_written(saver, tmp_path):
    def full(fragments, ranks):
        raise UserError("no space left")

    write = Writer(tmp_path)
    write.go.set()
    saver.save(3, fragments(), {"checkpoint": full, "snapshot": write})
    failed, saved = saver.wait()
    assert (failed.kind, failed.problem, failed.path) == ("checkpoint", "no space left", None)
    assert (saved.kind, saved.path) == ("snapshot", tmp_path)


def test_a_failure_of_ours_ends_the_run(saver):
    def broken(fragments, ranks):
        raise ZeroDivisionError

    saver.save(3, fragments(), {"checkpoint": broken})
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_what_others_own_is_left_to_them(saver, tmp_path):
    write = Writer(tmp_path)
    write.go.set()
    saver.save(1, [*fragments(owned=False), *fragments(7.0)[:1]], {"checkpoint": write})
    saver.wait()
    assert [len(values) for values in write.seen[0]] == [10]


def test_what_is_in_flight_ends_before_the_run_does(ranks, tmp_path):
    saver, write = Saver(ranks), Writer(tmp_path)
    saver.save(1, fragments(), {"checkpoint": write})
    threading.Timer(0.3, write.go.set).start()
    saver.close()
    assert write.seen
