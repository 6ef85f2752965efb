"""Breaks reshard on purpose, one place at a time, and shows which test sees it: `make mutations`.

Each row of the table takes a few words of a module, which stand there once, and puts others in their place. The tests
named beside it are run on a copy of the package with that one change, and have to fail; before, they have to pass on a
copy without it. Nothing of the working tree is touched.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from repository import ROOT, find_test_file

LONGEST = 300
"""In seconds: a test that takes longer hangs."""


class Mutation(NamedTuple):
    """A fault."""

    module: str
    what: str
    """What is broken."""
    before: str
    after: str
    test: str
    """What sees it: the name of a test file, whatever its folder, and of the test."""


MUTATIONS = (
    # --- the planner ---
    Mutation(
        "sources/match",
        "a tensor that two rules know goes to the first of them",
        "if len(found) != 1:",
        "if not found:",
        "test_match.py::test_a_name_under_two_rules_is_refused",
    ),
    Mutation(
        "sources/match",
        "only the first of the unknown tensors is reported",
        "for name in map(names.__getitem__, sort_by_layer(names)):",
        "for name in map(names.__getitem__, sort_by_layer(names)[:1]):",
        "test_match.py::test_every_unknown_name_is_told",
    ),
    Mutation(
        "sources/match",
        "two tensors may get one name",
        "lambda: check_clashes(families, recipe),",
        "lambda: iter(()),",
        "test_convert.py::test_two_tensors_of_one_new_name_are_refused",
    ),
    Mutation(
        "sources/match",
        "nothing is ever missing",
        "lambda: check_missing(checkpoint.config, recipe, members, matched.present, keep_optional=keep_optional),",
        "lambda: iter(()),",
        "test_match.py::test_a_tensor_that_is_missing_is_named",
    ),
    Mutation(
        "casts/shapes",
        "the smaller block at the end of a row has no scale",
        "return tuple(-(-length // side) for length, side in zip(shape, block, strict=False))",
        "return tuple(length // side for length, side in zip(shape, block, strict=False))",
        "test_plan.py::test_block_scales_go_with_their_weight",
    ),
    Mutation(
        "sources/block_scales",
        "an FP8 weight may lack its block scale",
        'if weight.dtype.startswith("F8_") or weight.dtype == scaled:',
        'if weight.dtype == "I8":',
        "test_plan.py::test_a_weight_and_its_scale_that_do_not_fit_are_refused",
    ),
    Mutation(
        "planning/shards",
        "block scales are left out of rank files",
        "    if not outcome.scales:\n        return\n",
        "    return\n",
        "test_plan.py::test_the_scale_of_an_expert_goes_with_it",
    ),
    Mutation(
        "planning/shards",
        "experts are dealt like cards, 0, 4, 8 to the first rank",
        "for numbers in kind.numbers], np.int64) // members",
        "for numbers in kind.numbers], np.int64) % terms.layout.ranks",
        "test_plan.py::test_experts_go_whole_and_in_order_of_number",
    ),
    Mutation(
        "planning/transforms",
        "the tail of a table is not padded",
        "-(-shape[0] // multiple) * multiple",
        "shape[0] // multiple * multiple",
        "test_plan.py::test_padded_rows_are_as_few_as_all_ranks_can_share",
    ),
    Mutation(
        "planning/file_layout",
        "the parts go to the ranks in reverse order",
        "part = 0 if layout.to == WHOLE else rank",
        "part = 0 if layout.to == WHOLE else layout.ranks - 1 - rank",
        "test_plan.py::test_copies_of_a_weight",
    ),
    Mutation(
        "planning/file_layout",
        "a rank gets the scale of the next block",
        "part // columns.repeat[chosen] * run",
        "(part + 1) // columns.repeat[chosen] * run",
        "test_plan.py::test_block_scales_go_with_their_weight",
    ),
    Mutation(
        "planning/file_layout",
        "the tensors of a file are not in the order of safetensors",
        "for row in sorted(by_dtype[dtype]))",
        "for row in by_dtype[dtype])",
        "test_plan.py::test_the_order_in_a_file_is_by_dtype_then_name",
    ),
    Mutation(
        "planning/file_layout",
        "a whole file grows by one tensor beyond the size asked for",
        "if filled and filled + size > most - LEAST_HEADER:",
        "if filled and filled > most - LEAST_HEADER:",
        "test_plan.py::test_a_checkpoint_goes_out_in_files_that_are_not_too_large",
    ),
    Mutation(
        "planning/proofs",
        "a part may be used more or less often than its rule says",
        "if np.any((usage.most > 0) & ((usage.least != least) | (usage.most != most))):",
        "if False:",
        "test_plan.py::test_the_proof_sees_a_copy_that_reads_another_part",
    ),
    Mutation(
        "planning/rank_checks",
        "a part may end inside a block",
        "if limit and not limit.allows(parts):",
        "if False:",
        "test_plan.py::test_deepseek_v3_cannot_be_cut_for_32_ranks",
    ),
    Mutation(
        "planning/shards",
        "two halves are cut as if they were one tensor",
        "        return cut_nothing(tensor, ranks)\n"
        "    return cut_packed(tensor, parts) if split.is_packed else cut_along(",
        "        return cut_nothing(tensor, ranks)\n    return cut_along(",
        "test_gaps.py::test_each_half_is_cut_by_itself",
    ),
    Mutation(
        "planning/proofs",
        "the last copy of a file may end early",
        "is_last & (end != np.asarray(ends, np.int64)[file])",
        "is_last & (end > np.asarray(ends, np.int64)[file])",
        "test_plan.py::test_what_counts_as_tiled_is_tiled",
    ),
    Mutation(
        "planning/proofs",
        "a tensor of which nothing is read is covered",
        "if read != len(full):",
        "if False:",
        "test_plan.py::test_what_counts_as_covered_is_covered",
    ),
    Mutation(
        "planning/planner",
        "a plan is given out without the proof that it tiles its files",
        "    require_tiling(copies, [len(file.header) for file in files], [file.size for file in files])\n",
        "",
        "test_gaps.py::test_a_plan_that_does_not_tile_is_not_given_out",
    ),
    Mutation(
        "planning/planner",
        "a plan for some ranks writes into the files of others",
        'columns["target_file"] = new_index[columns["target_file"]]',
        "pass",
        "test_plan.py::test_some_ranks_have_the_copies_of_all_ranks",
    ),
    Mutation(
        "planning/transforms",
        "padding does not heed the blocks",
        "size % (layout.ranks * block) == 0",
        "size % layout.ranks == 0",
        "test_plan.py::test_padding_gives_the_files_of_a_larger_config",
    ),
    Mutation(
        "planning/transforms",
        "what suits the ranks already is padded too",
        "for more in range(value, MOST * value + 1)",
        "for more in range(value + 1, MOST * value + 1)",
        "test_family_conversions.py::test_padding_where_nothing_straddles_changes_nothing",
    ),
    # --- the executor ---
    Mutation(
        "execution/windows",
        "the second stretch of a long copy is written over the first",
        "target_offset = piece.target_offset + start - piece.source_offset\n",
        "target_offset = piece.target_offset\n",
        "test_convert.py::test_tensors_larger_than_any_buffer_are_those_of_safetensors",
    ),
    Mutation(
        "execution/windows",
        "the last band of columns goes on behind the matrix",
        "rows=np.minimum(height[index], piece.rows - row)",
        "rows=height[index]",
        "test_convert.py::test_tensors_larger_than_any_buffer_are_those_of_safetensors",
    ),
    Mutation(
        "execution/windows",
        "what ends in one source file goes on in the next",
        '        & (np.diff(columns["source_file"]) == 0)\n',
        "",
        "test_gaps.py::test_neighbours_from_two_files_are_read_from_their_own",
    ),
    Mutation(
        "execution/writer",
        "the journal speaks of a batch before its bytes are durable",
        """\
        for file, part in parts.items():
            os.fdatasync(self._targets[file])
