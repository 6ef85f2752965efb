"""Loads one rank's tensors onto a device, from a checkpoint of any layout, as `convert` would write them."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from reshard.casts.kernels import choose_recode
from reshard.casts.strips import StripStore
from reshard.errors import refuse, require_none
from reshard.execution.joins import count_join_levels
from reshard.execution.reader import (
    MEMORY_PER_THREAD,
    OpenFiles,
    WorkerBuffers,
    gather_group,
    measure_memory_to_compute,
    read_or_compute_window,
)
from reshard.execution.windows import WINDOW_SIZE, Window, choose_bands, make_windows
from reshard.formats.remote_names import read_location, require_path
from reshard.loading.arrays import check_array_dtypes, get_array_shape, require_framework, view_as_array
from reshard.planning.copies import WrongPlan
from reshard.planning.options import require_layout, require_whole_number
from reshard.planning.plan import Plan
from reshard.planning.planner import make_plan
from reshard.sources.source import read_source
from reshard.storage.opened import advise_scattered_reads
from reshard.storage.page_cache import choose_reading_threads, choose_ways_to_read
from reshard.storage.resources import measure_available_memory, run_in_threads
from reshard.storage.unchanged import open_unchanged
from reshard.types import FIRST, RANKS, Cast, Join, Tensor

WindowWorker = Callable[[Window], None]


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
    config: str | Path | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Loads the tensors of one rank: a dictionary by their names in the rank's file, in the order of that file.

    The tensors are, bit for bit, what `reshard.convert` with the same options would write. Reads little more than the
    byte ranges that the rank needs. Beside the tensors it takes about 8 MiB of memory a thread, 26 MiB where tensors
    are cast or joined.

        tensors = reshard.load("DeepSeek-V3", mp=16, rank=3, device="cuda")
        model.load_state_dict(tensors, strict=True)

    Args:
        source: Folder of a Hugging Face checkpoint, or of rank files of any number of ranks.
        mp: Number of ranks (tensor parallel, or whatever the recipe splits by).
        rank: Number of the rank to load, from 0 to `mp - 1`.
        device: `cpu`, or any device of torch.
        framework: `torch` or `numpy`. Dtypes that numpy lacks become unsigned integers of the same width.
        recipe: Name or file of the recipe; by default the one that fits the checkpoint.
        cast: `bf16` dequantizes weights with block scales and rounds F32 and F16; `fp8` and `fp8-ue8m0` quantize
            weights without scales.
        expert_dtype: `fp8` casts packed FP4 experts to FP8; `fp4` is as they are.
        keep_mtp: Keep what the recipe leaves out by default: MTP layers.
        pad: Pad weights with zeros where whole blocks do not divide among the ranks.
        allow_inexact: Round values that a cast cannot express, instead of refusing them.
        ignore_extra_files: Ignore safetensors files that do not belong to the checkpoint.
        replicas: Of rank files: `"first"` reads the first replica of a shard; `"compare"` reads every replica and
            requires that all are equal.
        config: The folder of `config.json`, if none lies beside the tensors.
        jobs: Number of threads; by default as many as are of use, at most 4.

    Raises:
        Refused: The source cannot be read, changes meanwhile or is not what a recipe expects; an argument is wrong;
            or the tensors do not fit into memory. It has every problem that was found.

    """
    if jobs is not None and require_whole_number("jobs", jobs) < 1:
        raise refuse("wrong-option", "jobs", repr(jobs), "1 or more, or None for as many as are of use")
    require_framework(framework, device)
    layout = require_layout(mp, RANKS, cast, expert_dtype, keep_mtp=keep_mtp, pad=pad, file_size=None)
    found = read_source(
        require_path(source),
        recipe,
        ignore_extra_files=ignore_extra_files,
        replicas=replicas,
        keep_optional=keep_mtp,
        config_folder=read_location(config),
        cast=layout.cast,
    )
    plan = make_plan(found, layout, ranks=(require_whole_number("rank", rank),))
    return load_planned(plan, device, framework, jobs, allow_inexact=allow_inexact)


def load_planned(plan: Plan, device: Any, framework: str, jobs: int | None, *, allow_inexact: bool) -> dict[str, Any]:
    """The tensors of the one file of a plan, by their names."""
    tensors = list(plan.tensors(0))
    require_none(check_array_dtypes(tensors, framework))
    memory = RankMemory(tensors, device)
    try:
        fill_memory(plan, memory, jobs, allow_inexact=allow_inexact)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    return {
        tensor.name: view_as_array(data, tensor.dtype, get_array_shape(tensor), framework)
        for tensor, data in zip(tensors, memory.data, strict=True)
    }


