"""Subsets: some layers and experts of a checkpoint, against checkpoints pruned with torch; chosen tensors."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import oracle_families
import pytest
import torch
from checkpoints import write_deepseek_v3
from conversions import ORACLES, require_equal
from families import FAMILIES
from jobs import Job, convert_checkpoint, plan_conversion
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from reshard.cli.main import main
from reshard.errors import Problem, Refused
from reshard.execution.execute import Settings, identify_job
from reshard.formats.manifest import compute_manifest_checksum
from reshard.recipes.recipe import FAMILIES_FOLDER, load_recipe
from reshard.sources.pruned_config import prune_config
from reshard.storage.local import CACHED, PAGE, ReadableFile, allocate_aligned
from reshard.synthetic import DEEPSEEK_V2_LITE, list_tensors, write_tensors
from reshard.types import File, Subset, Tensor
from reshard.verification.compared_files import ComparedFiles, OpenedFiles

V2_LITE = {
    **DEEPSEEK_V2_LITE,
    "hidden_size": 40,
    "intermediate_size": 72,
    "kv_lora_rank": 24,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "num_hidden_layers": 5,
    "vocab_size": 272,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v2-lite": V2_LITE,
    **{name: family.small for name, family in FAMILIES.items()},
    "deepseek-v3": {**FAMILIES["deepseek-v3"].small, "n_group": 2, "topk_group": 2, "num_nextn_predict_layers": 1},
    "deepseek-v4-flash-vision": {
        **FAMILIES["deepseek-v4-flash-vision"].small,
        "dspark_target_layer_ids": [3, 4],
    },
}
Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """The small checkpoint of a family, written once; V3 with groups that eight experts can be in."""
    root = tmp_path_factory.mktemp("sources")

    def of(name: str) -> Path:
        if not (root / name).exists():
            config = CONFIGS[name]
            tensors = FAMILIES[name].tensors(config) if name in FAMILIES else list_tensors(config)
            write_tensors(root / name, tensors, config, 4)
        return root / name

    return of


@dataclass(frozen=True)
class Case:
    """What is chosen of a family, and what the config must then say otherwise."""

    name: str
    config: Mapping[str, Any]
    layers: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    ranks: int = 2

    @property
    def subset(self) -> Subset:
        return Subset(
            None if self.layers is None else tuple(self.layers),
            None if self.experts is None else tuple(self.experts),
            renumber=any(chosen and chosen[-1] >= len(chosen) for chosen in (self.layers, self.experts)),
        )

    def __str__(self) -> str:
        return f"{self.name} {self.layers or ''} {self.experts or ''}"


FLASH = CONFIGS["deepseek-v4-flash"]["compress_ratios"]
DENSE = "first_k_dense_replace"
CASES = [
    Case("deepseek-v3", {"num_hidden_layers": 4, DENSE: 4}, layers=range(4)),
    Case("deepseek-v3", {"num_hidden_layers": 10}, layers=range(10)),
    Case("deepseek-v3", {"num_hidden_layers": 3, DENSE: 1}, layers=[2, 9, 10]),
    Case("deepseek-v3", {"n_routed_experts": 8}, experts=range(8), ranks=4),
    Case("deepseek-v3", {"n_routed_experts": 8}, experts=range(5, 13)),
    Case("deepseek-v3", {"n_routed_experts": 8}, experts=[0, 1, 3, 6, 10, 11, 12, 15]),
    Case("deepseek-v3", {"num_hidden_layers": 2, DENSE: 0, "n_routed_experts": 4}, [9, 10], [0, 2, 4, 15]),
    Case("deepseek-v2-lite", {"num_hidden_layers": 2, DENSE: 1}, layers=range(2)),
    Case("deepseek-v2-lite", {"num_hidden_layers": 2, DENSE: 0, "n_routed_experts": 8}, [1, 4], range(0, 16, 2)),
    Case("deepseek-v3.2", {"num_hidden_layers": 3, DENSE: 1}, layers=[0, 9, 10]),
    Case("kimi-k2", {"num_hidden_layers": 3, DENSE: 1, "n_routed_experts": 6}, [3, 9, 10], [1, 2, 3, 7, 8, 9]),
    Case(
        "deepseek-v4-flash",
        {"num_hidden_layers": 4, "compress_ratios": [*FLASH[:4], *FLASH[11:]]},
        layers=range(4),
        ranks=4,
    ),
    Case(
        "deepseek-v4-flash",
        {"num_hidden_layers": 4, "num_hash_layers": 1, "compress_ratios": [FLASH[n] for n in (2, 4, 7, 10, 11)]},
        layers=[2, 4, 7, 10],
    ),
    Case(
        "deepseek-v4-flash",
        {
            "num_hidden_layers": 2,
            "num_hash_layers": 0,
            "compress_ratios": [FLASH[n] for n in (3, 10, 11)],
            "n_routed_experts": 6,
        },
        [3, 10],
        [0, 1, 2, 3, 10, 11],
    ),
    Case(
        "deepseek-v4-flash-0731",
        {
            "num_hidden_layers": 4,
            "compress_ratios": [0, *CONFIGS["deepseek-v4-flash-0731"]["compress_ratios"][2:]],
            "num_hash_layers": 2,
            "dspark_target_layer_ids": [1, 2, 3],
        },
        layers=[0, 2, 3, 4],
    ),
    Case(
        "deepseek-v4-flash-vision",
        {
            "num_hidden_layers": 2,
            "compress_ratios": CONFIGS["deepseek-v4-flash-vision"]["compress_ratios"][3:],
            "num_hash_layers": 0,
            "dspark_target_layer_ids": [0, 1],
            "n_routed_experts": 8,
        },
        [3, 4],
        range(1, 9),
    ),
    Case(
        "glm-5.2-fp8",
        {
            "num_hidden_layers": 4,
            DENSE: 3,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"],
            "indexer_types": ["full"] * 3 + ["shared"],
            "n_routed_experts": 8,
        },
        [0, 1, 2, 9],
        range(8),
    ),
]


def pruned(source: Path, folder: Path, case: Case) -> None:
    """Writes what is left of a checkpoint, in one file: with torch, and the config by hand."""
    tensors = oracle.load_tensors(source, ())
    config = oracle.read_config(source)
    count = config["num_hidden_layers"]
    layers = list(range(count)) if case.layers is None else list(case.layers)
    left: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        new, value = name, tensor
        if found := re.match(r"((?:model\.)?layers\.)(\d+)(\..*)", name):
            number = int(found[2])
            if number < count and number not in layers:
                continue
            number = layers.index(number) if number < count else number - count + len(layers)
            new = f"{found[1]}{number}{found[3]}"
        if case.experts is not None:
            if found := re.match(r"(.*\.experts\.)(\d+)(\..*)", new):
                if int(found[2]) not in case.experts:
                    continue
                new = f"{found[1]}{list(case.experts).index(int(found[2]))}{found[3]}"
            if re.search(r"\.gate\.(weight|bias|bias_vl|e_score_correction_bias)$", new):
                value = tensor[list(case.experts)].contiguous()
        left[new] = value
    folder.mkdir()
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, **case.config}))
    for path in source.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())


def oracle_of(name: str) -> Callable[[Path, Path, int], None]:
    if name == "deepseek-v2-lite":
        return oracle.convert
    return oracle_families.convert_v3 if name == "deepseek-v3" else ORACLES[name]


def require_equal_ranks(wanted: Path, found: Path) -> None:
    """The same rank files, byte for byte, and run configurations."""
    names = sorted(path.name for path in wanted.iterdir() if path.name != "reshard.json")
    assert "run_config.json" in names
    for name in names:
        assert (wanted / name).read_bytes() == (found / name).read_bytes(), name


def kinds(refused: pytest.ExceptionInfo[Refused]) -> set[str]:
    return {problem.kind for problem in refused.value.problems}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "reshard.json").read_text())
    return found


def loaded_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """With experts one after the other, which any width suits; and what was missing or too much."""
    load: Any = DeepseekV3ForCausalLM.from_pretrained
    model, loaded = load(folder, output_loading_info=True, experts_implementation="eager")
    return model, loaded


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is written ---


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_subset_is_converted_as_the_oracle_converts_a_pruned_checkpoint(
    case: Case, source: Write, tmp_path: Path
) -> None:
    pruned(source(case.name), tmp_path / "pruned", case)
    oracle_of(case.name)(tmp_path / "pruned", tmp_path / "wanted", case.ranks)
    convert_checkpoint(Job(source(case.name), case.ranks, subset=case.subset), tmp_path / "found")
    require_equal(tmp_path / "wanted", tmp_path / "found")
    convert_checkpoint(Job(tmp_path / "pruned", case.ranks), tmp_path / "whole")
    name = "run_config.json"
    assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_subset_in_the_layout_of_the_source_is_the_pruned_checkpoint(
    case: Case, source: Write, tmp_path: Path
) -> None:
    pruned(source(case.name), tmp_path / "pruned", case)
    convert_checkpoint(Job(source(case.name), 1, to="hf", subset=case.subset), tmp_path / "found")
    wanted, found = (oracle.load_tensors(tmp_path / folder, ()) for folder in ("pruned", "found"))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.view(torch.uint8).reshape(-1), found[name].view(torch.uint8).reshape(-1)), name
    assert oracle.read_config(tmp_path / "found") == oracle.read_config(tmp_path / "pruned")


@pytest.mark.parametrize(
    "name", ["deepseek-v2-lite", "deepseek-v3", "kimi-k2", "deepseek-v4-flash", "deepseek-v4.1-flash"]
)
def test_all_layers_and_all_experts_are_the_whole_checkpoint(name: str, source: Write, tmp_path: Path) -> None:
    text = CONFIGS[name].get("text_config", CONFIGS[name])
    subset = Subset(tuple(range(text["num_hidden_layers"])), tuple(range(text["n_routed_experts"])), renumber=True)
    convert_checkpoint(Job(source(name), 2, subset=subset), tmp_path / "found")
    convert_checkpoint(Job(source(name), 2), tmp_path / "wanted")
    assert contents(tmp_path / "found") == contents(tmp_path / "wanted")


def test_a_pruned_v3_loads_in_transformers_and_computes_what_its_layers_did(tmp_path: Path) -> None:
    write_deepseek_v3(tmp_path / "source")
    subset = Subset(layers=(0, 1, 2, 3))
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", subset=subset), tmp_path / "pruned")
    whole, (model, loaded) = loaded_model(tmp_path / "source")[0], loaded_model(tmp_path / "pruned")
    assert not any(loaded.values())
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        states = whole(tokens, output_hidden_states=True).hidden_states
        found = model(tokens).logits
    assert len(model.model.layers) == 4
    assert torch.equal(found, whole.lm_head(whole.model.norm(states[4])))


def test_experts_of_a_pruned_v3_load_in_transformers(tmp_path: Path) -> None:
    write_deepseek_v3(tmp_path / "source")
    subset = Subset(layers=(0, 1), experts=tuple(range(0, 16, 2)), renumber=True)
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", subset=subset), tmp_path / "pruned")
    model, loaded = loaded_model(tmp_path / "pruned")
    assert not any(loaded.values())
    assert model.model.layers[1].mlp.gate.weight.shape[0] == 8
    assert torch.isfinite(model(torch.arange(12).reshape(1, 12)).logits).all()


@pytest.mark.parametrize("subset", [Subset((0, 1), tuple(range(8))), Subset(only=("*gate*", "*norm*"))], ids=str)
def test_the_order_of_the_source_stays(subset: Subset, source: Write) -> None:
    """By it tensors are dealt to files."""
    whole = plan_conversion(Job(source("deepseek-v2-lite"), 1, to="hf")).source.tensors
    found = plan_conversion(Job(source("deepseek-v2-lite"), 1, to="hf", subset=subset)).source.tensors
    assert list(found) == [name for name in whole if name in found]
    assert 0 < len(found) < len(whole)


@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[10], CASES[13]], ids=str)
def test_a_subset_of_rank_files_is_that_of_the_checkpoint(case: Case, source: Write, tmp_path: Path) -> None:
    convert_checkpoint(Job(source(case.name), 4), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 2, subset=case.subset), tmp_path / "found")
    convert_checkpoint(Job(source(case.name), 2, subset=case.subset), tmp_path / "wanted")
    require_equal_ranks(tmp_path / "wanted", tmp_path / "found")
    configs = [oracle.read_config(tmp_path / which) for which in ("found", "wanted")]
    assert configs[0] == configs[1]
    assert manifest(tmp_path / "found")["subset"]["left_out"]["tensors"] > 0


@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[13]], ids=str)
def test_rank_files_of_a_subset_are_cut_again_and_keep_saying_so(case: Case, source: Write, tmp_path: Path) -> None:
    convert_checkpoint(Job(source(case.name), 2, subset=case.subset), tmp_path / "two")
    convert_checkpoint(Job(tmp_path / "two", 1), tmp_path / "found")
    convert_checkpoint(Job(source(case.name), 1, subset=case.subset), tmp_path / "wanted")
    name = "model0-mp1.safetensors"
    assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert manifest(tmp_path / "found")["subset"] == manifest(tmp_path / "two")["subset"]
    convert_checkpoint(Job(tmp_path / "two", 1, to="hf"), tmp_path / "back")
    assert manifest(tmp_path / "back")["subset"] == manifest(tmp_path / "two")["subset"]


@pytest.mark.parametrize("options", [{"cast": "bf16"}, {"keep_mtp": True}, {"pad": True}], ids=str)
def test_a_subset_is_cast_padded_and_keeps_mtp_layers_as_the_pruned_checkpoint_does(
    options: Mapping[str, Any], source: Write, tmp_path: Path
) -> None:
    case = CASES[6]
    pruned(source(case.name), tmp_path / "pruned", case)
    convert_checkpoint(Job(tmp_path / "pruned", 2, **options), tmp_path / "wanted")
    convert_checkpoint(Job(source(case.name), 2, subset=case.subset, **options), tmp_path / "found")
    require_equal_ranks(tmp_path / "wanted", tmp_path / "found")


# --- what is said ---


def test_the_manifest_says_what_was_chosen_and_what_is_left_out(source: Write, tmp_path: Path) -> None:
    subset = Subset((0, 9), tuple(range(8)), renumber=True)
    plan = convert_checkpoint(Job(source("deepseek-v3"), 2, subset=subset), tmp_path / "target").plan
    said = manifest(tmp_path / "target")["subset"]
    assert said["layers"] == {"kept": [0, 9], "of": 11}
    assert said["experts"] == {"kept": list(range(8)), "of": 16}
    whole = oracle.load_tensors(source("deepseek-v3"), ())
    assert said["left_out"]["tensors"] == len(whole) - len(plan.source.tensors)
    size = sum(tensor.nbytes for tensor in whole.values()) - sum(tensor.size for tensor in plan.source.tensors.values())
    assert said["left_out"]["bytes"] == size


def test_every_command_says_that_it_is_a_subset(
    source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = str(source("deepseek-v2-lite")), str(tmp_path / "target")
    wanted = "a subset: layers 0-1 of 5, experts 0-7 of 16; "
    options = ["--mp", "2", "--layers", "0-1", "--experts", "0-7"]
    for arguments in (
        ["plan", path, *options],
        ["convert", path, target, *options],
        ["convert", path, target, *options],  # which is done already
        ["verify", target],
        ["verify", target, "--source", path],
        ["verify", target, "--sample", "1%"],
    ):
        assert main(arguments) == 0
        assert wanted in capsys.readouterr().out, arguments
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["subset"]["layers"] == {"kept": [0, 1], "of": 5}


def test_a_whole_target_says_nothing_of_a_subset(
    source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = str(source("deepseek-v2-lite")), str(tmp_path / "target")
    assert main(["convert", path, target, "--mp", "2"]) == 0
    assert main(["verify", target]) == 0
    assert "subset" not in capsys.readouterr().out
    assert "subset" not in manifest(tmp_path / "target")


def test_a_subset_of_a_subset_tells_both(source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint(Job(source("deepseek-v2-lite"), 1, to="hf", subset=Subset((0, 1, 2))), tmp_path / "three")
    convert_checkpoint(Job(tmp_path / "three", 2, subset=Subset((0, 2), renumber=True)), tmp_path / "two")
    convert_checkpoint(Job(source("deepseek-v2-lite"), 2, subset=Subset((0, 2), renumber=True)), tmp_path / "wanted")
    require_equal_ranks(tmp_path / "wanted", tmp_path / "two")
    assert main(["verify", str(tmp_path / "two"), "--source", str(tmp_path / "three")]) == 0
    found = capsys.readouterr().out
    assert "a subset: layers 0, 2 of 3; " in found
    assert "of a subset: layers 0-2 of 5; " in found
    assert main(["verify", str(tmp_path / "two"), "--source", str(source("deepseek-v2-lite"))]) == 2
    assert "name the source that it was made from" in capsys.readouterr().err


# --- verify with the source ---


def test_verify_of_a_subset_sees_a_flipped_bit(
    source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = source("deepseek-v3"), tmp_path / "target"
    convert_checkpoint(Job(path, 2, subset=Subset((8, 9, 10), tuple(range(4, 12)), renumber=True)), target)
    arguments = ["verify", str(target), "--source", str(path)]
    assert main(arguments) == 0
    assert "all equal" in capsys.readouterr().out
    data = bytearray((target / "model1-mp2.safetensors").read_bytes())
    data[-100] ^= 1
    (target / "model1-mp2.safetensors").write_bytes(data)
    assert main(arguments) == 1
    assert "1 other byte than in the source" in capsys.readouterr().out


@pytest.mark.parametrize("row", [0, 3, 7])
def test_verify_of_experts_with_gaps_compares_the_rows_of_the_gate(
    row: int, source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = source("deepseek-v3"), tmp_path / "target"
    convert_checkpoint(Job(path, 2, subset=Subset((9, 10), (0, 1, 3, 6, 10, 11, 12, 15), renumber=True)), target)
    arguments = ["verify", str(target), "--source", str(path)]
    assert main(arguments) == 0
    assert "all equal" in capsys.readouterr().out
    assert main([*arguments, "--sample", "1%"]) == 0
    name, tensor = "model1-mp2.safetensors", "layers.1.ffn.gate.weight"
    data = bytearray((target / name).read_bytes())
    with safe_open(target / name, "np") as file:
        size = file.get_slice(tensor).get_shape()[1] * 2
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header[tensor]["data_offsets"][0] + row * size] ^= 1
    (target / name).write_bytes(data)
    assert main(arguments) == 1
    found = capsys.readouterr().out
    assert f"{name}: {tensor}: differs" in found
    assert f"first in byte {row * size:,} of the tensor" in found


def test_any_stretch_of_rows_that_lie_apart_is_read(tmp_path: Path) -> None:
    content = bytes(range(100))
    (tmp_path / "file").write_bytes(content)
    stretches = [Tensor("gate", "U8", (size,), 0, offset, size) for offset, size in ((10, 3), (40, 5), (20, 1))]
    wanted = content[10:13] + content[40:45] + content[20:21]
    side = ComparedFiles(tmp_path, {0: File("file", 100, 0, "", 0)}, CACHED, {7: stretches})
    buffer = allocate_aligned(3 * PAGE)
    with (tmp_path / "file").open("rb") as file:
        opened = OpenedFiles(side, {0: ReadableFile("file", "cached", file.fileno())})
        for start in range(len(wanted)):
            for end in range(start + 1, len(wanted) + 1):
                assert opened.read(7, start, end - start, buffer).tobytes() == wanted[start:end]


# --- what is refused ---


REFUSALS: Mapping[str, tuple[str, Subset, set[str], str]] = {
    "a layer that there is not": (
        "deepseek-v3",
        Subset((0, 99)),
        {"unknown-number"},
        r"layer 99\n.*layers 0-10",
    ),
    "an expert that there is not": ("deepseek-v3", Subset(experts=(0, 16)), {"unknown-number"}, "expert 16"),
    "both": ("deepseek-v3", Subset((11,), (99,)), {"unknown-number"}, "(?s)layer 11.*expert 99"),
    "no layers": ("deepseek-v3", Subset(()), {"nothing-kept"}, "at least one"),
    "a gap": ("deepseek-v3", Subset((0, 2)), {"needs-renumber"}, "--renumber gives them the numbers 0-1"),
    "a late beginning": ("deepseek-v3", Subset(experts=(1, 2, 3, 4)), {"needs-renumber"}, "experts 1-4"),
    "nothing to renumber": ("deepseek-v3", Subset(renumber=True), {"wrong-option"}, "--layers or --experts"),
    "fewer experts than a token has": ("kimi-k2", Subset(experts=(0, 1, 2)), {"too-few-experts"}, "at least 4"),
    "experts that groups do not divide": ("deepseek-v3", Subset(experts=tuple(range(7))), {"not-divisible"}, "of 2"),
    "groups of too few experts": ("deepseek-v3.2", Subset(experts=tuple(range(8))), {"too-few-experts"}, "2 in each"),
    "a table that names experts": (
        "deepseek-v4-flash",
        Subset(experts=tuple(range(6))),
        {"needs-all-experts"},
        "tid2eid",
    ),
    "layers that the config names": (
        "deepseek-v4-flash-0731",
        Subset((0, 1, 2, 3)),
        {"needs-layers"},
        "without layer 4",
    ),
    "layers that others read from": ("deepseek-v4.1-flash", Subset((0, 1)), {"needs-layers"}, "kv_source_layer_ids"),
    "a pattern that nothing fits": (
        "deepseek-v3",
        Subset(only=("*.norm", "x")),
        {"nothing-kept"},
        r"--only x: nothing kept\n  hint:     --only '\*x\*' fits",
    ),
    "a pattern with a slip": (
        "deepseek-v3",
        Subset(only=("model.layer.1.*",)),
        {"nothing-kept"},
        r"--only 'model\.layers\.1\.\*' fits",
    ),
    "only what is dropped": ("deepseek-v3", Subset(only=("*.eh_proj.weight",)), {"nothing-kept"}, "dropped"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_it_is_refused(what: str, source: Write) -> None:
    name, subset, wanted, text = REFUSALS[what]
    with pytest.raises(Refused, match=text) as refused:
        plan_conversion(Job(source(name), 2, subset=subset))
    assert kinds(refused) == wanted


QWEN = load_recipe("qwen3-moe")
MEMBERS = {"i": {0, 1, 2}, "d": {1}, "s": {0, 2}, "e": {0, 1}}


def test_what_a_config_says_of_layers_follows_them() -> None:
    config = {
        "num_hidden_layers": 5,
        "num_experts": 4,
        "layer_types": ["a", "b", "c", "d", "e"],
        "mlp_only_layers": [2, 3],
        "decoder_sparse_step": 1,
        "hidden_size": 8,
        "quantization_config": {
            "modules_to_not_convert": [
                "lm_head",
                "model.layers.1.mlp.gate",
                "model.layers.3.mlp.gate",
                "model.layers.4.mlp.gate",
                "model.layers.5.eh_proj",
            ]
        },
    }
    before = json.dumps(config)
    problems: list[Problem] = []
    found = prune_config(config, QWEN, MEMBERS, {0: 0, 3: 1, 4: 2}, problems)
    assert problems == []
    assert json.dumps(config) == before
    assert found == {
        "num_hidden_layers": 3,
        "num_experts": 2,
        "layer_types": ["a", "d", "e"],
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "hidden_size": 8,
        "quantization_config": {
            "modules_to_not_convert": [
                "lm_head",
                "model.layers.1.mlp.gate",
                "model.layers.2.mlp.gate",
                "model.layers.3.eh_proj",
            ]
        },
    }


def test_a_count_is_kept_under_whichever_key_the_config_has() -> None:
    """transformers 5 writes the experts of Qwen3-MoE as num_local_experts."""
    found = prune_config({"num_local_experts": 4}, QWEN, MEMBERS, None, [])
    assert found == {"num_local_experts": 2}


def test_modules_that_are_not_scaled_are_followed_under_every_name() -> None:
    names = ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate", "lm_head"]
    config = {"num_hidden_layers": 5, "quantization_config": {"ignore": names, "ignored_layers": names}}
    found = prune_config(config, QWEN, MEMBERS, {0: 0, 3: 1}, [])
    assert found is not None
    assert [*found["quantization_config"].values()] == [["model.layers.1.mlp.gate", "lm_head"]] * 2


def test_experts_are_not_taken_from_a_router_that_no_row_knows(source: Write, tmp_path: Path) -> None:
    text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(
        text.replace("[n_routed_experts, hidden_size]", "[?, hidden_size]").replace('"[n_routed_experts]"', '"[?]"')
    )
    with pytest.raises(Refused, match="the router, which loses rows too"):
        plan_conversion(Job(source("deepseek-v3"), 2, str(tmp_path / "own.toml"), subset=Subset(experts=(0, 1, 2, 3))))


@pytest.mark.parametrize(("layers", "count"), [({0: 0, 1: 1, 2: 2}, 0), ({0: 0, 2: 1, 4: 2}, 1)])
def test_layers_that_a_step_counts_keep_their_numbers(layers: dict[int, int], count: int) -> None:
    problems: list[Problem] = []
    prune_config({"num_hidden_layers": 5, "decoder_sparse_step": 2}, QWEN, MEMBERS, layers, problems)
    assert [problem.kind for problem in problems] == ["needs-layers"] * count


def test_another_subset_of_the_same_sizes_is_another_job(source: Write, tmp_path: Path) -> None:
    first, second = (Subset(layers, renumber=True) for layers in ((0, 1, 2), (1, 2, 3)))
    jobs = [
        identify_job(plan_conversion(Job(source("deepseek-v3"), 2, subset=subset)), [], Settings())
        for subset in (first, second)
    ]
    assert [key for key in jobs[0] if jobs[0][key] != jobs[1][key]] == ["subset"]
    convert_checkpoint(Job(source("deepseek-v3"), 2, subset=first), tmp_path / "target")
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source("deepseek-v3"), 2, subset=second), tmp_path / "target")
    assert kinds(refused) == {"target-not-empty"}
    assert convert_checkpoint(Job(source("deepseek-v3"), 2, subset=first), tmp_path / "target").done is None


# --- chosen tensors ---

ONLY = Subset(only=("model.layers.9.mlp.experts.3.*.weight", "model.norm.weight", "*.10.self_attn.o_proj.*"))


def test_only_the_named_tensors_are_written_with_their_scales_and_as_in_the_whole(
    source: Write, tmp_path: Path
) -> None:
    convert_checkpoint(Job(source("deepseek-v3"), 4), tmp_path / "whole")
    convert_checkpoint(Job(source("deepseek-v3"), 4, subset=ONLY), tmp_path / "found")
    experts = {f"layers.9.ffn.experts.3.w{part}.{kind}" for part in (1, 2, 3) for kind in ("weight", "scale")}
    every = {"norm.weight", "layers.10.attn.wo.weight", "layers.10.attn.wo.scale"}
    for rank in range(4):
        name = f"model{rank}-mp4.safetensors"
        found, whole = (load_file(tmp_path / which / name) for which in ("found", "whole"))
        assert found.keys() == (every | experts if rank == 0 else every)
        for key, tensor in found.items():
            assert torch.equal(tensor.view(torch.uint8), whole[key].view(torch.uint8))


def test_a_target_of_chosen_tensors_cannot_be_taken_for_a_model(
    source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = str(source("deepseek-v3")), str(tmp_path / "target")
    patterns = [argument for pattern in ONLY.only for argument in ("--only", pattern)]
    assert main(["convert", path, target, "--mp", "4", *patterns]) == 0
    found = capsys.readouterr().out
    assert "a subset: only model.layers.9.mlp.experts.3.*.weight, model.norm.weight, *.10.self_attn.o_proj.*; " in found
    assert found.endswith(f"next:\n  reshard verify {target}\n")
    assert sorted(path.suffix for path in (tmp_path / "target").iterdir()) == [".json", *[".safetensors"] * 4]
    assert manifest(tmp_path / "target")["subset"]["only"] == list(ONLY.only)
    assert main(["verify", target]) == 0
    assert "a subset: only " in capsys.readouterr().out
    assert main(["verify", target, "--source", path]) == 2
    assert main(["plan", target, "--mp", "2"]) == 2
    assert capsys.readouterr().err.count("incomplete source") == 2


def test_chosen_tensors_in_the_layout_of_the_source_have_no_config(source: Write, tmp_path: Path) -> None:
    subset = Subset((9, 10), renumber=True, only=("model.layers.0.mlp.gate.*",))
    convert_checkpoint(Job(source("deepseek-v3"), 1, to="hf", subset=subset), tmp_path / "target")
    assert sorted(contents(tmp_path / "target")) == ["model.safetensors", "reshard.json"]
    found, whole = oracle.load_tensors(tmp_path / "target", ()), oracle.load_tensors(source("deepseek-v3"), ())
    assert found.keys() == {f"model.layers.0.mlp.gate.{part}" for part in ("weight", "e_score_correction_bias")}
    assert all(torch.equal(tensor, whole[name.replace(".0.", ".9.")]) for name, tensor in found.items())
    said = manifest(tmp_path / "target")["subset"]
    assert said["left_out"]["tensors"] == len(whole) - 2
    assert said["layers"] == {"kept": [9, 10], "of": 11}


def test_tensors_of_an_mtp_layer_are_dropped_even_when_chosen_without_their_marker(source: Write) -> None:
    """Alone, `model.layers.11.*` without `eh_proj` would look like a layer of the model."""
    with pytest.raises(Refused, match="every tensor is dropped"):
        plan_conversion(Job(source("deepseek-v3"), 2, subset=Subset(only=("model.layers.11.self_attn.*",))))


# --- manifests of strangers ---

SAID = {"layers": {"kept": [0], "of": 5}, "left_out": {"tensors": 1, "bytes": 1}}


@pytest.mark.parametrize(
    "said",
    [
        "all",
        [],
        {"only": []},
        {"layers": {"kept": [0], "of": 5}},
        {**SAID, "layers": {"kept": [], "of": 5}},
        {**SAID, "layers": {"kept": ["0"], "of": 5}},
        {**SAID, "experts": {"kept": [-1], "of": 5}},
        {**SAID, "left_out": {"tensors": 1}},
        {**SAID, "more": 1},
        {**SAID, "source": {"layers": 3}},
        {**SAID, "source": 3},
    ],
    ids=repr,
)
def test_a_manifest_that_says_something_else_of_a_subset_is_refused(
    said: Any, source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_checkpoint(Job(source("deepseek-v2-lite"), 1, subset=Subset((0,))), tmp_path / "target")
    found = manifest(tmp_path / "target")
    del found["xxh3_128"]
    for value, wanted in ((SAID, 0), (said, 2)):
        found["subset"] = value
        text = json.dumps({**found, "xxh3_128": compute_manifest_checksum(found)})
        (tmp_path / "target" / "reshard.json").write_text(text)
        assert main(["verify", str(tmp_path / "target")]) == wanted
    assert "wrong manifest" in capsys.readouterr().err
