"""Work that a thread does while the screen stays alive: a model that loads, a file that comes.

Knows nothing of widgets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from edgeinfer.tui.settings import ChatModel, ChatSettings

if TYPE_CHECKING:
    from edgeinfer import Progress

T = TypeVar("T")

_STAGES = {"kernels": "building kernels", "weights": "loading weights"}


class Task(Generic[T]):
    """A call in a thread that nobody waits for: look at `is_over`, then take the `result`."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        self.is_over = False
        self._call = call
        self._result: list[T] = []
        threading.Thread(target=self._run, name="edgeinfer-task", daemon=True).start()

    @property
    def result(self) -> T:
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True


class ModelLoader:
    """Opens a model in a thread; `text` and `share` say how far it is."""

    def __init__(self, settings: ChatSettings, path: str) -> None:
        self.path = path
        self.text, self.share = "opening", 0.0
        self.started_at = time.perf_counter()
        self.task: Task[ChatModel] = Task(lambda: settings.open_model(path, self._note))

    def _note(self, progress: Progress) -> None:
        self.text = _STAGES.get(progress.stage, progress.stage)
        self.share = progress.done / progress.total if progress.total else 0.0
