"""Random models by a recipe with every split: there and back, over several numbers of ranks, byte for byte."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.convert import Job, convert_checkpoint
from reshard.errors import Refused
from reshard.execute import Settings

RECIPE = """
name = "every split"
about = "one kind of tensor for each"
left = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
carry = ["*token*"]
scales.p = { left = "weight_scale_inv", right = "scale", block = 4 }
scales.q = { left = "weight_scale", right = "weight_scale", block = [1, 8] }
holes.i = { counts = "layers" }
holes.e = { counts = "experts" }
holes.m = { counts = "more layers", after = "i", marker = "model.{m}.marker.weight", like = "i" }
rules = [
["same", "model.embed.weight",             "embed.weight",         "rows"],
["same", "model.{i}.tall.{p}",             "{i}.rows.{p}",         "rows"],
["same", "model.{i}.wide.{p}",             "{i}.columns.{p}",      "columns"],
["same", "model.{i}.same.{p}",             "{i}.all.{p}",          "replicate"],
["same", "model.{i}.norm",                 "{i}.norm.weight",      "replicate"],
["same", "model.{i}.gate_up",              "{i}.packed",           "packed rows"],
["same", "model.{i}.table.{q}",            "{i}.padded.{q}",       "padded rows"],
["same", "model.{i}.heads.{p}",            "{i}.kv.{p}",           "rows of heads"],
["same", "model.{i}.experts.{e}.up.{p}",   "{i}.x.{e}.w1.{p}",     "by e"],
["same", "model.{i}.deep",                 "{i}.cube",             "columns"],
["same", "model.{m}.marker.weight",        "{m}.mark.weight",      "columns"],
]
"""
NUMBERS = (1, 2, 3, 4, 6, 8, 12)
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
        layers=draw(st.sampled_from([1, 2, 11])),
        later=draw(st.integers(0, 1)),
        is_scaled=draw(st.booleans()),
        files=draw(st.integers(1, 4)),
        has_index=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def entries_of(model: Model, random: Random) -> Iterator[Entry]:
    """Sizes that suit 12 ranks, and so all of the numbers; a part is whole blocks of 4, or divides one."""
    yield "model.embed.weight", "BF16", (12 * random.randint(1, 3), random.choice([1, 5]))
    cut, heads = [12 * random.choice([1, 2, 4, 8]) for _ in range(3)], head_sizes(random)
    for layer in range(model.layers + model.later):
        name = f"model.{layer}"
        yield from scaled(f"{name}.tall", (cut[0], random.choice([1, 7])), model, random)
        yield from scaled(f"{name}.wide", (random.choice([1, 2, 9]), cut[1]), model, random)
        yield from scaled(f"{name}.same", (random.choice([0, 1, 6]), 5), model, random)
        yield f"{name}.norm", "F32", random.choice([(), (3,)])
        yield f"{name}.gate_up", "BF16", (2 * cut[2], random.choice([1, 3]))
        yield f"{name}.table.weight", "F8_E4M3", (rows := random.randint(1, 40), 16)
        yield f"{name}.table.weight_scale", "F8_E8M0", (rows, 2)
        yield from scaled(f"{name}.heads", (heads[0] * heads[1], 3), model, random)
        for expert in range(12):
            yield from scaled(f"{name}.experts.{expert}.up", (random.choice([1, 3]), 2), model, random)
        yield f"{name}.deep", "U8", (random.choice([1, 3]), 24, random.choice([1, 5]))
    for layer in range(model.layers, model.layers + model.later):
        yield f"model.{layer}.marker.weight", "BF16", (2, 12)


def head_sizes(random: Random) -> tuple[int, int]:
    """How many heads, and how many rows one has."""
    return random.choice([1, 2, 12]), random.choice([1, 2, 4, 8])


def scaled(name: str, shape: tuple[int, int], model: Model, random: Random) -> Iterator[Entry]:
    yield f"{name}.weight", "F8_E4M3" if model.is_scaled else random.choice(["BF16", "F32"]), shape
    if model.is_scaled:
        yield f"{name}.weight_scale_inv", "F32", (-(-shape[0] // 4), -(-shape[1] // 4))


def write_model(folder: Path, model: Model) -> None:
    """Files as others write them: the tensors in any order, in any file, with any metadata and any spaces."""
    random = Random(model.seed)
    entries = list(entries_of(model, random))
    heads = next(shape[0] for name, _, shape in entries if name.endswith("heads.weight"))
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
    config = {"heads": max(head for head in (1, 2, 12) if heads % head == 0), "is_odd": "é"}
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=random.choice([True, False]), indent=3) + " \n")
    (folder / "token.json").write_bytes(random.randbytes(9))


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
@settings(deadline=None, max_examples=60)
def test_there_and_back_over_any_ranks_is_the_same(model: Model) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "recipe.toml").write_text(RECIPE)
        write_model(folder / "source", model)
        recipe, before, was_cut = str(folder / "recipe.toml"), folder / "source", True
        for number, ranks in enumerate(model.ranks):
            direct, found = folder / f"direct{number}", folder / f"found{number}"
            try:
                convert(Job(folder / "source", ranks, recipe), direct, model)
            except Refused as refused:
                # Heads that neither divide the ranks nor are divided by them, or blocks that straddle.
                assert {problem.kind for problem in refused.problems} <= {"not-divisible", "straddles-blocks"}  # noqa: PT017
                was_cut = False
                continue
            convert(Job(before, ranks, recipe), found, model)
            assert contents(found) == contents(direct)
            convert(Job(found, 1, recipe, to="hf"), folder / "back", model)
            assert contents(folder / "back") == contents(folder / "source")
            shutil.rmtree(folder / "back")
            before = found
        assert was_cut or len(model.ranks) > 1


def convert(job: Job, target: Path, model: Model) -> None:
    convert_checkpoint(job, target, Settings(jobs=1 + model.seed % 3, cache=("yes", "no")[model.seed % 2]))
