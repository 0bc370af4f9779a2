"""An event loop in a thread of its own, so that plain code can keep many calls in the air."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
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

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future:
        """Run a coroutine; the future is done when it is, and cancelling the future cancels it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

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


async def _end(last: Callable[[], Awaitable[None]] | None) -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if last is not None:
        await last()
