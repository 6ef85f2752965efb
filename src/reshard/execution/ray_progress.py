"""The progress of tasks on other machines: told to an actor of Ray, and summed up by the driver."""

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple

from reshard.storage.counting import ProgressView, WorkState
from reshard.types import Progress

TELL_SECONDS = 0.5
"""Between two messages of a task at least."""


class TaskNews(NamedTuple):
    """How far a task is, in bytes, and where it runs."""

    done: int
    total: int
    node: str
    node_id: str
    process: int
    resumed: int = 0
    """Of `done`: what was done before this process began."""


class TaskBoard:
    """Keeps the news of each task; an actor of Ray."""

    def __init__(self) -> None:
        self._news: dict[int, TaskNews] = {}

    def put(self, number: int, news: TaskNews) -> None:
        """Receives the news of a task."""
        self._news[number] = news

    def read(self) -> dict[int, TaskNews]:
        """The news of all tasks that have begun, by their numbers."""
        return self._news

    def has_begun(self, number: int) -> bool:
        """Whether a task has begun its work, in this process or in one that has died."""
        return number in self._news


class TaskTeller:
    """A Progress that tells the board. It waits for no answer: no task hangs on a bar."""

    def __init__(self, ray: Any, board: Any, number: int, where: tuple[str, str, int]) -> None:
        self._board, self._number, self._where = board, number, where
        self._resumed: int | None = None
        self._told = 0.0
        self.has_begun: bool = ray.get(board.has_begun.remote(number))
        """Whether an earlier process, which has died, had begun the work."""

    def __call__(self, done: int, total: int) -> None:
        """Receives how far the task is."""
        if self._resumed is None:
            self._resumed = done
        elif done < total and monotonic() - self._told < TELL_SECONDS:
            return
        self._told = monotonic()
        self._board.put.remote(self._number, TaskNews(done, total, *self._where, self._resumed))


class TaskSum:
    """Adds up the news of all tasks for one Progress. It never goes back: a task that another process begins again
    stands still there until it has caught up.
    """

    def __init__(self, progress: Progress | None, sizes: Sequence[int], at_once: int) -> None:
        self._progress, self._sizes, self._at_once = progress, sizes, at_once
        self._done = self._resumed = self._total = 0

    def update(self, news: Mapping[int, TaskNews]) -> None:
        """Receives the news of all tasks. Nothing is told before as many have begun as run at once: the first call says
        how much of all was done before.
        """
        if len(news) < self._at_once and not self._total:
            return
        sizes = dict(enumerate(self._sizes)) or {number: one.total for number, one in news.items()}
        self._total = max(self._total, sum(sizes.values()))
        if not self._resumed:
            self._resumed = sum(compute_done_part(one.resumed, one, sizes[number]) for number, one in news.items())
        done = sum(compute_done_part(one.done, one, sizes[number]) for number, one in news.items())
        self._done = max(self._done, min(done, self._total - 1))
        self._tell(self._done)

    def finish(self) -> None:
        """Says that all tasks have ended."""
        self._total = self._total or sum(self._sizes)
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if isinstance(self._progress, ProgressView):
            self._progress.show(WorkState(done, self._total, min(self._resumed, done)))
        elif self._progress:
            self._progress(done, self._total)


def compute_done_part(done: int, news: TaskNews, size: int) -> int:
    """The part of a task's size that is done. Its own whole has side files too, and lacks what was finished before."""
    return size * done // news.total if news.total else size
