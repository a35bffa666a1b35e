"""`on_all_cores` keeps the order and the errors of its work, and restores the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from rs_gguf.machine import ALONE, Processes, on_all_cores, one_thread


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    """Return the number of threads that torch uses in a new thread: the setting of the process."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_each_made_on_one_thread(workers: int) -> None:
    found = list(on_all_cores(lambda k: (k, torch.get_num_threads()), range(20), workers=workers))
    assert found == [(k, 1) for k in range(20)]
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.usefixtures("two_threads")
def test_the_first_error_is_raised_and_the_threads_come_back(workers: int) -> None:
    def work(k: int) -> int:
        if k >= 4:
            raise ValueError(f"item {k}")
        return k

    results = on_all_cores(work, range(9), workers=workers)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(results)
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.usefixtures("two_threads")
def test_what_was_not_begun_is_dropped_when_nobody_waits_for_it() -> None:
    begun, going = [], threading.Event()

    def work(k: int) -> int:
        begun.append(k)
        if k:
            going.wait(30)
        return k

    results = on_all_cores(work, range(100), workers=2)
    assert next(results) == 0
    threading.Timer(0.1, going.set).start()
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 100
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.usefixtures("two_threads")
def test_one_thread_holds_within_the_block_alone() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.parametrize(("count", "ranks"), [(7, 2), (2, 5), (0, 3), (64, 4)])
def test_shares_follow_one_another_and_leave_nothing_out(count: int, ranks: int) -> None:
    items = list(range(count))
    shares = [items[Processes(rank, ranks).share(count)] for rank in range(ranks)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert items[ALONE.share(count)] == items