""",
        """\
        append_records(self._journal, batch)
        for file, part in parts.items():
            os.fdatasync(self._targets[file])
""",
        "test_durability.py::test_a_batch_of_the_journal_comes_behind_the_bytes_that_it_speaks_of",
    ),
    Mutation(
        "execution/writer",
        "written bytes are not made durable at all",
        "os.fdatasync(self._targets[file])",
        "pass",
        "test_durability.py::test_a_batch_of_the_journal_comes_behind_the_bytes_that_it_speaks_of",
    ),
    Mutation(
        "execution/reader",
        "the columns of a matrix are gathered on top of each other",
        "end += piece.run * piece.rows",
        "end += piece.run",
        "test_convert.py::test_every_file_is_the_oracles[v2-2]",
    ),
    Mutation(
        "execution/writer",
        "the checksum of a range is that of the window it came from",
        "digest = xxh3_128_digest(bytes_of_group)",
        "digest = xxh3_128_digest(data)",
        "test_checksums.py::test_good_files_are_compared_whole",
    ),
    Mutation(
        "execution/writer",
        "every step of a long run reads the first again",
        "window.offset + start + step, min(",
        "window.offset + start, min(",
        "test_convert.py::test_tensors_larger_than_any_buffer_are_those_of_safetensors",
    ),
    Mutation(
        "execution/writer",
        "the checksum of a long run is that of its last step",
        "                checksum.update(data)\n",
        "                checksum = xxh3_128(data)\n",
        "test_convert.py::test_tensors_larger_than_any_buffer_are_those_of_safetensors",
    ),
    Mutation(
        "execution/reader",
        "values are rounded though nobody has allowed it",
        "if inexact and not files.allow_inexact:",
        "if False:",
        "test_whole_casts.py::test_a_value_that_fp8_has_not_is_refused_with_its_tensor",
    ),
    Mutation(
        "casts/streaming",
        "padding is what was in the buffer before",
        "            fill_padding(rows, cast)\n",
        "            pass\n",
        "test_family_conversions.py::test_padding_is_that_of_the_oracle[32-more0]",
    ),
    Mutation(
        "casts/streaming",
        "the padding of block scales is zeros",
        "one = SCALE_ONES[cast.result.dtype] if cast.is_scale else bytes(1)",
        "one = bytes(1)",
        "test_family_conversions.py::test_padding_is_that_of_the_oracle[32-more0]",
    ),
    Mutation(
        "casts/kernels",
        "halfway values are rounded down on the way to FP8",
        "bits |= (bits & 0xFFFF) + 0xFFFF",
        "bits |= 0",
        "test_kernels.py::test_every_bfloat16_over_scales_of_every_kind_is_torchs_code",
    ),
    Mutation(
        "casts/kernels",
        "the new scale of FP4 is a 32nd of the largest",
        "np.maximum(largest, 6) - 6)",
        "np.maximum(largest, 5) - 5)",
        "test_kernels.py::test_new_scales_are_the_largest_of_a_block_over_64",
    ),
    Mutation(
        "casts/code_tables",
        "the two values in a byte of FP4 change places",
        "np.stack([codes[:, low], codes[:, high]], axis=-1)",
        "np.stack([codes[:, high], codes[:, low]], axis=-1)",
        "test_kernels.py::test_known_fp4_values_are_right_and_the_even_column_is_in_the_low_nibble",
    ),
    Mutation(
        "storage/local",
        "of a write that the system cuts short the rest is not written",
        "    while done < len(data):\n",
        "    if data:\n",
        "test_gaps.py::test_a_write_that_the_system_cuts_short_is_not_taken_for_whole",
    ),
    Mutation(
        "storage/local",
        "past the cache a stretch is taken from the beginning of its page",
        "return buffer[skip : skip + size]",
        "return buffer[:size]",
        "test_family_conversions.py::test_a_family_is_converted_as_its_oracle_does[deepseek-v3-2]",
    ),
    Mutation(
        "execution/execute",
        "the names of the partial files are not durable before the journal speaks of them",
        "        sync_folder(target)\n        # First: a",
        "        # First: a",
        "test_durability.py::test_the_names_of_the_files_are_durable_before_the_first_batch",
    ),
    Mutation(
        "storage/unchanged",
        "a source that changes meanwhile is not seen",
        "            raise\n        require_unchanged(folder, files, opened, is_source=is_source, again=again)\n",
        "            raise\n",
        "test_resume.py::test_a_source_that_changes_is_seen",
    ),
    Mutation(
        "execution/records",
        "the next run leaves out what was written at that place of another file",
        "offsets = self._offsets.get(group[0])",
        "offsets = np.sort(np.concatenate([np.zeros(0, np.int64), *self._offsets.values()]))",
        "test_gaps.py::test_what_the_journal_has_not_is_written_and_nothing_else_is",
    ),
    Mutation(
        "execution/execute",
        "the journal need not reach the end of a file",
        'if bounds[:-1] != mine["offset"].tolist() or bounds[-1] != file.size:',
        'if bounds[:-1] != mine["offset"].tolist():',
        "test_gaps.py::test_a_record_that_is_not_there_is_missed_wherever_it_is",
    ),
    Mutation(
        "execution/execute",
        "a partial file that is gone counts as written",
        "if index in begun and (size := path.stat().st_size if path.exists() else 0) != file.size:",
        "if False:",
        "test_gaps.py::test_a_partial_file_that_is_gone_is_not_taken_for_written",
    ),
    Mutation(
        "execution/execute",
        "a run that fails throws away what is durable",
        "if not has_records(journal) and",
        "if",
        "test_faults.py::test_a_source_file_that_is_removed_is_missed_at_the_end",
    ),
    Mutation(
        "storage/local",
        "small files get their names before they are durable",
        "memoryview(content), 0, CACHED)\n        os.fsync(descriptor)\n",
        "memoryview(content), 0, CACHED)\n",
        "test_durability.py::test_nothing_is_renamed_before_all_is_durable",
    ),
    Mutation(
        "execution/execute",
        "files get their final names too early: while bytes are still to be written",
        "        targets = open_targets(stack, plan, target, journal.lock, written.files, complete=complete)\n",
        "        targets = open_targets(stack, plan, target, journal.lock, written.files, complete=complete)\n"
        "        for file in plan.files:\n            (target / (file.name + PARTIAL)).rename(target / file.name)\n",
        "test_convert.py::test_a_kill_leaves_no_final_name",
    ),
    Mutation(
        "execution/finished_files",
        "the manifest gets its name before those of the others are durable",
        "if name == MANIFEST:",
        "if False:",
        "test_durability.py::test_the_manifest_is_renamed_last_and_the_names_are_durable_before_the_journal_goes",
    ),
    # --- the journal and the manifest ---
    Mutation(
        "execution/journal",
        "a batch is believed without its checksum",
        " or xxh3_64_digest(batch) != content[end - CHECKSUM_SIZE : end]:",
        ":",
        "test_gaps.py::test_a_flipped_bit_anywhere_in_a_batch_is_refused",
    ),
    Mutation(
        "execution/journal",
        "a torn end is refused like any damage",
        "return end >= len(content) or not any(content[start:])",
        "return False",
        "test_resume.py::test_a_torn_end_of_the_journal_is_as_if_never_written",
    ),
    Mutation(
        "execution/journal",
        "what is written to the journal is not waited for",
        "    os.fdatasync(descriptor)\n",
        "",
        "test_durability.py::test_every_write_to_the_journal_is_made_durable_before_the_next_step",
    ),
    Mutation(
        "execution/journal",
        "two runs may share the lock",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "test_resume.py::test_two_runs_at_once_are_one_too_many",
    ),
    Mutation(
        "execution/journal",
        "a run goes on with the journal of another job",
        "if found != wanted:",
        "if False:",
        "test_resume.py::test_after_it_another_job_is_refused_and_a_restart_leaves_no_mixture",
    ),
    Mutation(
        "formats/part_manifests",
        "a model with the same headers is the same model",
        '"subset", "source_samples")',
        '"subset")',
        "test_resume.py::test_a_model_with_the_same_headers_is_another_job",
    ),
    Mutation(
        "target/manifest_writer",
        "of a source only the beginning is looked at",
        "for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_SIZE)):",
        "for offset in (begin,):",
        "test_gaps.py::test_a_model_that_differs_at_one_place_of_the_samples_is_another",
    ),
    Mutation(
        "target/manifest_writer",
        "a finished file may have any size",
        "if path.is_file() and measure_path(path) == file.size}",
        "if path.is_file()}",
        "test_gaps.py::test_a_finished_file_of_another_size_is_not_taken_for_finished",
    ),
    Mutation(
        "formats/manifest",
        "a manifest is believed without its checksum",
        "if found != compute_manifest_checksum(manifest) or not is_well_formed(manifest):",
        "if not is_well_formed(manifest):",
        "test_gaps.py::test_a_manifest_with_another_value_in_it_is_refused",
    ),
    # --- rank files as a source ---
    Mutation(
        "sources/rank_files",
        "the parts of a tensor are joined from the last rank to the first",
        "for rank in sorted(found.by_rank)]",
        "for rank in sorted(found.by_rank, reverse=True)]",
        "test_rank_files.py::test_rank_files_become_the_checkpoint_again[deepseek-v3-4]",
    ),
    Mutation(
        "sources/rank_files",
        "a block scale that ranks share is taken as often as there are ranks",
        "side // length if 0 < length < side else 1",
        "1",
        "test_rank_files.py::test_a_scale_that_ranks_share_comes_back_once",
    ),
    Mutation(
        "sources/rank_files",
        "ranks may have other dtypes for one tensor",
        "if len(kinds) > 1:",
        "if False:",
        "test_rank_files.py::test_parts_of_another_dtype_are_refused",
    ),
    Mutation(
        "execution/joins",
        "replicas are not compared",
        "for other in copies[1:]:",
        "for other in ():",
        "test_rank_files.py::test_a_replica_that_differs_is_refused",
    ),
    Mutation(
        "sources/rank_files",
        "each part is read from where the byte range begins",
        "PartRange(part, first - start, first - offset,",
        "PartRange(part, first - offset, first - offset,",
        "test_rank_files.py::test_rank_files_become_the_checkpoint_again[deepseek-v3-4]",
    ),
    Mutation(
        "target/manifest_writer",
        "it is forgotten how large a tensor was before it was padded",
        "if tuple(shape) != cast.result.shape:",
        "if False:",
        "test_rank_files.py::test_padding_is_taken_off_again",
    ),
    # --- the verifier ---
    Mutation(
        "verification/verify",
        "differences are found and not reported",
        "    problems.extend(check_differences(trace, comparison))\n",
        "",
        "test_verify.py::test_the_first_and_the_last_bit_of_every_tensor_are_seen[0-False]",
    ),
    Mutation(
        "verification/verify",
        "what all ranks lack is not missed",
        "    yield from check_missing_tensors(trace, looked_at, wanted)\n",
        "",
        "test_verify.py::test_a_tensor_that_all_ranks_lack_is_named",
    ),
    Mutation(
        "verification/verify",
        "an expert may lie in two ranks",
        "elif expected != found:",
        "elif not set(expected) <= set(found):",
        "test_verify.py::test_an_expert_in_two_ranks_is_named",
    ),
    Mutation(
        "verification/provenance",
        "another dtype of the same size is not seen",
        "if tensor.dtype != dtype or tensor.shape != shape or",
        "if tensor.shape != shape or",
        "test_verify.py::test_another_dtype_or_shape_of_equal_bytes_is_named",
    ),
    Mutation(
        "verification/provenance",
        "the second half of a packed tensor is looked for at its beginning",
        "accumulate(sizes, initial=0)",
        "[0] * len(sizes)",
        "test_verify_casts.py::test_heads_that_ranks_share_and_halves_are_proven",
    ),
    Mutation(
        "verification/target_folder",
        "a rank file too many is not seen",
        "extra=[name for name in tensor_files if name not in known]",
        "extra=[]",
        "test_verify.py::test_a_rank_file_too_many_is_named",
    ),
    Mutation(
        "verification/expected",
        "packed FP4 may be called I8 in a rank file",
        'return "F4" if is_packed_fp4(weight, scaling) and not is_whole else weight.dtype',
        "return weight.dtype",
        "test_verify_casts.py::test_packed_weights_are_called_so",
    ),
    Mutation(
        "verification/expected_boxes",
        "each rank should hold the part of the rank before it",
        "range(index * half // parts, (index + 1) * half // parts)",
        "range((index - 1) % parts * half // parts, ((index - 1) % parts + 1) * half // parts)",
        "test_verify.py::test_good_rank_files_have_no_problems[2]",
    ),
    Mutation(
        "verification/chunks",
        "the last rows of a tensor are not compared",
        "count = ceil(height / step) * per_row",
        "count = max(1, height // step) * per_row",
        "test_chunks.py::test_bands_hold_every_byte_once_and_are_small",
    ),
    Mutation(
        "verification/chunks",
        "the padding below a tensor is not compared",
        "for box in (right, below)",
        "for box in (right,)",
        "test_chunks.py::test_margins_hold_what_is_beyond_a_tensor_once",
    ),
    Mutation(
        "verification/compare",
        "of replicas only the first is compared",
        "for part, rows, columns in boxes:",
        "for part, rows, columns in boxes[:1]:",
        "test_verify.py::test_a_replica_that_differs_in_one_rank_is_named",
    ),
    Mutation(
        "verification/compare",
        "only the last difference of a tensor is counted",
        "known.count += count",
        "known.count = count",
        "test_verify.py::test_all_bytes_that_differ_are_counted_whichever_thread_finds_them",
    ),
    Mutation(
        "verification/reference_casts",
        "every chunk of a tile gets the scales of the first",
        "scale[:, left // recast.block[1] * size : -(-(left + step) // recast.block[1]) * size]",
        "scale[:, : -(-step // recast.block[1]) * size]",
        "test_verify_casts.py::test_a_true_conversion_is_proven",
    ),
    Mutation(
        "verification/reference_casts",
        "verify takes the high half of a byte of FP4 for the even column",
        "np.stack([packed & 15, packed >> 4], axis=-1)",
        "np.stack([packed >> 4, packed & 15], axis=-1)",
        "test_reference_casts.py::test_the_even_column_of_fp4_is_in_the_low_half",
    ),
    Mutation(
        "verification/index_and_config",
        "the index may name any file",
        "if named.get(name) != file_names.get(name):",
        "if False:",
        "test_verify_casts.py::test_an_index_that_names_another_file_is_seen",
    ),
    Mutation(
        "verification/checked_ranges",
        "a range with another checksum is fine",
        "[checked.offset - start : checked.stop - start]) != checked.digest",
        '[checked.offset - start : checked.stop - start]) == ""',
        "test_checksums.py::test_a_flipped_bit_is_named_with_file_range_and_tensor",
    ),
    Mutation(
        "verification/checksums",
        "a file of another size is passed over",
        "if size in (None, entry.size):",
        "if True:",
        "test_checksums.py::test_swapped_truncated_missing_and_extra_files_are_named",
    ),
    Mutation(
        "verification/checked_ranges",
        "a sample need not hold the end of a file",
        "sorted({0, numbers[-1], *sample_evenly(",
        "sorted({0, *sample_evenly(",
        "test_checksums.py::test_the_smallest_sample_sees_the_header_and_the_last_byte",
    ),
    Mutation(
        "verification/checksums",
        "small files are compared by their size",
        ' or compute_file_checksum(path) != entry["xxh3_128"]',
        "",
        "test_checksums.py::test_a_sample_looks_at_sizes_and_small_files_in_full",
    ),
    # --- what people have on their disks ---
    Mutation(
        "formats/numbering",
        "a set that is counted from 0 may lack its last file",
        "return first, self.total if first or self.total in present else self.total - 1",
        "return first, max(present)",
        "test_numbering.py::test_what_a_set_lacks_is_named_in_its_own_spelling",
    ),
    Mutation(
        "formats/huggingface",
        "the files of macOS are shards",
        'return name.endswith(SUFFIX) and not name.startswith(".")',
        "return name.endswith(SUFFIX)",
        "test_which_files.py::test_a_name_that_begins_with_a_dot_is_no_shard",
    ),
    Mutation(
        "formats/index",
        "a tensor is taken from any file that has it",
        "if get_file(tensor.name) == files[tensor.file]}",
        "if get_file(tensor.name)}",
        "test_which_files.py::test_a_tensor_is_taken_from_the_file_that_the_index_names",
    ),
    Mutation(
        "sources/not_in_index",
        "an output head that the index lacks is lost in silence",
        "if name in known:",
        "if name in needed:",
        "test_not_in_index.py::test_an_output_head_that_only_the_index_lacks_is_not_lost_in_silence",
    ),
    Mutation(
        "sources/fitted_names",
        "a renaming may give two tensors one name",
        "if len(tensors) < len(checkpoint.tensors):",
        "if not tensors:",
        "test_prefixes.py::test_no_renaming_lets_two_tensors_have_one_name",
    ),
    Mutation(
        "casts/rounding",
        "F32 is cut off instead of rounded",
        "raised += 0x7FFF",
        "raised += 0",
        "test_rounding.py::test_ties_go_to_the_even_neighbour",
    ),
    Mutation(
        "verification/download",
        "a hash that differs is no problem",
        "elif found != record.digest:",
        "elif not found:",
        "test_download.py::test_a_flipped_bit_is_seen_wherever_it_is",
    ),
    Mutation(
        "target/side_files",
        "weights in other formats go along",
        'return INDEX_ENDING.sub("", name.lower()).endswith(LEFT_ENDINGS)',
        "return False",
        "test_side_files.py::test_other_formats_stay_behind_and_are_said",
    ),
    Mutation(
        "formats/unfinished_downloads",
        "a file is whole though its download is not",
        "if name and (name in wanted or (beside in wanted and name not in entries)):",
        "if name and beside in wanted and name not in entries:",
        "test_recognition.py::test_an_unfinished_download_is_seen_by_the_file_beside",
    ),
    # --- daily use ---
    Mutation(
        "target/repair",
        "a file that was written anew is taken as proven",
        "proven = [name for name, ranges in wrong.items() if not ranges]",
        "proven = [*wrong]",
        "test_repair.py::test_a_source_that_has_changed_since_mends_only_what_it_still_can",
    ),
    Mutation(
        "target/repair",
        "a side file that somebody has changed is overwritten",
        "if name in sides and (target / name).exists()}",
        "if name in sides and not name}",
        "test_repair.py::test_what_somebody_made_of_a_side_file_is_kept_each_time",
    ),
    Mutation(
        "target/preflight",
        "a restart removes finished files unasked",
        "if state.removed and not settings.yes:",
        "if state.removed and settings.yes is None:",
        "test_restart.py::test_what_would_be_removed_is_said_and_nothing_is_done",
    ),
    Mutation(
        "target/preflight",
        "joining parts replaces a side file that somebody has changed",
        "found += check_replaced_sides(state)",
        "found += []",
        "test_parts.py::test_a_side_file_that_someone_has_changed_is_not_replaced",
    ),
    Mutation(
        "target/state",
        "parts whose manifests tell other bytes of one rank are joined",
        "yield from check_agreement(state.folder, state.same)",
        "yield from ()",
        "test_parts.py::test_manifests_that_contradict_each_other_prove_nothing",
    ),
    Mutation(
        "planning/fused_parts",
        "the members of a stack lie in reverse order",
        "np.array([int(numbers[place])",
        "np.array([-int(numbers[place])",
        "test_fused_runs.py::test_every_rank_has_what_numpy_makes",
    ),
    Mutation(
        "planning/fused_parts",
        "the parts of a fused tensor lie in reverse order",
        "fusion.rules.index(kind.number), np.int64)",
        "-fusion.rules.index(kind.number), np.int64)",
        "test_vllm.py::test_rank_files_are_those_of_the_oracle_and_lead_back",
    ),
    Mutation(
        "planning/transforms",
        "a vocabulary is padded for the ranks, not to its multiple",
        "rule.split.multiple or terms.layout.ranks",
        "terms.layout.ranks",
        "test_vllm.py::test_rank_files_are_those_of_the_oracle_and_lead_back",
    ),
    Mutation(
        "planning/fused_parts",
        "parts of unlike dtypes are fused",
        "if tensor.dtype != known.dtype:",
        "if False:",
        "test_fused_plans.py::test_parts_of_unlike_dtypes_are_refused",
    ),
    Mutation(
        "sources/fused_shards",
        "the parts of a fused tensor are taken from its beginning",
        "            begin += size",
        "            begin += 0",
        "test_fused_shards.py::test_fused_rank_files_become_the_checkpoint_again",
    ),
    Mutation(
        "sources/constants",
        "a constant of another value is left aside",
        "if content == value * (len(content) // len(value)):",
        "if content:",
        "test_fused_shards.py::test_another_constant_is_refused",
    ),
    Mutation(
        "verification/fused_parts",
        "the members of a stack are compared in the order of their names",
        "if fusion.stacked and not is_part else members)",
        "if fusion.stacked and not is_part else members, key=str)",
        "test_verify_fused.py::test_true_fused_files_are_proven",
    ),
    Mutation(
        "verification/constants",
        "any value of a constant is proven",
        "if len(wrong) or data.nbytes != tensor.size:",
        "if data.nbytes != tensor.size:",
        "test_verify_fused.py::test_a_wrong_constant_is_named",
    ),
    Mutation(
        "verification/report_notes",
        "verify with a source passes over a tokenizer that is gone",
        "problems=(*report.problems, *added)",
        "problems=report.problems",
        "test_source_and_side_files.py::test_a_side_file_that_is_missing_or_changed_is_told_once",
    ),
    Mutation(
        "sources/rank_files",
        "parts that were cut along a later dimension are joined as if by columns",
        "rows = prod(shape[:dimension]) if dimension and len(shape) > dimension else 1",
        "rows = shape[0] if dimension and len(shape) > dimension else 1",
        "test_dimensions.py::test_each_dimension_is_cut_as_torch_cuts_it_and_joined_again",
    ),
    Mutation(
        "planning/constants",
        "constants of quantized models are in all files",
        "for constant in list_present_constants(recipe, scaled):",
        "for constant in recipe.constants:",
        "test_vllm.py::test_constants_of_fp8_are_there_exactly_with_block_scales",
    ),
    Mutation(
        "sources/stacked_experts",
        "stacks that contradict each other are taken apart",
        "        for formula, length in zip(formulas, part.shape, strict=False):",
        "        for formula, length in zip((), part.shape, strict=False):",
        "test_stacked_experts.py::test_transposed_stacks_are_not_read_without_a_config",
    ),
    Mutation(
        "target/verified_target",
        "verify believes where stacked experts were read",
        "stacked=StackedSource(*sides.unstacked) if sides.unstacked else None,",
        "stacked=None,",
        "test_stacked_experts.py::test_verify_sees_what_a_fault_of_reading_has_exchanged",
    ),
    Mutation(
        "target/config_files",
        "a cast to FP8 does not say what stays as it was",
        "    if plan.layout.cast not in CAST_TO_FP8:\n",
        "    if True:\n",
        "test_whole_casts.py::test_codes_and_scales_are_those_of_torch_and_come_back",
    ),
    Mutation(
        "planning/plan",
        "the last rank's shape is told as that of the others",
        "shapes = list_shapes(pieces, file.pieces, file.rank)",
        "shapes = list_shapes(pieces, file.pieces, 0)",
        "test_uneven_parts.py::test_parts_of_the_last_rank_are_planned_loaded_opened_and_compared",
    ),
    Mutation(
        "planning/shards",
        "dimensions that become one are as long as one of them in the last rank",
        "uneven=(dimension, cut.uneven[1] * shape[-1])",
        "uneven=cut.uneven",
        "test_uneven_parts.py::test_each_rank_has_its_blocks_and_they_lead_back",
    ),
    Mutation(
        "sources/rank_files",
        "parts that no cut gives are joined",
        "    if lengths != wanted or not all(lengths):",
        "    if not all(lengths):",
        "test_uneven_parts.py::test_parts_that_no_cut_gives_are_refused",
    ),
    Mutation(
        "verification/expected_boxes",
        "verify cuts blocks",
        "        most = -(-length // (block * parts)) * block",
        "        most = -(-length // parts)",
        "test_uneven_parts.py::test_each_rank_has_its_blocks_and_they_lead_back",
    ),
    Mutation(
        "planning/slices",
        "slices are rounded down",
        "-(-tensor.shape[0] // ranks)",
        "(tensor.shape[0] // ranks or 1)",
        "test_slices.py::test_each_rank_has_its_chunks",
    ),
    Mutation(
        "planning/slices",
        "a slice says that it begins where a full one would",
        "{rank * step if shape",
        "{rank * next(iter(shape), 0) if shape",
        "test_slices.py::test_each_rank_has_its_chunks",
    ),
    Mutation(
        "verification/slices",
        "verify believes where a slice says that it begins",
        "if (tensor.dtype, tensor.shape, said) !=",
        'if (tensor.dtype, tensor.shape, {"saved_offsets": place}) !=',
        "test_slices.py::test_a_wrong_place_is_seen",
    ),
    Mutation(
        "formats/training_state",
        "a head beside the mapping of the model is left aside",
        'return within if any(f".{HEAD}" in name for name in within) else [*within, *heads]',
        "return within",
        "test_training_refusals.py::test_a_head_beside_the_mapping_of_the_model_is_taken",
    ),
    Mutation(
        "sources/boxed_hints",
        "the slice behind the one that may lack is named",
        "max(shards) + 1",
        "max(shards) + 2",
        "test_training_refusals.py::test_the_last_slice_may_be_missing",
    ),
    Mutation(
        "planning/file_layout",
        "headers say of shorter parts what the first ranks have",
        "if is_uneven else []",
        "if slices else []",
        "test_uneven_parts.py::test_each_rank_has_its_blocks_and_they_lead_back",
    ),
    Mutation(
        "target/verified_target",
        "slices of rank files are proven without their rows",
        "if sliced and sliced.problems:",
        "if sliced and False:",
        "test_foreign_slices.py::test_rows_that_torch_would_not_cut_are_seen",
    ),
    Mutation(
        "formats/folders_below",
        "a folder without metadata is named as a save",
        "(path / METADATA).is_file()",
        "True",
        "test_training_refusals.py::test_all_steps_of_a_training_are_named",
    ),
    # --- stores ---
    Mutation(
        "storage/hub_access",
        "a token goes to any server",
        "if self.token and is_same_server(url, self.endpoint):",
        "if self.token:",
        "test_remote_sources.py::test_a_private_repository_needs_its_token",
    ),
    Mutation(
        "storage/remote_store",
        "what a stranger lists may lead out of a folder",
        "for entry in entries if has_plain_parts(entry.name)}",
        "for entry in entries}",
        "test_remote_sources.py::test_names_that_lead_out_of_a_folder_are_not_there",
    ),
    Mutation(
        "storage/web_client",
        "what has come of a broken answer is lost",
        "buffer[done : done + READ_STEP]",
        "buffer[done:]",
        "test_store_faults.py::test_what_comes_slowly_or_breaks_off_is_read_to_its_end",
    ),
    Mutation(
        "storage/remote_store",
        "a wait that a server tells uses up patience",
        "since = self._since + self._told",
        "since = self._since",
        "test_store_faults.py::test_waits_that_were_told_do_not_use_up_patience",
    ),
    Mutation(
        "storage/s3_requests",
        "an error in an answer of 200 is a success",
        'answer.status in (200, 204) and b"<Error>" not in content',
        "answer.status in (200, 204)",
        "test_target_buckets.py::test_parts_are_put_in_spite_of_faults",
    ),
    Mutation(
        "storage/streamed_uploads",
        "a stream is fed from memory that is filled again",
        "feed(stream, bytes(data[begin : begin + stream.piece_size]))",
        "feed(stream, data[begin : begin + stream.piece_size])",
        "test_target_buckets.py::test_a_stream_is_what_was_put",
    ),
    Mutation(
        "storage/whole_objects",
        "an object of another is taken for ours",
        "return is_again and await get_object(bucket, key) == content",
        "return is_again",
        "test_target_buckets.py::test_an_object_of_another_is_not_taken_for_ours_after_a_lost_answer",
    ),
    Mutation(
        "execution/store_ledger",
        "a part of another content is durable",
        " and found.size == part.size and is_same_etag(found.etag, part.etag)",
        " and found.size == part.size",
        "test_store_resume.py::test_parts_that_the_store_has_lost_are_put_again",
    ),
    Mutation(
        "execution/store_target",
        "a restart throws away before it looks again",
        "others.require_same()  # before anything is thrown away",
        "pass",
        "test_store_resume.py::test_another_job_is_refused_and_begins_again_if_asked_to",
    ),
    Mutation(
        "execution/parts",
        "reads of two source files are joined",
        "if read and read.source_file == piece.source_file and piece.start",
        "if read and piece.start",
        "test_store_targets.py::test_a_store_gets_what_a_folder_gets",
    ),
    Mutation(
        "verification/listed_objects",
        "another ETag is the same object",
        "path.entry.version.strip('\"') != known.etag.strip('\"') or known.size != size",
        "known.size != size",
        "test_verify_in_stores.py::test_damage_is_found_and_its_hint_repairs_nothing",
    ),
    Mutation(
        "formats/archive_ends",
        "an end is read beyond its file",
        "end = min(offset + max(size, READ_AHEAD), self._path.entry.size)",
        "end = offset + max(size, READ_AHEAD)",
        "test_boxes_in_stores.py::test_what_the_ends_do_not_have_is_read_when_it_is_asked_for",
    ),
    Mutation(
        "target/state",
        "a run that ends while we look is overwritten",
        "        is_same = keep_manifests(place.store.list_entries()) == keep_manifests(place.folder.store.entries)",
        "        is_same = True",
        "test_stored_targets.py::test_a_run_that_ends_while_we_look_is_not_overwritten",
    ),
    Mutation(
        "target/left_files",
        "a journal of other ranks is nobody's",
        '    return not list_job_names(read_job(target), "files") <= list_rank_files(read_valid_manifest(target))',
        "    return False",
        "test_stored_targets.py::test_a_journal_of_other_ranks_is_left_to_its_run",
    ),
    Mutation(
        "execution/store_target",
        "a run that gives up throws away the work of another",
        " and not journal.has_other_runs():",
        ":",
        "test_runs_that_meet.py::test_a_run_that_gives_up_leaves_the_work_of_another",
    ),
    Mutation(
        "execution/store_objects",
        "a run that was asleep completes its object",
        "    ledger.journal.require_current()  # else",
        "    pass  # else",
        "test_runs_that_meet.py::test_a_run_that_was_asleep_writes_nothing_over_another_conversion",
    ),
    # --- many machines ---
    Mutation(
        "target/state",
        "a file of a share that was damaged is joined",
        '        path = find_file(state.folder, entry["name"], state.shares)\n',
        '        path = state.folder / entry["name"]\n',
        "test_shares.py::test_a_file_that_was_damaged_in_its_share_is_refused",
    ),
    Mutation(
        "target/shares",
        "a share of another conversion is joined",
        "        if name in whole.manifests.shares and manifest not in whole.same:",
        "        if name in whole.manifests.shares and not manifest:",
        "test_shares.py::test_a_share_of_another_version_is_refused",
    ),
    Mutation(
        "target/shares",
        "the source of a share on another machine is not compared",
        "    if share.fingerprint != found:",
        "    if share.fingerprint and not found:",
        "test_shares.py::test_a_part_of_another_conversion_is_no_share",
    ),
    Mutation(
        "target/shares",
        "a run that was begun without shares is not seen",
        "    if whole.plan.files or restart:",
        "    if restart:",
        "test_shares.py::test_a_run_without_shares_comes_first",
    ),
    Mutation(
        "target/shares",
        "a changed side file of a share is lost",
        '            if path.exists() and compute_path_checksum(path) != entry["xxh3_128"]:',
        "            if not path.exists():",
        "test_shares.py::test_a_side_file_that_somebody_has_changed_in_a_share_is_kept",
    ),
    Mutation(
        "execution/finished_files",
        "manifests go before the files that they vouch for have their names",
        "    for name in names:\n        partial",
        "    remove_files(target, superseded)\n    for name in names:\n        partial",
        "test_shares.py::test_a_crash_while_joining_leaves_what_the_same_command_finishes",
    ),
    Mutation(
        "planning/share_variables",
        "an array of some tasks is taken for all",
        "    is_whole = tasks is not None and (first, last, step) == (0, tasks - 1, 1)",
        "    is_whole = tasks is not None",
        "test_share_variables.py::test_variables_that_tell_no_share",
    ),
    Mutation(
        "planning/share_variables",
        "outside of srun every process is the first",
        "    if tasks > 1:",
        "    if tasks > 10**6:",
        "test_share_variables.py::test_variables_that_tell_no_share",
    ),
    Mutation(
        "target/share_store",
        "a share in a store sees what others have made",
        "if name in self.tensors}",
        "if '/' not in name}",
        "test_stored_shares.py::test_joined_shares_are_one_conversion",
    ),
    Mutation(
        "execution/store_objects",
        "a join loses the ETags of the shares",
        "**others.stored, **etags",
        "**etags",
        "test_stored_shares.py::test_joined_shares_are_one_conversion",
    ),
    Mutation(
        "target/preflight",
        "a run for all and a share that begin at once do not see each other",
        "    look_again_if_changed(replace(whole, place=open_now(whole.place)), look, share)\n",
        "",
        "test_stored_shares.py::test_a_share_and_a_run_for_all_that_begin_at_once_see_each_other",
    ),
    Mutation(
        "execution/lock_files",
        "a lock that was taken over meanwhile is taken over again",
        "if read_lock(self.path) == left:",
        "if left:",
        "test_lock_files.py::test_who_comes_late_to_a_takeover_leaves_the_winner_alone",
    ),
    Mutation(
        "execution/lock_files",
        "a beat is written over the lock of another",
        "if self._is_ours(os.read(descriptor, LARGEST_LOCK)):",
        "if os.read(descriptor, LARGEST_LOCK):",
        "test_lock_files.py::test_a_beat_after_a_takeover_is_written_to_no_lock",
    ),
    Mutation(
        "execution/holders",
        "a process of another machine is gone",
        "if not machine or machine != identify_machine() or process <= 0:",
        "if process <= 0:",
        "test_lock_files.py::test_a_holder_that_may_be_there_is_taken_over_by_its_silence_only",
    ),
    Mutation(
        "formats/share_fingerprints",
        "a task compares other files than it was asked about",
        'if share.fingerprint not in ("", found):',
        "if False:",
        "test_diff_shares.py::test_other_files_on_another_machine_are_refused",
    ),
    Mutation(
        "verification/checked_ranges",
        "a share leaves out its first range",
        "for number in own]",
        "for number in own[1:]]",
        "test_verified_shares.py::test_each_byte_is_compared_by_one_share",
    ),
    Mutation(
        "target/shares",
        "a share of other ranks is of this conversion",
        "        elif files - planned:",
        "        elif False:",
        "test_shares.py::test_shares_of_other_ranks_are_refused",
    ),
    Mutation(
        "execution/finished_files",
        "shares are joined while somebody is at work in them",
        "        lock_journal(stack, folder / JOURNAL)",
        "        pass",
        "test_shares.py::test_a_join_waits_for_whoever_is_at_work_in_a_share",
    ),
    Mutation(
        "execution/execute",
        "who has slept while it made files writes into those of another job",
        "    lock.require_held()\n    for descriptor, file in new:",
        "    for descriptor, file in new:",
        "test_network_targets.py::test_who_wakes_up_while_it_makes_files_writes_into_none_of_another_job",
    ),
    Mutation(
        "execution/side_writer",
        "and into its files beside the tensors",
        "        lock.require_held()  # else",
        "        pass  # else",
        "test_network_targets.py::test_who_wakes_up_while_it_makes_files_writes_into_none_of_another_job",
    ),
    # --- packed weights ---
    Mutation(
        "sources/packed_weights",
        "a weight may lack the order of columns that others have",
        "if word in form.words and ((is_held and are_alike) or is_told):",
        "if word in form.words and is_told:",
        "test_packed_weights.py::test_parts_that_do_not_fit_are_refused_by_name",
    ),
    Mutation(
        "sources/packed_forms",
        "zero points of GPTQ's second format are taken for those of the first",
        'if told == "gptq_v2" else "gptq"',
        'if told == "gptq_v3" else "gptq"',
        "test_packed_weights.py::test_the_format_is_told_in_several_ways",
    ),
    Mutation(
        "casts/unpacking",
        "zero points of integers are left out",
        "zeros = read_zeros_of_rows(packed, top, bottom, inputs)",
        "zeros = None",
        "test_packed_weights.py::test_every_packing_becomes_what_its_library_makes_of_it",
    ),
    Mutation(
        "casts/code_tables",
        "minus zero of DeepSeek's FP4 stays minus zero",
        "minus_zero = -0.0 if keeps_minus_zero else 0.0",
        "minus_zero = -0.0",
        "test_kernels.py::test_minus_zero_of_fp4_is_kept_only_where_it_is_asked_for",
    ),
    Mutation(
        "execution/windows",
        "windows of several files take turns at the strips of a weight",
        "turns = np.argsort(offsets) if is_in_order else",
        "turns = np.argsort(offsets) if False else",
        "test_packed_weights.py::test_strips_are_made_once_for_several_files",
    ),
    Mutation(
        "casts/nvfp4",
        "weights beside each other have factors of their own",
        "inputs.powers[key] = compute_power(cast.beside, inputs)",
        "inputs.powers[key] = compute_power(cast.beside[:1], inputs)",
        "test_nvfp4.py::test_a_span_of_18_beside_each_other_is_refused_with_both_names",
    ),
    Mutation(
        "verification/packed_source",
        "a dropped order of columns is not looked for",
        'PARTS = ("codes", "scales", "zeros", "factor", "order")',
        'PARTS = ("codes", "scales", "zeros", "factor")',
        "test_packed_source.py::test_a_part_that_was_dropped_is_seen",
    ),
    Mutation(
        "target/side_files",
        "the quantizer's own config goes along",
        "elif plan.source.packed and name in QUANTIZATION_FILES:",
        "elif not plan.source and name in QUANTIZATION_FILES:",
        "test_packed_weights.py::test_every_packing_becomes_what_its_library_makes_of_it",
    ),
    Mutation(
        "execution/reader",
        "what a cast reads hides what it computes",
        "        clock.begin(before)\n",
        "        clock.begin(READING)\n",
        "test_times.py::test_a_cast_goes_on_computing_when_it_has_read",
    ),
    Mutation(
        "target/conversion",
        "the bytes of an earlier run count in the rate",
        "return self.plan.size - self.done.resumed if self.done else 0",
        "return self.plan.size if self.done else 0",
        "test_times.py::test_a_run_that_goes_on_tells_its_own_bytes",
    ),
    Mutation(
        "text",
        "what rounding takes from the parts is lost",
        "for place in by_loss[: total - sum(rounded)] if whole else []:",
        "for place in by_loss[:0]:",
        "test_times.py::test_the_summary_tells_times_that_add_up",
    ),
    Mutation(
        "cli/bars",
        "a terminal that shows only lines gets bars",
        "if width < NARROWEST or not has_screen(sys.stdout):",
        "if width < NARROWEST:",
        "test_looks.py::test_a_pipe_and_terminals_without_blocks_have_the_text_alone",
    ),
    Mutation(
        "cli/bars",
        "of many files the largest are left out",
        "-abs(groups[place].size - middle)",
        "groups[place].size",
        "test_looks.py::test_many_files_are_grouped_and_cut_with_a_line_that_says_so",
    ),
    Mutation(
        "pages/plan_facts",
        "a page counts the first copy of a replicated tensor as a cost too",
        "sum((count - 1) * size for _, count, size in parts),",
        "sum(count * size for _, count, size in parts),",
        "test_plan_page.py::test_replicas_are_what_two_files_have_alike",
    ),
    Mutation(
        "pages/markup",
        "names in attributes of a page are not escaped",
        "escape_text(value if isinstance(value, str) else str(value))",
        "value",
        "test_other_pages.py::test_names_of_strangers_do_nothing",
    ),
    Mutation(
        "pages/page_file",
        "a page takes the place of any file",
        "elif os.path.lexists(path) and not is_page(path):",
        "elif os.path.islink(path) and not is_page(path):",
        "test_page_file.py::test_what_cannot_be_written_is_refused_before_the_work",
    ),
    Mutation(
        "pages/plan_drawings",
        "the cells of whichever rank comes first are the usual ones",
        "usual, count = Counter(cells.reshape(-1).tolist()).most_common(1)[0]",
        "usual, count = int(cells[0][-1]), cells.size",
        "test_plan_page.py::test_a_cell_that_differs_is_outlined_and_named",
    ),
    Mutation(
        "pages/diff_cells",
        "a NaN in a cell of a difference has no letter",
        'marks = "N" * any(unusual.nans) + "I" * bool(unusual.infinite)',
        'marks = "I" * bool(unusual.infinite)',
        "test_other_pages.py::test_a_difference_is_drawn_with_letters_and_words",
    ),
    Mutation(
        "errors",
        "what was expected, in a problem, keeps the secrets of an address",
        'for name in ("subject", "found", "expected", "remedy"):',
        'for name in ("subject", "found", "remedy"):',
        "test_secrets_in_addresses.py::test_every_text_of_a_problem_is_without_secrets",
    ),
)


def module_path(folder: Path, module: str) -> Path:
    return folder / "src" / "reshard" / f"{module}.py"


def copy_package(folder: Path) -> None:
    """Without what Python has compiled: it must not be taken for the changed module."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))


