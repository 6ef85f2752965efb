"""START HERE: what reshard does, one function each, with the stages in their order.

`convert` is read, plan, look at the target, execute: each one call whose result goes on to the next. The command calls
these functions, and so does `import reshard`, where refusals name keyword arguments in the place of options.
`reshard.inspect`, `load`, `open` and `repair` stand in modules of their own: in `inspection`, `loading` and `target`.
"""

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from os import PathLike
from time import monotonic

from reshard.errors import refuse, require_none
from reshard.execution.execute import DEFAULT_MEMORY, Settings, check_settings
from reshard.formats.part_manifests import find_ranks_of_share
from reshard.formats.remote_names import make_full_location, read_location, require_local_path, require_path
from reshard.inspection.diff_report import DiffReport
from reshard.inspection.diff_shares import DiffJob, diff_on
from reshard.inspection.tensor_pairs import DiffChoice
from reshard.planning.options import (
    check_download_options,
    check_options_of_source,
    check_source_options,
    check_unread_options,
    choose_subset,
    list_patterns,
    read_sample,
    require_layout,
    sort_numbers,
    split_number_of_ranks,
)
from reshard.planning.plan import Plan
from reshard.planning.rank_choices import plan_for_ranks
from reshard.planning.shares import keep_share, read_share
from reshard.sources.source import read_chosen
from reshard.storage.addresses import require_plain_addresses
from reshard.storage.counting import WorkCounter
from reshard.target.conversion import Conversion
from reshard.target.mending import mend_target
from reshard.target.places import StoredFolder, open_again, open_target
from reshard.target.preflight import look_at_target
from reshard.target.ray_conversion import check_on, convert_on_ray, pack_arguments
from reshard.target.side_files import add_notes, find_beside
from reshard.target.verified_shares import VerifyJob, verify_job
from reshard.target.writing import write_target
from reshard.types import COMPARE, RANKS, Progress, Share
from reshard.verification.download import DownloadReport, verify_download
from reshard.verification.listed_objects import compare_listing
from reshard.verification.report import Report
from reshard.verification.target_folder import require_target_folder

Location = str | PathLike[str]
"""A path; or an address, such as `hf://ORG/NAME` of what is read, and `s3://BUCKET/FOLDER` of what is written too."""


