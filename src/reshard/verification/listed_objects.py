"""Compares what a store lists of a target with what it told when that was written: sizes and ETags. Reads no tensor.

What is uploaded with other bytes gets another ETag. So this finds what was replaced, removed or cut short; not what a
store gives back otherwise than it took it.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath

from reshard.errors import Problem, refuse
from reshard.formats.store_record import StoredObject, read_store_record
from reshard.formats.target_names import STORE_RECORD
from reshard.paths import AnyPath, RemotePath
from reshard.verification.checksums import Audit, find_audited_files, list_set_problems, make_audit_report
from reshard.verification.manifest_files import read_file_size
from reshard.verification.report import Report
from reshard.verification.target_folder import COPY_AGAIN_HINT, LOST_FILE_HINT, PUT_AGAIN_HINT

CHECKSUMS_ONLY = "--checksums-only"

BUCKETS = ("s3://", "gs://", "az://")
"""The stores that are written to, and tell an ETag then."""

READ_INSTEAD = f"leave {CHECKSUMS_ONLY} out: then the files are read, and compared with the manifest"

OTHER_UPLOAD_HINT = (
    f"it was uploaded again, perhaps with the same bytes: verify without {CHECKSUMS_ONLY} reads it; "
    f"if it differs, {PUT_AGAIN_HINT}"
)


def compare_listing(target: AnyPath, ranks: Collection[int] | None = None) -> Report:
    """Compares names, sizes and ETags of the objects of a target with its manifest and its record; with `ranks`, of the
    files of these only. Raises Refused if it is in no bucket, or has no record.
    """
    if not isinstance(target, RemotePath) or not str(target).startswith(BUCKETS):
        expected = f"a target in a store that reshard writes to: {', '.join(BUCKETS)}"
        raise refuse("wrong-option", CHECKSUMS_ONLY, f"with {target}, which has no such record", expected, READ_INSTEAD)
    audit = find_audited_files(target, ranks)
    record = read_store_record(target)
    if record is None:
        expected = "what the store told of each object when it was written"
        raise refuse("no-record", str(target), f"no {STORE_RECORD}", expected, READ_INSTEAD)
    problems = [*list_set_problems(audit), *check_objects(audit, record)]
    return make_audit_report(audit, problems, is_unread=True)


def check_objects(audit: Audit[RemotePath], record: Mapping[str, StoredObject]) -> Iterator[Problem]:
    """Reports side files of another size, and objects with another ETag than they were written with; of tensor files
    those that are there with their size.
    """
    sides = [(PurePath(entry["name"]).name, int(entry["size"])) for entry in audit.manifest["side_files"]]
    for name, size in (*((entry.name, entry.size) for entry in audit.full), *sides):
        path = audit.target / name
        found, known = read_file_size(path), record.get(name)
        if found is None:
            yield Problem("missing-file", name, "no such file", f"{size:,} bytes", LOST_FILE_HINT)
        elif found != size:
            yield Problem("wrong-size", name, f"{found:,} bytes", f"{size:,} bytes", COPY_AGAIN_HINT)
        elif known is None or not known.etag:
            yield Problem("no-record", name, f"no ETag in {STORE_RECORD}", "that of its upload", READ_INSTEAD)
        elif path.entry.version.strip('"') != known.etag.strip('"') or known.size != size:
            listed = f"ETag {path.entry.version or 'none'}, {found:,} bytes"
            expected = f"ETag {known.etag}, {known.size:,} bytes, as it was uploaded"
            yield Problem("other-upload", name, listed, expected, OTHER_UPLOAD_HINT)