def mutate(folder: Path, mutation: Mutation) -> None:
    path = module_path(folder, mutation.module)
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        raise SystemExit(f"{mutation.module}: {mutation.before!r} stands there {text.count(mutation.before)} times")
    path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")


def pytest_path(test: str) -> str:
    """The path by which pytest finds a test that is named by its file alone."""
    file, colons, name = test.partition("::")
    return f"{find_test_file(file)}{colons}{name}"


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """The exit code of pytest with the package in a folder, and what it said. 1 is that of a test that failed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "src"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "temp")]
    try:
        done = subprocess.run(
            [*command, *map(pytest_path, tests)],
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return -1, f"longer than {LONGEST} seconds"
    return done.returncode, done.stdout + done.stderr


def outcome_of(mutation: Mutation) -> str:
    """`caught`, or what came instead."""
    with tempfile.TemporaryDirectory(prefix="reshard-mutation-") as name:
        folder = Path(name)
        copy_package(folder)
        mutate(folder, mutation)
        code, said = run_tests(folder, [mutation.test])
    if code == 1:
        return "caught"
    return "SURVIVED" if code == 0 else f"pytest ended with {code}: {said.strip().splitlines()[-1]}"


def require_good(mutations: list[Mutation]) -> None:
    """Without a fault all tests pass, so that it is the fault that they see."""
    with tempfile.TemporaryDirectory(prefix="reshard-mutation-") as name:
        copy_package(Path(name))
        code, said = run_tests(Path(name), sorted({mutation.test for mutation in mutations}))
    if code:
        raise SystemExit(f"{said}\nthe tests do not pass without a fault either")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="the numbers of some mutations")
    numbers = parser.parse_args().only or range(1, len(MUTATIONS) + 1)
    require_good([MUTATIONS[number - 1] for number in numbers])
    print("| n | module | what is broken | caught by | s |\n|---:|---|---|---|---:|", flush=True)
    others = 0
    for number in numbers:
        mutation, started = MUTATIONS[number - 1], time.monotonic()
        outcome = outcome_of(mutation)
        others += outcome != "caught"
        test = f"`{mutation.test}`" if outcome == "caught" else f"**{outcome}** (`{mutation.test}`)"
        seconds = time.monotonic() - started
        print(f"| {number} | `{mutation.module}` | {mutation.what} | {test} | {seconds:.0f} |", flush=True)
    print(f"\n{len(numbers)} mutations, {len(numbers) - others} caught")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
