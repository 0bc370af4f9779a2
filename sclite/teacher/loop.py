"""An event loop in a thread of its own, so that plain code can keep many calls in the air."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_CLOSING_SECONDS = 2.0
_THREADS = 4


class Loop:
    """Starts with the first coroutine; `close` cancels what still runs and never waits long."""

    def __init__(self):
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # not the loop's own, of which LiteLLM needs one for each call
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="check")

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that takes its time, beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def group(self, done: Callable[[asyncio.Task], None]) -> "Group":
        """An empty group of tasks; `done` is told of each that has ended, in the loop's thread."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
            self._thread.start()
        return Group(self._loop, done)

    def close(self, last: Callable[[], Awaitable[None]] | None = None) -> None:
        """Cancel all, await `last()` (it closes connections), stop the thread. Twice does no harm."""
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        self._threads.shutdown(wait=False, cancel_futures=True)
        if loop is None:
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_end(last), loop).result(_CLOSING_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSING_SECONDS)
        if not thread.is_alive():
            loop.close()


class Group:
    """Tasks that are started and cancelled from another thread, lighter than a future of a thread for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop, done: Callable[[asyncio.Task], None]):
        self._loop, self._done = loop, done
        self._tasks: set[asyncio.Task] = set()  # the loop's thread alone touches it

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine soon."""
        self._loop.call_soon_threadsafe(self._begin, work)

    def cancel(self) -> None:
        """Cancel those that still run."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and has cancelled them
            self._loop.call_soon_threadsafe(self._cancel)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: asyncio would report what nobody takes on the terminal
        self._done(task)

    def _cancel(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()


async def _end(last: Callable[[], Awaitable[None]] | None) -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if last is not None:
        await last()
