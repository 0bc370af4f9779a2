"""An event loop in its own thread, so that synchronous code can keep many calls in flight."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_CLOSING_SECONDS = 2.0
_THREADS = 4
T = TypeVar("T")


class Loop:
    """Starts with the first task group; `close` cancels what is still running and never waits long."""

    def __init__(self):
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # not the loop's default executor, in which LiteLLM needs a thread for each call
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="check")

    async def run_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a slow function without blocking the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def start_group(self, done: Callable[[asyncio.Task], None]) -> "Group":
        """An empty group of tasks; `done` is called with each finished task, in the loop's thread."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
            self._thread.start()
        return Group(self._loop, done)

    def close(self, cleanup: Callable[[], Awaitable[None]]) -> None:
        """Cancel all tasks, await `cleanup()` (it closes connections) and stop the thread. Idempotent."""
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        self._executor.shutdown(wait=False, cancel_futures=True)
        if loop is None:
            return

        async def finish() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await cleanup()

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(finish(), loop).result(_CLOSING_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSING_SECONDS)
        if not thread.is_alive():
            loop.close()


class Group:
    """Tasks that are started and cancelled from another thread, at less cost than a concurrent future for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop, done: Callable[[asyncio.Task], None]):
        self._loop, self._done = loop, done
        self._tasks: set[asyncio.Task] = set()  # only the loop's thread touches it

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine soon."""
        self._loop.call_soon_threadsafe(self._start, coroutine)

    def cancel(self) -> None:
        """Cancel the tasks that are still running."""
        with contextlib.suppress(RuntimeError):  # the loop is closed and has cancelled them
            self._loop.call_soon_threadsafe(self._cancel)

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, else asyncio prints exceptions that nobody takes
        self._done(task)

    def _cancel(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
