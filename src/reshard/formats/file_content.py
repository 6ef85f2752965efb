"""Names the content of a file by its first bytes: a web page, an error of a server, a pickle, zeros that never came."""

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from reshard.errors import refuse
from reshard.paths import AnyPath, RemotePath
from reshard.storage.addresses import WRITTEN

LENGTH_SIZE = 8
"""In bytes: fewer may be the rest of any file."""

LOOKED_AT = 4096
"""In bytes, from the beginning of a file."""

SHOWN_TEXT = 60
"""In characters."""


class ForeignContent(NamedTuple):
    """The content of a file that is not what its name says."""

    kind: str
    """Of the problem."""
    name: str
    """Such as `a web page`."""
    remedy: str


GATED = "for a gated or private model, with a token (hf auth login)"

PAGE_AGAIN = f"download it again: take /resolve/ in the place of /blob/ in its address; {GATED}"

TEXT_AGAIN = f"download it again: check the name and the revision in its address; {GATED}"

UPLOAD_AGAIN = "it lies so in the bucket: upload the sound file again, in its place"

NEVER_CAME = "download it again: its room was reserved, but its data never came"

PICKLE_REMEDY = "download the file of this name again; pickles are not read: save the model as safetensors first"

ARCHIVE_REMEDY = "unpack it; or download the file of this name again"

NAME_REMEDY = "download the file of this name again; a file of this format is not read"

SIGNATURES: Mapping[bytes, tuple[str, str]] = {
    b"PK\3\4": ("a zip archive, as torch.save writes one: weights as pickles under another name", PICKLE_REMEDY),
    b"\x80\2": ("a pickle, as torch.save writes one", PICKLE_REMEDY),
    b"\x80\3": ("a pickle of Python", PICKLE_REMEDY),
    b"\x80\4": ("a pickle of Python", PICKLE_REMEDY),
    b"\x80\5": ("a pickle of Python", PICKLE_REMEDY),
    b"GGUF": ("a GGUF file, the format of llama.cpp", NAME_REMEDY),
    b"\x89HDF\r\n": ("an HDF5 file, such as Keras writes", NAME_REMEDY),
    b"\x93NUMPY": ("an array of numpy", NAME_REMEDY),
    b"\x1f\x8b": ("compressed by gzip", ARCHIVE_REMEDY),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", ARCHIVE_REMEDY),
    b"\xfd7zXZ": ("compressed by xz", ARCHIVE_REMEDY),
    b"7z\xbc\xaf": ("a 7z archive", ARCHIVE_REMEDY),
}
"""By the first bytes of a file: its name, and the hint."""

PAGE = re.compile(r"<(?:!doctype|html|head|body|script|meta)\b", re.IGNORECASE)

TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)


def may_be_safetensors(beginning: bytes) -> bool:
    """Whether a file begins with a length and an object, as every safetensors file does."""
    return beginning[4:9] == b"\0\0\0\0{"


def identify_content(beginning: bytes) -> ForeignContent | None:
    """Identifies a file that should be safetensors and is another thing; None if that cannot be told."""
    if may_be_safetensors(beginning):
        return None
    if len(beginning) > LENGTH_SIZE and not beginning.strip(b"\0"):
        return ForeignContent("unfinished-download", f"zeros only, in its first {len(beginning):,} bytes", NEVER_CAME)
    for signature, (name, remedy) in SIGNATURES.items():
        if beginning.startswith(signature) and len(beginning) > LENGTH_SIZE:
            return ForeignContent("other-format", name, remedy)
    page = beginning.decode(errors="replace").lstrip("\ufeff\t\r\n ")
    if PAGE.match(page):  # in any encoding
        title = TITLE.search(page)
        named = f": {shorten_text(title[1])}" if title and title[1].strip() else ""
        return ForeignContent("wrong-download", f"a web page{named}", PAGE_AGAIN)
    text = decode_text(beginning)
    if text is None:
        return None
    return ForeignContent("wrong-download", f"a text: {shorten_text(text)}", TEXT_AGAIN)


def choose_remedy(path: AnyPath, content: ForeignContent) -> str:
    """The hint for a file of another content. An object of a bucket is not a download that went wrong here."""
    is_stored = isinstance(path, RemotePath) and str(path).partition(":")[0] in WRITTEN
    return UPLOAD_AGAIN if is_stored and content.kind != "other-format" else content.remedy


def require_safetensors_content(path: AnyPath, beginning: bytes) -> None:
    """Raises Refused if the first bytes of a file show that it is another thing than safetensors."""
    if content := identify_content(beginning):
        raise refuse(content.kind, str(path), content.name, "a safetensors file", choose_remedy(path, content))


def require_json_content(path: AnyPath, beginning: bytes) -> None:
    """Raises Refused if a file that does not parse as JSON is known to be another thing."""
    content = identify_content(beginning)
    if content and not beginning.lstrip().startswith((b"{", b"[")):
        raise refuse(content.kind, str(path), content.name, "JSON", choose_remedy(path, content))


COMMENT = (b"//", b"/*", b"#")
"""So begin notes that some people write into JSON, above all else."""

TOKENIZER_ENDINGS = (".model", ".tiktoken")


def require_side_content(path: AnyPath, beginning: bytes) -> None:
    """Raises Refused if the first LOOKED_AT bytes of a file that goes along with a checkpoint show that it is another
    thing: of JSON, whatever is none; of a tokenizer, a web page.
    """
    name, start = path.name.lower(), beginning.removeprefix(codecs.BOM_UTF8).lstrip()
    if name.endswith(".json"):
        value = parse_short(beginning)
        if isinstance(value, dict):
            require_no_answer(path, value)
        if value is None and not start.startswith(COMMENT):
            require_json_content(path, start)
    elif name.endswith(TOKENIZER_ENDINGS) and PAGE.match(start.decode(errors="replace")):
        require_json_content(path, start)


def parse_short(beginning: bytes) -> Any:
    """The value of a JSON file that is no longer than this; None if it is longer, or no JSON."""
    try:
        return json.loads(beginning)
    except (ValueError, RecursionError):
        return None


ANSWER = {"error", "errors", "message", "detail", "details"}

ANSWER_BESIDE = {"status", "statuscode", "code", "requestid", "request_id", "success", "data", "type"}
"""Keys that stand beside those of ANSWER in the answers of the hubs."""


def require_no_answer(path: AnyPath, value: Mapping[str, Any]) -> None:
    """Raises Refused if a JSON object is the answer of a server that did not have the file."""
    keys = {key.lower() for key in value}
    if keys & ANSWER and keys <= ANSWER | ANSWER_BESIDE:
        said = next(value[key] for key in value if key.lower() in ANSWER)
        found = f"an error of the server: {shorten_text(str(said))}"
        raise refuse("wrong-download", str(path), found, "the file itself", TEXT_AGAIN)


def decode_text(beginning: bytes) -> str | None:
    """Decodes the beginning of a text in UTF-8, which may end within a character; None for other bytes."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(beginning)
    except UnicodeDecodeError:
        return None
    text = text.lstrip()
    return text if text and all(letter.isprintable() or letter.isspace() for letter in text) else None


def shorten_text(text: str) -> str:
    """Shortens a text to one line of SHOWN_TEXT characters."""
    line = " ".join(text[: 10 * SHOWN_TEXT].split())
    return line if len(line) <= SHOWN_TEXT else line[:SHOWN_TEXT] + "..."
