"""Reading ahead in a thread: order, errors, early stop, bounded depth."""

import threading
import time
from collections.abc import Iterator

import pytest

from affmae_engine.predict.ahead import ahead


def test_order_is_kept() -> None:
    assert list(ahead(iter(range(100)), 3)) == list(range(100))
    assert list(ahead([], 2)) == []


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RuntimeError("broken")

    stream = ahead(items(), 4)
    assert next(stream) == 1
    with pytest.raises(RuntimeError, match="broken"):
        next(stream)


def test_never_further_ahead_than_depth_and_stops_with_the_consumer() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    before = threading.active_count()
    stream = ahead(items(), 2)
    assert next(stream) == 0
    time.sleep(0.3)
    assert len(made) <= 4  # one taken, two waiting, one in hand
    stream.close()
    assert threading.active_count() == before