class RankMemory:
    """The tensors of a rank in memory, each in an allocation of its own; addressed by offsets in the rank's file."""

    def __init__(self, tensors: Sequence[Tensor], device: Any) -> None:
        """Allocates the tensors. `device` is `cpu`, for which numpy allocates, or a device of torch or its name."""
        self.device: Any = None if str(device) == "cpu" else device
        self.is_cuda = str(device).startswith("cuda")
        self.tensors = tensors
        self.size = sum(tensor.size for tensor in tensors)
        self._starts = [tensor.offset for tensor in tensors]
        if self.device is None and self.size > measure_available_memory():
            raise refuse_memory(self.size, f"{measure_available_memory():,} bytes free")
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
            raise refuse_memory(self.size, str(error).splitlines()[0]) from None

    def put(self, content: memoryview, offset: int) -> None:
        """Copies bytes to an offset of the rank's file. On CUDA, `content` may be read even after this has returned."""
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


def refuse_memory(size: int, found: str) -> Exception:
    """The refusal of a rank whose tensors do not fit."""
    expected = f"{size:,} bytes for the tensors of the rank"
    return refuse("too-little-memory", "load", found, expected, "a larger mp= has smaller ranks")


def fill_memory(plan: Plan, memory: RankMemory, jobs: int | None, *, allow_inexact: bool) -> None:
    """Reads or computes all windows of a plan for one rank, into memory."""
    folder = plan.source.folder
    ways = choose_ways_to_read(folder / plan.source.files[0].name, memory.size)
    made: list[Join | Cast] = [*plan.source.joins, *plan.casts]
    levels = count_join_levels(plan.source.joins, len(plan.source.files))
    if plan.computes:
        choose_recode()  # here, for it may import numba, and that from one thread only
    with open_unchanged(folder, plan.source.files, ways) as sources:
        advise_scattered_reads(sources)  # or the kernel reads on into what other ranks need
        computing = measure_memory_to_compute(plan.source.joins, plan.casts) if plan.computes else 0
        threads = jobs or choose_reading_threads(ways, MEMORY_PER_THREAD + computing)
        files = OpenFiles(sources, (), ways, made, allow_inexact, levels, StripStore(threads))
        work = require_total_size(
            make_windows(plan.copies, bands=choose_bands(made, len(sources), WINDOW_SIZE)), memory.size
        )
        if memory.is_cuda:
            run_in_cuda_threads(work, files, memory, threads)
        else:
            run_in_threads(work, lambda: make_window_worker(files, memory), threads)


def require_total_size(work: Iterable[Window], size: int) -> Iterator[Window]:
    """The windows. Raises WrongPlan if they do not have `size` bytes: some of the memory would stay uninitialized."""
    for window in work:
        size -= sum(group.size for group in window.groups)
        yield window
    if size:
        raise WrongPlan(f"the windows lack {size:,} bytes")


def make_window_worker(files: OpenFiles, memory: RankMemory) -> WindowWorker:
    """A function that reads windows into memory, through buffers of its own."""
    buffers = WorkerBuffers(makes=bool(files.made), levels=files.levels)

    def move(window: Window) -> None:
        data, _ = read_or_compute_window(window, files, buffers)
        for group in window.groups:
            memory.put(gather_group(group, data, buffers.stage), group.target_offset)

    return move


def run_in_cuda_threads(work: Iterable[Window], files: OpenFiles, memory: RankMemory, threads: int) -> None:
    """Reads the windows onto a CUDA device, each thread with a stream of its own."""
    import torch  # noqa: PLC0415

    allocated_on = torch.cuda.current_stream(memory.device)
    try:
        run_in_threads(work, lambda: make_cuda_window_worker(files, memory, allocated_on), threads)
    finally:
        torch.cuda.synchronize(memory.device)  # before the buffers go, which the device may still read


def make_cuda_window_worker(files: OpenFiles, memory: RankMemory, allocated_on: Any) -> WindowWorker:
    """A function that reads windows through two sets of pinned buffers: one is filled while the device copies from the
    other.
    """
    import torch  # noqa: PLC0415

    cuda: Any = torch.cuda  # which is not typed throughout

    def pinned(size: int) -> memoryview:
        array: Any = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return memoryview(array)

    def allocate() -> WorkerBuffers:
        return WorkerBuffers(makes=bool(files.made), levels=files.levels, allocate=pinned)

    with cuda.device(memory.device):  # a new thread has the first device, which may be another process's
        stream = cuda.Stream(memory.device)
        turns = cycle([(allocate(), cuda.Event()) for _ in range(2)])
    stream.wait_stream(allocated_on)

    def move(window: Window) -> None:
        buffers, taken = next(turns)
        taken.synchronize()
        data, _ = read_or_compute_window(window, files, buffers)
        used = 0
        with cuda.stream(stream):
            for group in window.groups:
                # Behind the groups gathered before, which the device may still read. They fit: no byte is in two.
                memory.put(gather_group(group, data, buffers.stage[used:]), group.target_offset)
                used += group.size
            taken.record(stream)

    return move
