"""Random models by a recipe with every split: there and back, over several numbers of ranks, byte for byte."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Job, convert_checkpoint

from reshard.execution.execute import Settings

RECIPE = """
name = "every split"
about = "one kind of tensor for each"
left = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
carry = ["*token*"]
scales.p = { left = "weight_scale_inv", right = "scale", block = 4 }
scales.q = { left = "weight_scale", right = "weight_scale", block = [1, 8] }
placeholders.i = { counts = "layers" }
placeholders.e = { counts = "experts" }
placeholders.m = { counts = "more layers", after = "i", marker = "model.{m}.marker.weight", like = "i" }
rules = [
["same", "model.embed.weight",             "embed.weight",         "rows"],
["same", "model.{i}.tall.{p}",             "l.{i}.rows.{p}",         "rows"],
["same", "model.{i}.wide.{p}",             "l.{i}.columns.{p}",      "columns"],
["same", "model.{i}.same.{p}",             "l.{i}.all.{p}",          "replicate"],
["same", "model.{i}.norm",                 "l.{i}.norm.weight",      "replicate"],
["same", "model.{i}.gate_up",              "l.{i}.packed",           "packed rows"],
["same", "model.{i}.table.{q}",            "l.{i}.padded.{q}",       "padded rows"],
["same", "model.{i}.heads.{p}",            "l.{i}.kv.{p}",           "rows of heads"],
["same", "model.{i}.experts.{e}.up.{p}",   "l.{i}.x.{e}.w1.{p}",     "by e"],
["same", "model.{i}.deep",                 "l.{i}.cube",             "columns"],
["same", "model.{m}.marker.weight",        "l.{m}.mark.weight",      "columns"],
]
"""
NUMBERS = (1, 2, 3, 4, 6, 12)
BITS = {"F8_E4M3": 8, "BF16": 16, "F32": 32, "U8": 8}
Entry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """What a random model is made from; all else is drawn from the seed."""

    ranks: tuple[int, int, int]
    layers: int
    later: int
    is_scaled: bool
    files: int
    has_index: bool
    seed: int


@st.composite
def models(draw: st.DrawFn) -> Model:
    return Model(
        ranks=(draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(NUMBERS))),
        layers=draw(st.sampled_from([1, 1, 11])),
        later=draw(st.integers(0, 1)),
        is_scaled=draw(st.booleans()),
        files=draw(st.integers(1, 4)),
        has_index=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def entries_of(model: Model, head: tuple[int, int], random: Random) -> Iterator[Entry]:
    """Sizes that suit all of the numbers of ranks."""
    yield "model.embed.weight", "BF16", (12 * random.randint(1, 3), random.choice([1, 5]))
    cut = [random.choice(lengths(model)) for _ in range(3)]
    for layer in range(model.layers + model.later):
        name = f"model.{layer}"
        yield from scaled(f"{name}.tall", (cut[0], random.choice([1, 7])), model, random)
        yield from scaled(f"{name}.wide", (random.choice([1, 2, 9]), cut[1]), model, random)
        yield from scaled(f"{name}.same", (random.choice([0, 1, 6]), 5), model, random)
        yield f"{name}.norm", "F32", random.choice([(), (3,)])
        yield f"{name}.gate_up", "BF16", (2 * cut[2], random.choice([1, 3]))
        yield f"{name}.table.weight", "F8_E4M3", (rows := random.randint(1, 40), 16)
        yield f"{name}.table.weight_scale", "F8_E8M0", (rows, 2)
        yield from scaled(f"{name}.heads", (head[0] * head[1], 3), model, random)
        for expert in range(12):
            yield from scaled(f"{name}.experts.{expert}.up", (random.choice([1, 3]), 2), model, random)
        yield f"{name}.deep", "U8", (random.choice([1, 3]), 24, random.choice([1, 5]))
    for layer in range(model.layers, model.layers + model.later):
        yield f"model.{layer}.marker.weight", "BF16", (2, 12)


def suits(parts: Iterable[int]) -> bool:
    """Whether parts of these lengths are whole blocks of 4, or divide one."""
    return all(part and (part % 4 == 0 or 4 % part == 0) for part in parts)


def lengths(model: Model) -> list[int]:
    """Those that suit all ranks; 48 suits any."""
    return [
        length
        for length in (12, 24, 36, 48, 96)
        if all(length % ranks == 0 for ranks in model.ranks) and suits(length // ranks for ranks in model.ranks)
    ]


def heads(model: Model) -> list[tuple[int, int]]:
    """How many there can be, and how many rows one has: they divide the ranks, or the ranks divide them."""
    return [
        (count, rows)
        for count, rows in product((1, 2, 3, 12), (1, 2, 4, 8))
        if all(count % ranks == 0 or ranks % count == 0 for ranks in model.ranks)
        and suits(rows * max(count // ranks, 1) for ranks in model.ranks)
    ]


def scaled(name: str, shape: tuple[int, int], model: Model, random: Random) -> Iterator[Entry]:
    yield f"{name}.weight", "F8_E4M3" if model.is_scaled else random.choice(["BF16", "F32"]), shape
    if model.is_scaled:
        yield f"{name}.weight_scale_inv", "F32", (-(-shape[0] // 4), -(-shape[1] // 4))


def write_model(folder: Path, model: Model) -> None:
    """Files as others write them: the tensors in any order, in any file, with any metadata and any spaces."""
    random = Random(model.seed)
    head = random.choice(heads(model))
    entries = list(entries_of(model, head, random))
    random.shuffle(entries)
    folder.mkdir()
    names = [f"model-{number:05}-of-{model.files:05}.safetensors" for number in range(1, model.files + 1)]
    places = [random.randrange(model.files) for _ in entries]
    for number, name in enumerate(names):
        write_file(
            folder / name, [entry for entry, place in zip(entries, places, strict=True) if place == number], random
        )
    if model.has_index:
        weight_map = {entry[0]: names[place] for entry, place in zip(entries, places, strict=True)}
        metadata = random.choice([{}, {"total_size": 7}, {"total_parameters": 3, "total_size": 9}])
        text = json.dumps({"weight_map": weight_map, "metadata": metadata}, indent=random.choice([None, 1, 4]))
        # Whoever names a file in the index names one with a tensor in it.
        if set(weight_map.values()) == set(names):
            (folder / "model.safetensors.index.json").write_text(text)
    config = {"heads": head[0], "is_odd": "é"}
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=random.choice([True, False]), indent=3) + " \n")
    (folder / "token.txt").write_bytes(random.randbytes(9))


def write_file(path: Path, entries: list[Entry], random: Random) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "é": "ß"}} if random.random() < 0.5 else {}
    end = 0
    for name, dtype, shape in entries:
        size = prod(shape) * BITS.get(dtype, 8) // 8
        header[name] = {"shape": shape, "dtype": dtype, "data_offsets": [end, end + size]}
        end += size
    if random.random() < 0.5:
        header = dict(sorted(header.items()))
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * random.randint(0, 9)
    path.write_bytes(len(text).to_bytes(8, "little") + text + random.randbytes(end))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "reshard.json"}


@given(models())
@settings(max_examples=20)
def test_there_and_back_over_any_ranks_is_the_same(model: Model) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "recipe.toml").write_text(RECIPE)
        write_model(folder / "source", model)
        recipe, before = str(folder / "recipe.toml"), folder / "source"
        for number, ranks in enumerate(model.ranks):
            found = folder / f"found{number}"
            convert(Job(before, ranks, recipe), found, model)
            if number:
                convert(Job(folder / "source", ranks, recipe), folder / f"direct{number}", model)
                assert contents(found) == contents(folder / f"direct{number}")
            before = found
        convert(Job(before, 1, recipe, to="hf"), folder / "back", model)
        assert contents(folder / "back") == contents(folder / "source")


def convert(job: Job, target: Path, model: Model) -> None:
    convert_checkpoint(job, target, Settings(jobs=1 + model.seed % 3, cache=("yes", "no")[model.seed % 2]))
