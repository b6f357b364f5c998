"""An asyncio event loop on a thread of its own, for callers that are not asynchronous.
Run its tests: pytest tests/test_http_pool.py
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class LoopThread:
    """Runs until `stop`. `failed` is told, on the loop's thread, what a task of `start` raised."""

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self._failed = failed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` returns, awaited on the loop; for other threads."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin a task; on the loop's thread."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def drop(self) -> None:
        """Cancel the tasks, and wait until nothing but this runs on the loop."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    def stop(self) -> None:
        """End the loop and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
