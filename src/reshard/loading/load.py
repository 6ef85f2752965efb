"""Loading: the tensors of one rank into memory, from files of any layout; planned as for `convert`. Writes nothing."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from reshard.casts.kernels import fastest_recode
from reshard.errors import refuse, require_none
from reshard.execution.reader import Buffers, Files, gather, read_or_make
from reshard.execution.windows import WINDOW_SIZE, Window, bands_of, windows
from reshard.loading.arrays import array_problems, array_shape, as_array, require_framework
from reshard.planning.copies import WrongPlan
from reshard.planning.options import require_layout, require_whole_number
from reshard.planning.plan import Plan
from reshard.planning.planner import make_plan
from reshard.sources.source import read_source
from reshard.storage.local import advise_random
from reshard.storage.page_cache import reading_threads, ways_to_read
from reshard.storage.resources import available_memory, in_threads
from reshard.storage.unchanged import open_unchanged
from reshard.types import FIRST, RANKS, Cast, Join, Tensor

Worker = Callable[[Window], None]


def load(
    source: str | Path,
    *,
    mp: int,
    rank: int,
    device: Any = "cpu",
    framework: str = "torch",
    recipe: str | None = None,
    cast: str | None = None,
    expert_dtype: str | None = None,
    keep_mtp: bool = False,
    pad: bool = False,
    allow_inexact: bool = False,
    ignore_extra_files: bool = False,
    replicas: str = FIRST,
    jobs: int | None = None,
) -> dict[str, Any]:
    """The tensors of a rank by their names in its file, in the order of that file.

    They are what `reshard convert SOURCE --mp N` with the same options would write, bit for bit. `source` is a Hugging
    Face checkpoint, or a folder with the rank files of any number of ranks; of what several of these hold, that of the
    first is taken, or with `replicas="compare"` all are read and must be equal. With the framework `numpy`,
    dtypes that numpy has not come as unsigned integers of the same width. Raises Refused.
    """
    if jobs is not None and require_whole_number("jobs", jobs) < 1:
        raise refuse("wrong-option", "jobs", repr(jobs), "1 or more, or None for as many as are of use")
    require_framework(framework, device)
    layout = require_layout(mp, RANKS, cast, expert_dtype, keep_mtp=keep_mtp, pad=pad, file_size=None)
    found = read_source(Path(source), recipe, ignore_extra_files=ignore_extra_files, replicas=replicas)
    plan = make_plan(found, layout, ranks=(require_whole_number("rank", rank),))
    return load_planned(plan, device, framework, jobs, allow_inexact=allow_inexact)


def load_planned(plan: Plan, device: Any, framework: str, jobs: int | None, *, allow_inexact: bool) -> dict[str, Any]:
    """The tensors of the one file of a plan, by their names."""
    tensors = list(plan.tensors(0))
    require_none(array_problems(tensors, framework))
    held = Held(tensors, device)
    try:
        fill(plan, held, jobs, allow_inexact=allow_inexact)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    return {
        tensor.name: as_array(data, tensor.dtype, array_shape(tensor), framework)
        for tensor, data in zip(tensors, held.data, strict=True)
    }


class Held:
    """The tensors of a rank in memory, each in bytes of its own; found by where they would lie in the rank's file."""

    def __init__(self, tensors: Sequence[Tensor], device: Any) -> None:
        """`device` is one of torch's, or the name of one; numpy allocates what lies on `cpu`."""
        self.device: Any = None if str(device) == "cpu" else device
        self.is_cuda = str(device).startswith("cuda")
        self.tensors = tensors
        self.size = sum(tensor.size for tensor in tensors)
        self._starts = [tensor.offset for tensor in tensors]
        if self.device is None and self.size > available_memory():
            raise no_memory(self.size, f"{available_memory():,} bytes free")
        self.data = [self._allocated(tensor.size) for tensor in tensors]
        if self.device is not None and self.data:
            self.device = self.data[0].device  # with its number: to another thread, `cuda` may be another

    def _allocated(self, size: int) -> Any:
        if self.device is None:
            return np.empty(size, np.uint8)
        import torch  # noqa: PLC0415

        try:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise no_memory(self.size, str(error).splitlines()[0]) from None

    def put(self, content: memoryview, offset: int) -> None:
        """Takes the bytes that lie at an offset of the file. On CUDA, they may be read even after this has returned."""
        data: Any = np.frombuffer(content, np.uint8)
        if self.device is not None:
            import torch  # noqa: PLC0415

            data = torch.from_numpy(data)
        place, done = bisect_right(self._starts, offset) - 1, 0
        while done < len(data):
            begin = offset + done - self._starts[place]
            count = min(len(data) - done, self.tensors[place].size - begin)
            target, source = self.data[place][begin : begin + count], data[done : done + count]
            if self.device is None:
                target[:] = source
            else:
                target.copy_(source, non_blocking=self.is_cuda)
            place, done = place + 1, done + count


