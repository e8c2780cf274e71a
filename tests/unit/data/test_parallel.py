import os
import signal

import pytest

from astropt_ds.data.parallel import parallel
from astropt_ds.errors import UserError


def square(number):
    if number < 0:
        raise UserError(f"{number}: 0 or more would be right")
    if number > 100:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number, os.getpid()


def test_results_come_in_the_order_of_the_tasks_from_other_processes():
    results = list(parallel(square, range(20), 2))
    assert [result for result, _ in results] == [n * n for n in range(20)]
    assert os.getpid() not in {process for _, process in results}


def test_one_process_is_this_one():
    assert set(parallel(square, [3, 4], 1)) == {(9, os.getpid()), (16, os.getpid())}


@pytest.mark.parametrize(
    "tasks, message",
    [([1, -2, 3], "-2: 0 or more would be right"), ([1, 101, 3], "--processes 2: .* killed")],
)
def test_a_users_mistake_and_a_killed_process_end_in_one_line(tasks, message):
    with pytest.raises(UserError, match=message):
        list(parallel(square, tasks, 2))


def test_no_processes_are_refused():
    with pytest.raises(UserError, match="--processes 0: 1 or more would be right"):
        list(parallel(square, [1], 0))
