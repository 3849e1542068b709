"""Reading ahead and writing behind: in order, at the same time, and nothing after an error."""

import threading

import pytest
import torch

from search.tasks.overlap import OnItsWay, one_ahead, one_behind

SECONDS = 60.0  # for another thread to do what takes none


def test_the_next_is_read_while_one_is_used() -> None:
    begun = {number: threading.Event() for number in range(4)}

    def read(number: int) -> int:
        begun[number].set()
        return 10 * number

    with one_ahead(read, range(4)) as results:
        for number, result in enumerate(results):
            assert result == 10 * number
            assert number == 3 or begun[number + 1].wait(SECONDS)
            assert number >= 2 or not begun[number + 2].is_set()  # which bounds what is in memory


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_reading_comes_in_its_turn_and_ends_it(error: type[BaseException]) -> None:
    asked: list[int] = []
    used: list[int] = []

    def read(number: int) -> int:
        asked.append(number)
        if number == 2:
            raise error("picture 2")
        return number

    def use() -> None:
        with one_ahead(read, range(9)) as results:
            used.extend(results)  # those before the error, too

    with pytest.raises(error, match="picture 2"):
        use()
    assert (used, asked) == ([0, 1], [0, 1, 2])


def test_writing_goes_on_meanwhile() -> None:
    release, written = threading.Event(), []

    def write(number: int) -> None:
        assert release.wait(SECONDS)
        written.append(number)

    with one_behind(write) as call:
        call(1)  # comes back although it is not written
        assert written == []
        release.set()
        call(2)
        assert written[:1] == [1]
    assert written == [1, 2]


def test_nothing_is_written_behind_an_error() -> None:
    written = []

    def write(number: int) -> None:
        if number == 1:
            raise OSError("full")
        written.append(number)

    def write_all() -> None:
        with one_behind(write) as call:
            for number in range(9):
                call(number)

    with pytest.raises(OSError, match="full"):
        write_all()
    assert written == [0]


def test_the_error_of_the_last_write_is_raised() -> None:
    def write(number: int) -> None:
        raise OSError(f"full at {number}")

    with pytest.raises(OSError, match="full at 5"), one_behind(write) as call:
        call(5)


def test_what_was_asked_for_is_written_after_an_error_too() -> None:
    interrupted, written = threading.Event(), []

    def write(number: int) -> None:
        assert interrupted.wait(SECONDS)
        written.append(number)

    def compute() -> None:
        with one_behind(write) as call:
            call(1)
            interrupted.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute()
    assert written == [1]


def test_a_copy_of_the_host_is_there_at_once() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(OnItsWay(values).arrived(), values)
