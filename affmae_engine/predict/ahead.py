"""Reading ahead: an iterator run in a thread, so that decoding and an accelerator work at the same time.

Threads suffice, because decoders and numpy release the interpreter lock. The consumer may stop early: leaving its loop
stops the thread before its next item.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_POLL_S = 0.1


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them made in advance in another thread.

    An exception of `items` is raised here, where its item would have come.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
        except BaseException as error:  # whatever it is, it belongs to the consumer
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=work, name="affmae-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
