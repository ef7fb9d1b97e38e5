"""Batches drawn ahead by a thread, so that whoever waits for one can look up."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxseg.errors import RestartError

END = object()


def end_with_parent(*_: int) -> None:
    """In a process that reads data: from now on it ends within seconds of the run, however that
    ended; one that was killed cannot end it itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Feed:
    """An iterator over `batches`; None in place of one where `asked()` turns true in the wait.

    What reading raises, it raises. Close it: that ends the batches too, unless reading hangs.
    """

    def __init__(self, batches: Iterator[Any], asked: Callable[[], bool] = lambda: False):
        self.batches, self.asked = batches, asked
        self.queue, self.closed = queue.Queue(1), threading.Event()
        self.thread = threading.Thread(target=self._read, name="feed", daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while not self.closed.is_set():
            try:
                item = next(self.batches, END)
            except BaseException as error:  # raised where it is waited for
                item = error
            while not self.closed.is_set():
                try:
                    self.queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item is END or isinstance(item, BaseException):
                return

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        while True:
            try:
                item = self.queue.get(timeout=0.1)
                break
            except queue.Empty:
                if self.asked():
                    return None
        if item is END:
            raise StopIteration
        if isinstance(item, RuntimeError) and "Worker process was terminated" in str(item):
            raise RestartError(
                f"a process that reads data died: {item} Most often the memory ran out: lower "
                "data.workers. The same command goes on"
            ) from item
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread, and the batches where it has let go of them."""
        self.closed.set()
        self.thread.join(timeout=2)
        if not self.thread.is_alive() and hasattr(self.batches, "close"):
            self.batches.close()