def no_memory(size: int, found: str) -> Exception:
    return refuse("too-little-memory", "load", found, f"{size:,} bytes for the tensors of the rank", "more ranks")


def fill(plan: Plan, held: Held, jobs: int | None, *, allow_inexact: bool) -> None:
    """Reads, and computes where there are casts, all that a plan for one rank wants, window by window."""
    folder, names = plan.source.folder, [file.name for file in plan.source.files]
    ways = ways_to_read(folder / names[0], held.size)
    made: list[Join | Cast] = [*plan.source.joins, *plan.casts]
    if plan.casts:
        fastest_recode()  # here, for it may import numba, and that from one thread only
    with open_unchanged(folder, plan.source.files, ways) as sources:
        advise_random(sources)  # or the kernel reads on into what other ranks need
        files = Files(sources, names, (), ways, made, allow_inexact)
        work = counted(windows(plan.copies, bands=bands_of(made, len(sources), WINDOW_SIZE)), held.size)
        if held.is_cuda:
            in_cuda_threads(work, files, held, jobs or reading_threads(ways))
        else:
            in_threads(work, lambda: worker(files, held), jobs or reading_threads(ways))


def counted(work: Iterable[Window], size: int) -> Iterator[Window]:
    """The windows. Raises WrongPlan if they have not just so many bytes: some of the memory would hold anything."""
    for window in work:
        size -= sum(group.size for group in window.groups)
        yield window
    if size:
        raise WrongPlan(f"the windows lack {size:,} bytes")


def worker(files: Files, held: Held) -> Worker:
    """Moves windows into memory, through buffers of its own."""
    buffers = Buffers(makes=bool(files.made))

    def move(window: Window) -> None:
        data, _ = read_or_make(window, files, buffers)
        for group in window.groups:
            held.put(gather(group, data, buffers.stage), group.target_offset)

    return move


def in_cuda_threads(work: Iterable[Window], files: Files, held: Held, threads: int) -> None:
    """Moves the windows onto a CUDA device, each thread on a stream of its own."""
    import torch  # noqa: PLC0415

    allocated_on = torch.cuda.current_stream(held.device)
    try:
        in_threads(work, lambda: cuda_worker(files, held, allocated_on), threads)
    finally:
        torch.cuda.synchronize(held.device)  # before the buffers go, which the device may still read


def cuda_worker(files: Files, held: Held, allocated_on: Any) -> Worker:
    """Moves windows through two sets of pinned buffers: while the device takes what is in one, the other is filled."""
    import torch  # noqa: PLC0415

    cuda: Any = torch.cuda  # which is not typed throughout

    def pinned(size: int) -> memoryview:
        array: Any = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return memoryview(array)

    with cuda.device(held.device):  # a new thread has the first device, which may be another process's
        stream = cuda.Stream(held.device)
        turns = cycle([(Buffers(makes=bool(files.made), allocate=pinned), cuda.Event()) for _ in range(2)])
    stream.wait_stream(allocated_on)

    def move(window: Window) -> None:
        buffers, taken = next(turns)
        taken.synchronize()
        data, _ = read_or_make(window, files, buffers)
        used = 0
        with cuda.stream(stream):
            for group in window.groups:
                # Behind what was gathered before, which the device may still read. A rank has each byte once.
                held.put(gather(group, data, buffers.stage[used:]), group.target_offset)
                used += group.size
            taken.record(stream)

    return move
