"""The progress of tasks on other machines: told to an actor of Ray, and summed up by the driver."""

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple

from reshard.errors import refuse
from reshard.storage.counting import ProgressView, WorkState
from reshard.types import Progress

TELL_SECONDS = 0.5
"""Between two messages of a task at least."""


class TaskPlace(NamedTuple):
    """Where a task runs."""

    node: str
    """The name and the address of the machine."""
    node_id: str
    process: int


class TaskNews(NamedTuple):
    """How far a task is, in bytes."""

    done: int
    total: int
    resumed: int = 0
    """Of `done`: what was done before this process began."""


class TasksTold(NamedTuple):
    """What a board has been told, by the numbers of the tasks."""

    begun: dict[int, list[TaskPlace]]
    """Each process that has begun the task: Ray tells of none, and does not count those that want of memory ends."""
    news: dict[int, TaskNews]
    """Of the tasks that have begun their work."""

    def add(self, other: "TasksTold") -> "TasksTold":
        """Both. A board that was begun again knows only what is new."""
        numbers = {*self.begun, *other.begun}
        pairs = {number: (self.begun.get(number, []), other.begun.get(number, [])) for number in numbers}
        begun = {number: list(dict.fromkeys([*one, *two])) for number, (one, two) in pairs.items()}
        return TasksTold(begun, {**self.news, **other.news})


class TaskBoard:
    """Keeps the news of each task; an actor of Ray."""

    def __init__(self, is_restarted: Callable[[], bool]) -> None:
        self._told = TasksTold({}, {})
        self._has_forgotten = is_restarted()

    def begin(self, number: int, where: TaskPlace) -> None:
        """Receives that a process has begun a task."""
        self._told.begun.setdefault(number, []).append(where)

    def put(self, number: int, news: TaskNews) -> None:
        """Receives the news of a task."""
        self._told.news[number] = news

    def read(self) -> TasksTold:
        """All that is known."""
        return self._told

    def has_begun(self, number: int) -> bool:
        """Whether a task has begun its work, in this process or in one that has died. Raises LookupError if this board
        was begun in the place of one that has died.
        """
        if self._has_forgotten:
            raise LookupError(number)
        return number in self._told.news


class TaskTeller:
    """A Progress that tells the board. It waits for no answer: no task hangs on a bar."""

    def __init__(self, ray: Any, board: Any, number: int) -> None:
        self._ray, self._board, self._number = ray, board, number
        self._resumed: int | None = None
        self._told = 0.0

    def has_begun(self) -> bool:
        """Asks whether an earlier process, which has died, had begun the work. Raises Refused if nobody knows."""
        try:
            return bool(self._ray.get(self._board.has_begun.remote(self._number)))
        except self._ray.exceptions.RayError as error:
            remedy = "the same command without --restart goes on from what is written"
            found = f"died ({type(error).__name__})"
            raise refuse("worker-died", "the actor that counts the tasks", found, "its answer", remedy) from None

    def __call__(self, done: int, total: int) -> None:
        """Receives how far the task is."""
        if self._resumed is None:
            self._resumed = done
        elif done < total and monotonic() - self._told < TELL_SECONDS:
            return
        self._told = monotonic()
        self._board.put.remote(self._number, TaskNews(done, total, self._resumed))


class TaskSum:
    """Adds up the news of all tasks for one Progress. It never goes back: a task that another process begins again
    stands still there until it has caught up.
    """

    def __init__(self, progress: Progress | None, sizes: Sequence[int], tasks: int) -> None:
        self._progress, self._sizes, self._tasks = progress, sizes, tasks
        self._done = self._total = 0
        self._resumed: dict[int, int] = {}

    def update(self, news: Mapping[int, TaskNews]) -> None:
        """Receives the news of all tasks. Those that have not begun have their size, or that of the others: they are
        cut evenly.
        """
        if not news:
            return
        mean = sum(one.total for one in news.values()) // len(news)
        sizes = self._sizes or [news[number].total if number in news else mean for number in range(self._tasks)]
        self._total = max(self._total, sum(sizes))
        for number, one in news.items():
            self._resumed.setdefault(number, compute_done_part(one.resumed, one, sizes[number]))
        done = sum(compute_done_part(one.done, one, sizes[number]) for number, one in news.items())
        self._done = max(self._done, min(done, self._total - 1))
        self._tell(self._done)

    def finish(self) -> None:
        """Says that all tasks have ended."""
        self._total = self._total or sum(self._sizes)
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if isinstance(self._progress, ProgressView):
            self._progress.show(WorkState(done, self._total, min(sum(self._resumed.values()), done)))
        elif self._progress:
            self._progress(done, self._total)


def compute_done_part(done: int, news: TaskNews, size: int) -> int:
    """The part of a task's size that is done. Its own whole has side files too, and lacks what was finished before."""
    return size * done // news.total if news.total else size
