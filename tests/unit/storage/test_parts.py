"""Jobs that several threads carry, with so many bytes in memory at most."""

from __future__ import annotations

import random
import threading
from functools import partial

import pytest

from airflow_mlpipelines.storage.parts import THREADS, Memory, StoppedError, carry_all


def test_small_files_keep_their_threads_beside_the_parts_of_a_large_one():
    stop = threading.Event()
    memory = Memory(10, stop)
    at_once = threading.Barrier(THREADS, timeout=60)

    carry_all((memory.lend(size, at_once.wait) for size in [3, *[1] * (THREADS - 1)]), stop=stop)


@pytest.mark.parametrize("size", [10, 4])
def test_no_more_bytes_are_lent_than_there_are_and_all_jobs_are_done(size):
    stop, lock = threading.Event(), threading.Lock()
    memory = Memory(size, stop)
    held, most, done = 0, 0, []

    def job(number, wanted):
        nonlocal held, most
        with lock:
            held += wanted
            most = max(most, held)
        threading.Event().wait(0.001)
        with lock:
            held -= wanted
            done.append(number)

    wanted = [min(random.Random(number).randint(0, 12), size) for number in range(200)]
    jobs = (memory.lend(each, partial(job, n, each)) for n, each in enumerate(wanted))
    carry_all(jobs, stop=stop)

    assert sorted(done) == list(range(200))
    assert most <= size


def test_a_job_larger_than_all_memory_is_done_and_a_failure_ends_the_waiting():
    stop, held = threading.Event(), threading.Event()
    memory = Memory(4, stop)

    def fail():
        held.wait(60)
        raise RuntimeError("lost")

    def jobs():
        yield memory.lend(9, fail)
        held.set()
        yield memory.lend(1, lambda: None)

    with pytest.raises(RuntimeError, match="lost"):
        carry_all(jobs(), stop=stop)
    memory.lend(4, fail)
    with pytest.raises(StoppedError):  # nobody will give those back
        memory.lend(1, fail)
