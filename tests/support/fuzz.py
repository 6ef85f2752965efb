"""Coverage-guided fuzzing of everything that reads what strangers wrote: `make fuzz`.

Each target is a function of bytes from which only `Refused` may come out. It needs atheris, in this file alone; the
seeds that it found are in tests/seeds, and test_hostile.py runs the targets over them without it.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from math import prod
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from xxhash import xxh3_64_digest, xxh3_128_hexdigest

from reshard.errors import Refused
from reshard.execution.journal import BATCH_COUNT, RECORD, list_left_files, read_batches
from reshard.formats.boxed_folder import read_boxed
from reshard.formats.boxes import BoxedCheckpoint
from reshard.formats.huggingface import CONFIG, INDEX
from reshard.formats.json_input import MAX_INTEGER
from reshard.formats.safetensors import BITS, LENGTH_SIZE, MAX_DIMENSIONS, parse_header, read_header_length
from reshard.formats.target_names import JOURNAL, MANIFEST
from reshard.recipes.recipe import load_recipe, parse_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.match import match
from reshard.types import Checkpoint, Tensor
from reshard.verification.checksums import audit_target

SEEDS = Path(__file__).parents[1] / "seeds"
DISTCP_METADATA, DISTCP = ((SEEDS / name / "whole").read_bytes() for name in ("distcp", "archive"))
"""A save of two small tensors by torch."""
FILES = {"a.safetensors": save({"a": np.ones(2)}), "b.safetensors": save({"b": np.ones(3), "c": np.ones(1)})}
INSTRUMENTED = (
    "reshard.execution.journal",
    "reshard.formats.dcp_safetensors",
    "reshard.formats.slice_names",
    "reshard.formats.distcp",
    "reshard.formats.distcp_metadata",
    "reshard.formats.huggingface",
    "reshard.formats.index",
    "reshard.formats.inert_pickle",
    "reshard.formats.json_input",
    "reshard.formats.manifest",
    "reshard.formats.numbering",
    "reshard.formats.pickle_machine",
    "reshard.formats.safetensors",
    "reshard.formats.torch_archives",
    "reshard.recipes.patterns",
    "reshard.recipes.recipe",
    "reshard.sources.completeness",
    "reshard.sources.match",
    "reshard.verification.checksums",
    "tomllib._parser",
    "json.decoder",
)
LIMITS = ("-rss_limit_mb=1024", "-timeout=10", "-max_len=8192")

KNOWN = load_recipe("deepseek-v3")

Target = Callable[[bytes], None]


def header(data: bytes) -> None:
    """Two bytes say how much data follows; the rest is the text. What safetensors refuses, we refuse."""
    data_size, text = int.from_bytes(data[:2], "little"), data[2:]
    size = LENGTH_SIZE + len(text) + data_size
    with suppress(Refused):
        read_header_length(data[:LENGTH_SIZE], size, "x")
    theirs = by_safetensors(len(text).to_bytes(LENGTH_SIZE, "little") + text + bytes(data_size))
    try:
        found = parse_header(text, 0, size, "x")
    except Refused as refused:
        if theirs is not None and not is_stricter(text):
            print(f"we refuse what safetensors takes: {text!r}: {refused}", file=sys.stderr)
        return
    assert theirs == {tensor.name: (tensor.dtype, tensor.shape, tensor.size) for tensor in found}


def by_safetensors(content: bytes) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    """Name -> dtype, shape and size in bytes, or None if the package refuses the file."""
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), len(entry["data"])) for name, entry in found}


def is_stricter(text: bytes) -> bool:
    """Whether a header that safetensors takes is one of those that docs/format.md says we refuse."""
    strict = False

    def of_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal strict
        strict |= len(dict(pairs)) != len(pairs)
        return dict(pairs)

    found = json.loads(text, object_pairs_hook=of_pairs)
    strict |= found.pop("__metadata__", {}) is None
    for entry in found.values():
        shape = entry["shape"]
        strict |= len(entry) != 3 or len(shape) > MAX_DIMENSIONS or any(length > MAX_INTEGER for length in shape)
    return strict


def index(data: bytes) -> None:
    """The index of a folder that is right."""
    with folder(FILES | {INDEX: data}) as place, suppress(Refused):
        assert read_checkpoint(place).tensors.keys() == {"a", "b", "c"}


def config(data: bytes) -> None:
    """The config of a checkpoint that lacks most: what it says must lead to a refusal whatever it is."""
    with folder(FILES | {CONFIG: data}) as place, suppress(Refused):
        read = read_checkpoint(place).config
        names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
        tensors = {name: Tensor(name, "BF16", (2, 2), 0, 0, 8) for name in names}
        match(Checkpoint(place, (), tensors, read), KNOWN)


def names(data: bytes) -> None:
    """Tensor names, one a line, under a packaged recipe."""
    tensors = {
        name: Tensor(name, "BF16", (2, 2), 0, 0, 8) for name in data.decode(errors="surrogateescape").split("\n")
    }
    with suppress(Refused):
        match(Checkpoint(Path("x"), (), tensors, None), KNOWN)


def recipe(data: bytes) -> None:
    with suppress(Refused):
        parse_recipe(data.decode(errors="replace"), "x.toml")


def journal(data: bytes) -> None:
    """A journal after its first line; once more with right checksums, so that what lies behind them is reached."""
    for content in (data, with_checksums(data)):
        with suppress(Refused):
            records, end = read_batches(content, 0, Path("x"))
            assert len(records) % RECORD.size == 0
            assert end <= len(content)
    with folder({JOURNAL: data}) as place:
        assert list_left_files(place) <= {path.name for path in place.iterdir()}


def with_checksums(data: bytes) -> bytes:
    count = len(data) // RECORD.size
    batch = BATCH_COUNT.pack(count) + data[: count * RECORD.size]
    return batch + xxh3_64_digest(batch) + data[count * RECORD.size :]


def manifest(data: bytes) -> None:
    """A manifest as it is, and with its own checksum put right, as whoever wrote it could."""
    for content in (data, with_own_checksum(data)):
        with folder(FILES | {MANIFEST: content}) as place, suppress(Refused):
            audit_target(place)


def with_own_checksum(data: bytes) -> bytes:
    try:
        found = json.loads(data)
        found.pop("xxh3_128", None)
        text = json.dumps(found, sort_keys=True).encode()
        return json.dumps({**found, "xxh3_128": xxh3_128_hexdigest(text)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def distcp(data: bytes) -> None:
    """`.metadata` of a save of two tensors."""
    with folder({".metadata": data, "__0_0.distcp": DISTCP}) as place, suppress(Refused):
        boxed = read_boxed(place)
        assert boxed is not None
        require_boxes_inside(boxed)


def archive(data: bytes) -> None:
    """The file of that save, with metadata that are right."""
    with folder({".metadata": DISTCP_METADATA, "__0_0.distcp": data}) as place, suppress(Refused):
        boxed = read_boxed(place)
        assert boxed is not None
        assert boxed.boxes.keys() == {"a", "b"}
        require_boxes_inside(boxed)


def slices(data: bytes) -> None:
    """The places of two slices, in the header of their file."""
    text = data.decode(errors="replace")
    tensors = {"a": np.ones((2, 3)), "b": np.ones(1)}
    content = save(tensors, {"DCP_SHARDING_INFO": text, "DCP_VERSION": "1.0"})
    with folder({"shard-00001-model-00001-of-00001.safetensors": content}) as place, suppress(Refused):
        boxed = read_boxed(place)
        assert boxed is not None
        require_boxes_inside(boxed)


def require_boxes_inside(boxed: BoxedCheckpoint) -> None:
    for boxes in boxed.boxes.values():
        for part, offsets in boxes:
            assert 0 <= part.offset <= part.offset + part.size <= boxed.files[part.file].size
            assert len(offsets) == len(part.shape)
            assert part.size == prod(part.shape) * BITS[part.dtype] // 8


# What JSON and TOML are made of: so that a change gives the next word oftener than a broken text.

WORD = re.compile(rb'"(?:[^"\\]|\\.)*"|[A-Za-z_]+|-?[0-9.]+|\s+|.', re.DOTALL)
WORDS = [
    *(b"{", b"}", b"[", b"]", b":", b",", b"\n", b"=", b'""', b"{}", b"[]", b"null", b"true", b"NaN", b"1.0", b"-1"),
    *(b"0", b"1", b"2", b"8", b"16", b"4294967296", b"9223372036854775808", b"1" * 40, b"[" * 900, b"." * 2000, b"1e9"),
    *(b'"\\ud800"', b'"\\u001b[31m"', b'".."', b'"../x.safetensors"', b'"\\u0000"', b"\xff", b"{i}", b"{*}"),
]  # fmt: skip


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Every other time a word is put in, taken out, doubled or replaced; else whatever libFuzzer does to bytes."""
    dice = random.Random(seed)
    if dice.random() < 0.5:
        mutated: bytes = import_module("atheris").Mutate(data, most)
        return mutated
    words = WORD.findall(data)
    for _ in range(dice.randint(1, 4)):
        begin = dice.randint(0, len(words))
        end = min(len(words), begin + dice.choice((0, 0, 1, 1, 1, 3, 9)))
        put = dice.choice(([], [dice.choice(WORDS)], words[begin:end] * 2, [dice.choice(words or WORDS)]))
        words[begin:end] = put
    return b"".join(words)[:most]


@contextmanager
def folder(files: dict[str, bytes]) -> Iterator[Path]:
    """In memory, where there is such a place."""
    place = Path("/dev/shm")  # noqa: S108 - not a name that another could take
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (header, index, config, names, recipe, journal, manifest, distcp, archive, slices)
}


def instrument(module: ModuleType, instrument_function: Callable[[FunctionType], FunctionType]) -> None:
    """Lets the fuzzer see which branches the functions of a module take."""
    for value in vars(module).values():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            instrument_function(value)


def main() -> None:
    """Fuzzes one target. A crash leaves its input as `crash-...` in the folder of the corpus."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), help="a folder that grows")
    options = parser.parse_args()
    atheris = import_module("atheris")
    for name in INSTRUMENTED:
        instrument(import_module(name), atheris.instrument_func)
    corpus = options.corpus / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in (SEEDS / options.target).glob("*"):
        shutil.copy(seed, corpus)
    limits = [*LIMITS, f"-max_total_time={options.seconds}", f"-artifact_prefix={corpus}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], TARGETS[options.target], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
