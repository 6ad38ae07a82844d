"""An ordered, bounded map over worker processes that cannot hang when one of them dies.

(``concurrent.futures`` and ``multiprocessing.Pool`` either have no bound on waiting work or, in Python 3.11, may
wait for ever after a worker was killed while a large item was on its way.)

Every worker has a pipe of its own. A worker that dies closes its end, which the main process sees at once; when
the main process dies, however it does, the workers see their ends closed and exit.
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

from megameta.errors import UserError

#: Items a worker has at a time: one it works on and one that is ready for it.
PER_WORKER = 2
#: Items, for each worker, that are read but not yet handed out, finished ones that wait for their turn included.
UNDER_WAY = 3

Start = Callable[[Any], Callable[[Any], Any]]


class WorkerPool:
    """``count`` processes that each call ``start(argument)`` once and apply the function it returns to items.

    ``start`` is a module's function, and items and results can be sent between processes. Use ``map`` once, and
    ``close`` it (contextlib.closing) so that the processes end after an error too.
    """

    def __init__(self, count: int, start: Start, argument: Any) -> None:
        # Fresh processes: forking one that runs threads of other libraries can hang.
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self._pipes: list[Connection] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, start, argument), daemon=True)
            process.start()
            theirs.close()  # so that only the worker holds it, and its death closes it
            self._processes.append(process)
            self._pipes.append(ours)

    def map(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Results in the order of ``items``, of which only UNDER_WAY for each worker are read ahead.

        Raises UserError where a worker died or raised one, RuntimeError with the worker's trace for other errors.
        """
        source = enumerate(items)
        load = dict.fromkeys(self._pipes, 0)
        done: dict[int, Any] = {}
        following, sent, more = 0, 0, True
        try:
            while more or following < sent:
                free = min(load, key=load.__getitem__)
                if more and load[free] < PER_WORKER and sent - following < UNDER_WAY * len(self._pipes):
                    item = next(source, None)
                    if item is None:
                        more = False
                        continue
                    free.send(item)
                    load[free] += 1
                    sent += 1
                    continue
                ready = set(wait(self._pipes))
                for pipe in [pipe for pipe in self._pipes if pipe in ready]:
                    number, result = self._receive(pipe)
                    load[pipe] -= 1
                    done[number] = result
                while following in done:
                    yield done.pop(following)
                    following += 1
        except (EOFError, ConnectionError) as error:
            raise UserError("a worker process died (killed, or out of memory): try fewer --workers") from error
        finally:
            self.close()

    def _receive(self, pipe: Any) -> tuple[int, Any]:
        try:
            number, result, user_error, trace = pipe.recv()
        except OSError as error:  # the worker died within a message
            raise EOFError from error
        if user_error is not None:
            raise UserError(user_error)
        if trace is not None:
            raise RuntimeError(f"in a worker process:\n{trace}")
        return number, result

    def close(self) -> None:
        """End all processes, whatever they do."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _serve(pipe: Connection, start: Start, argument: Any) -> None:
    """The life of a worker. A thread takes items off the pipe, so that the main process never waits to send one
    to a worker that waits to send a result."""
    # The processes are the parallelism; threads of the libraries on top of them only get in each other's way.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends this one
    waiting: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    threading.Thread(target=_take_items, args=(pipe, waiting), daemon=True).start()
    number = 0
    try:
        function = start(argument)
        while True:
            number, item = waiting.get()
            pipe.send((number, function(item), None, None))
    except (BrokenPipeError, ConnectionResetError):  # the main process is gone or has closed the pool
        return
    except UserError as error:
        pipe.send((number, None, str(error), None))
    except Exception:
        pipe.send((number, None, None, traceback.format_exc()))


def _take_items(pipe: Connection, waiting: "queue.SimpleQueue[tuple[int, Any]]") -> None:
    try:
        while True:
            waiting.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # the main process is gone: nobody waits for what is being worked on
