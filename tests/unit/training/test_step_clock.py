import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from astropt_ds.training.step_clock import COLLECTIVES, NoClock, StepClock, split

PAUSE = 0.02


class Backend:
    """Collectives that take time: where they are called, and where their end is waited for."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        for name in COLLECTIVES:
            setattr(self, name, self.collective)

    def collective(self, async_op=False):
        time.sleep(PAUSE)
        return Work(self.pool.submit(time.sleep, 5 * PAUSE)) if async_op else None


class Work:
    def __init__(self, future):
        self.future = future

    def wait(self):
        return self.future.result()

    def is_completed(self):
        return self.future.done()


@pytest.fixture
def backend():
    return Backend()


@pytest.fixture
def clock(backend):
    return StepClock(torch.device("cpu"), backend)


def test_a_second_belongs_to_one_part_and_all_to_the_step(clock, backend):
    start = time.monotonic()
    for _ in range(2):  # micro-batches
        with clock("forward"):
            time.sleep(PAUSE)
            backend.all_gather_into_tensor()
        with clock("backward"):
            time.sleep(2 * PAUSE)
            backend.reduce_scatter_tensor()
    seconds = time.monotonic() - start
    parts = clock.take()
    assert parts["communication"] >= 4 * PAUSE
    assert 2 * PAUSE <= parts["forward"] <= seconds - 8 * PAUSE
    assert parts["backward"] >= 4 * PAUSE
    assert sum(parts.values()) <= seconds
    fields = split(parts, step=seconds + 5.0, waited=4.0)
    assert sum(fields.values()) == pytest.approx(seconds + 5.0)
    assert fields["data_s"] == 4.0 and fields["other_s"] >= 1.0


def test_of_a_collective_in_the_background_only_the_wait_counts(clock, backend):
    with clock("forward"):
        backend.all_gather_into_tensor(async_op=True).wait()
    parts = clock.take()
    assert parts["communication"] >= 6 * PAUSE > parts["forward"]
    with clock("forward"):
        work = backend.all_gather_into_tensor(async_op=True)
        while not work.is_completed():
            time.sleep(PAUSE / 10)
        work.wait()
    parts = clock.take()
    assert parts["forward"] >= 5 * PAUSE
    assert PAUSE <= parts["communication"] < parts["forward"]


def test_what_lies_between_two_steps_is_in_neither(clock, backend):
    with clock("forward"):
        time.sleep(PAUSE)
    assert clock.take()["forward"] >= PAUSE
    backend.all_reduce()  # a validation's
    assert set(clock.take().values()) == {0.0}


def test_a_part_that_fails_is_closed(clock):
    with pytest.raises(ValueError), clock("forward"), clock("data"):
        raise ValueError
    with clock("backward"):
        time.sleep(PAUSE)
    assert clock.take()["forward"] < PAUSE


def test_without_a_profile_nothing_is_counted():
    clock = NoClock()
    with clock("forward"):
        time.sleep(PAUSE)
    assert clock.take() == {}
