"""The feed: the same batches, errors where they are waited for, and a wait that can be left."""

import threading
import time

import pytest

from jaxseg.data.feed import Feed
from jaxseg.errors import InputError, RestartError


class Batches:
    """Numbers; what comes after the last is raised, or waited for where it is an event."""

    def __init__(self, count, then):
        self.left, self.then, self.closed = iter(range(count)), then, False

    def __iter__(self):
        return self

    def __next__(self):
        for number in self.left:
            return number
        if isinstance(self.then, threading.Event):
            self.then.wait(20)
            raise StopIteration
        raise self.then

    def close(self):
        self.closed = True


def test_what_comes_is_what_was_read_and_the_end_ends_it():
    batches = Batches(3, StopIteration())
    feed = Feed(batches)
    assert list(feed) == [0, 1, 2]
    feed.close()
    assert batches.closed


@pytest.mark.parametrize("error", [InputError("a.png is broken"), RuntimeError("other")])
def test_errors_of_the_reader_are_raised_after_the_batches_before(error):
    feed = Feed(Batches(1, error))
    assert next(feed) == 0
    with pytest.raises(type(error), match=str(error)):
        next(feed)
    feed.close()


def test_a_worker_that_died_is_named_and_restartable():
    died = RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search")
    feed = Feed(Batches(0, died))
    with pytest.raises(RestartError, match="exit code -9.*lower data.workers.*goes on"):
        next(feed)
    feed.close()


def test_a_wait_is_left_where_it_is_asked_for_and_closing_does_not_wait_for_a_hung_reader():
    hung, asked = threading.Event(), threading.Event()
    batches = Batches(1, hung)
    feed = Feed(batches, asked.is_set)
    assert next(feed) == 0
    threading.Timer(0.2, asked.set).start()
    assert next(feed) is None
    begin = time.monotonic()
    feed.close()
    assert time.monotonic() - begin < 5 and not batches.closed
    hung.set()


def test_closing_ends_a_reader_that_is_ahead():
    batches = Batches(100, StopIteration())
    feed = Feed(batches)
    next(feed)
    feed.close()
    assert batches.closed and not feed.thread.is_alive()