def convert(
    source: Location,
    target: Location,
    mp: int | None = None,
    *,
    to: str = RANKS,
    cast: str | None = None,
    expert_dtype: str | None = None,
    keep_mtp: bool = False,
    pad: bool = False,
    max_file_size: int | None = None,
    replicas: str = COMPARE,
    layers: Iterable[int] | None = None,
    experts: Iterable[int] | None = None,
    renumber: bool = False,
    only: Iterable[str] = (),
    recipe: str | None = None,
    for_engine: str | None = None,
    ranks: Iterable[int] | int | None = None,
    share: str | Share | None = None,
    on: str | None = None,
    ignore_extra_files: bool = False,
    config: Location | None = None,
    n_experts: int | None = None,
    tokenizer_path: Location | None = None,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    cache: str = "auto",
    allow_inexact: bool = False,
    restart: bool = False,
    yes: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the files of every rank, the files beside them and a manifest into the folder `target`.

        reshard.convert("DeepSeek-V3", "DeepSeek-V3-mp16", mp=16)

    A target that an interrupted run has begun is resumed; a finished one is left alone.

    Args:
        source: A folder with a Hugging Face checkpoint or with rank files, or one safetensors file.
        target: The folder to write, also one in a store: empty, not there yet, or begun by the same conversion.
        mp: The number of ranks.
        to: `"ranks"`; `"hf"` for whole files in the layout of Hugging Face; or `"dcp"` for slices in safetensors, as
            torch's distributed checkpoints have them.
        cast: Of all block-scaled weights: `"bf16"` (of F32 and F16 too), `"fp8"` or `"fp8-ue8m0"`; of MXFP4 also
            `"nvfp4"`.
        expert_dtype: `"fp8"` casts FP4 experts to FP8; `"fp4"` is as they are.
        keep_mtp: Keep the MTP layers, which recipes leave out.
        pad: Widen weights with zeros where blocks do not suit the ranks.
        max_file_size: With `to="hf"`: the largest file, in bytes.
        replicas: `"compare"`: tensors that several ranks of the source hold must be equal; `"first"`: take the first.
        layers: Convert these layers only, by their numbers.
        experts: Convert these experts of each layer only.
        renumber: Number the layers and experts that are left from 0 on.
        only: Patterns of names, as a shell has them: write these tensors only.
        recipe: A packaged recipe's name or a TOML file; by default the checkpoint itself tells.
        for_engine: `"vllm"`, or `"transformers"` without `mp`; by default the files are for the model's own code.
        ranks: Write the files of these ranks only. With `to="dcp"` and without `mp`: the number of ranks.
        share: `"1/4"`: the second of four parts, which as many processes make at the same time, perhaps on several
            machines; the same call without it joins them. `"auto"` or `"auto/4"`: by the variables of Slurm, torchrun,
            MPI or Kubernetes.
        on: `"ray"` or `"ray=ADDRESS"`: make shares by the tasks of a Ray cluster, and join them. Source and target lie
            where all of its nodes see them. `jobs` and `max_memory` are those of each task, and `progress` is told what
            earlier runs had done as the tasks begin.
        ignore_extra_files: Leave out safetensors files and tensors that the index does not name; without an index, all
            files but one numbered set.
        config: The folder to take config.json, tokenizer and the like from, in the place of the source.
        n_experts: The number of experts that there should be: any other is refused.
        tokenizer_path: The folder to take the tokenizer from, in the place of the source.
        jobs: Threads; by default as many as processors and disk can use.
        max_memory: In bytes, of all buffers together.
        cache: `"yes"`: through the page cache; `"no"`: past it; `"auto"`: by the size of the job.
        allow_inexact: Round values that the new dtype does not have.
        restart: Throw away what an interrupted run has left in the target, and begin again. A finished target is
            refused, with the files that would be removed.
        yes: With `restart`: remove these files too, and make the target anew.
        progress: Called with the bytes done and the bytes of the whole job, by one thread at a time. The first call
            says what an earlier run had done; the bytes done reach the whole when all is on the disk, not before.

    Raises:
        Refused: The conversion cannot be right, or cannot be written. Then no new file has its final name.

    """
    given = locals()  # first: nothing else is in it
    started = monotonic()
    require_plain_addresses("no-source", source, config, tokenizer_path)
    place = open_target(target)
    settings = Settings(jobs, max_memory, cache, restart, yes, allow_inexact)
    require_none([*check_settings(settings), *check_on(on, share)])
    mp, chosen = split_number_of_ranks(mp, to, ranks)
    layout = require_layout(mp, to, cast, expert_dtype, keep_mtp=keep_mtp, pad=pad, file_size=max_file_size)
    subset = choose_subset(layers, experts, only, renumber=renumber)

    found = read_chosen(
        require_path(source),
        layout,
        subset,
        recipe,
        for_engine,
        replicas,
        ignore_extra_files=ignore_extra_files,
        config_folder=read_location(config),
    )
    require_none(check_source_options(found, replicas, n_experts))
    numbers = sort_numbers("--ranks", chosen)
    planned = plan_for_ranks(found, layout, ranks=numbers, only=subset.only)
    beside = find_beside(planned)
    tokenizer, part = read_location(tokenizer_path), read_share(share)
    # The last chance to refuse.
    noted = add_notes(planned, beside)
    state = look_at_target(noted, place, tokenizer, beside, settings, part, is_spread=on is not None)
    if not state.plan.files and not state.must_be_joined:
        return Conversion(open_again(state.place), state.plan, None, mend_target(state), monotonic() - started)
    if on and (state.plan.files or restart):
        packed = pack_arguments(given, mp, numbers, subset)
        made, done, shares = convert_on_ray(on, convert, packed, noted, state, tokenizer, beside, progress)
        return Conversion(open_again(state.place), made, done, (), monotonic() - started, shares)
    counter = WorkCounter(progress, state.size, writes=True, is_stored=isinstance(place, StoredFolder))
    # The only step that writes tensors.
    done = write_target(state, counter, settings)
    return Conversion(open_again(state.place), state.plan, done, (), monotonic() - started)


def plan(
    source: Location,
    mp: int | None = None,
    *,
    target: Location | None = None,
    to: str = RANKS,
    cast: str | None = None,
    expert_dtype: str | None = None,
    keep_mtp: bool = False,
    pad: bool = False,
    max_file_size: int | None = None,
    replicas: str = COMPARE,
    layers: Iterable[int] | None = None,
    experts: Iterable[int] | None = None,
    renumber: bool = False,
    only: Iterable[str] = (),
    recipe: str | None = None,
    for_engine: str | None = None,
    ranks: Iterable[int] | int | None = None,
    share: str | Share | None = None,
    ignore_extra_files: bool = False,
    config: Location | None = None,
) -> Plan:
    """The plan of a conversion, from the headers of the source alone. It prints as tables of files and tensors.

        plan = reshard.plan("DeepSeek-V3", mp=16)
        print(plan, plan.size)  # in bytes

    The arguments are those of `convert`. With a `target`, the plan has the files that are still to be written there,
    and everything that stands in the way of writing them is refused. Raises Refused.
    """
    require_plain_addresses("no-source", source, config)
    place = None if target is None else open_target(target)
    mp, chosen = split_number_of_ranks(mp, to, ranks)
    layout = require_layout(mp, to, cast, expert_dtype, keep_mtp=keep_mtp, pad=pad, file_size=max_file_size)
    subset = choose_subset(layers, experts, only, renumber=renumber)
    found = read_chosen(
        require_path(source),
        layout,
        subset,
        recipe,
        for_engine,
        replicas,
        ignore_extra_files=ignore_extra_files,
        config_folder=read_location(config),
    )
    require_none(check_source_options(found, replicas, None))
    planned = plan_for_ranks(found, layout, ranks=sort_numbers("--ranks", chosen), only=subset.only)
    beside = find_beside(planned)
    planned, part = add_notes(planned, beside), read_share(share)
    if place is not None:
        return look_at_target(planned, place, beside=beside, share=part).plan
    return keep_share(planned, part) if part else planned


def verify(
    target: Location,
    source: Location | None = None,
    *,
    recipe: str | None = None,
    ranks: Iterable[int] | None = None,
    ignore_extra_files: bool = False,
    config: Location | None = None,
    sample: float | Fraction | None = None,
    download: bool = False,
    sums: Location | None = None,
    checksums_only: bool = False,
    on: str | None = None,
    progress: Progress | None = None,
) -> Report | DownloadReport:
    """Reads a target again and compares every byte: with the source, or without one with the manifest's checksums.

        report = reshard.verify("DeepSeek-V3-mp16", "DeepSeek-V3")
        assert report.is_proven, report

    Args:
        target: A folder of rank files, or of whole files that were made by `convert`; it may lie in a store.
        source: The checkpoint or the rank files that the target was made from.
        recipe: With a source: a packaged recipe's name or a TOML file; by default the checkpoint itself tells.
        ranks: Compare the files of these ranks only: the others need not lie there.
        ignore_extra_files: With a source: as for `convert`.
        config: With a source: as for `convert`.
        sample: Compare about this part of the bytes, more than 0 and at most 1, and both ends of each tensor.
        download: Compare the files of any checkpoint with the hashes that the hub's downloader left beside them.
        sums: Compare them with a list of hashes, as `sha256sum` writes it. Both take no other option.
        checksums_only: Read nothing of a target in a bucket: compare the sizes and ETags that are listed now with those
            that the store told when it was written. Such a report is never `is_proven`.
        on: `"ray"` or `"ray=ADDRESS"`: the machines of a Ray cluster read and compare, each a part of the bytes.
        progress: Called with the bytes compared and the bytes of the whole job, by one thread at a time. They are equal
            in the last call only.

    Returns:
        A report, whose `problems` name file, tensor and byte range of each difference.

    Raises:
        Refused: There is nothing that could be compared.

    """
    part = read_sample(sample)
    given = {
        "--source": source,
        "--recipe": recipe,
        "--sample": sample,
        "--ignore-extra-files": ignore_extra_files or None,
        "--config": config,
        "--on": on,
    }
    if checksums_only:
        require_none(check_unread_options({**given, "--download": download or None, "--sums": sums}))
    if download or sums is not None:
        require_none(check_download_options({**given, "--ranks": ranks}, sums, is_hub=download))
        return verify_download(require_local_path(target), None if sums is None else require_local_path(sums), progress)
    require_plain_addresses("no-source", source, config)
    folder = require_path(target)
    require_target_folder(folder)
    chosen = sort_numbers("--ranks", ranks)
    if chosen == ():
        raise refuse("wrong-option", "--ranks", "no rank", "at least one, or leave it out")
    if source is not None and chosen is None:
        chosen = find_ranks_of_share(folder)
    if source is None:
        require_none(check_options_of_source({"--recipe": recipe, "--config": config}))
    if checksums_only:
        report = compare_listing(folder, chosen)
    else:
        locations = make_full_location(target), make_full_location(source), make_full_location(config)
        job = VerifyJob(*locations, recipe, chosen, part, ignore_extra_files)
        report = verify_job(job, folder, read_location(source), read_location(config), on, progress)
    return replace(report, target=str(folder))


def diff(
    a: Location,
    b: Location,
    *,
    only: Iterable[str] = (),
    recipe: str | None = None,
    dequantize: bool = False,
    replicas: str = COMPARE,
    ignore_extra_files: bool = False,
    config: Location | None = None,
    on: str | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """Compares two checkpoints tensor by tensor, each in any layout, and says how far apart their numbers are.

        report = reshard.diff("base", "fine-tuned", only=["*.mlp.*"])
        print(report.is_same, report)

    Args:
        a: A checkpoint, a folder of rank files, or one safetensors file.
        b: Another one.
        only: Patterns of names, as a shell has them; by default all tensors are compared.
        recipe: Of both sides: a packaged recipe's name or a TOML file; by default each side tells itself.
        dequantize: Compare weights of different dtypes in BF16: block-scaled ones dequantized, F32 and F16 rounded.
        replicas: As for `convert`.
        ignore_extra_files: As for `convert`.
        config: The folder of config.json, for a side that has none.
        on: As for `verify`.
        progress: As for `verify`, with the bytes of one side. The whole grows once, if equal parts are read again.

    Raises:
        Refused: One of the two cannot be read.

    """
    require_plain_addresses("no-source", a, b, config)
    beside = read_location(config)
    choice = DiffChoice(list_patterns(only), recipe, dequantize, ignore_extra_files, replicas, beside)
    job = DiffJob(make_full_location(a), make_full_location(b), make_full_location(config), choice)
    return diff_on(job, require_path(a), require_path(b), on, progress)
