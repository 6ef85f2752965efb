"""Whole checkpoints under their own names: cast to BF16 and to FP8, or only in other files; against plain torch."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import oracle
import oracle_casts
import pytest
import torch
from families import FAMILIES, write_small
from jobs import Job, convert_checkpoint, plan_conversion
from safetensors.torch import load_file, save_file
from torch import Tensor
from torture import RANKS, Mode, Tally, contents, torment, undisturbed
from transformers import AutoModelForCausalLM

import reshard.execution.writer
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.synthetic import write_tensors

INDEX = "model.safetensors.index.json"
Source = Callable[[str], Path]
V3_LINE = ["deepseek-v3", "deepseek-v3.2", "kimi-k2", "glm-5.1-fp8"]
V4_LINE = [
    "deepseek-v4-flash",
    "deepseek-v4-pro",
    "deepseek-v4-flash-0731",
    "deepseek-v4-flash-vision",
    "deepseek-v4.1-flash",
]


class Crash(BaseException):
    """The end of the program, without a word."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The small checkpoint of a family, written once, and a file beside it that no recipe carries."""
    root = tmp_path_factory.mktemp("families")

    def of(name: str) -> Path:
        if not (root / name).exists():
            write_small(root / name, name)
            (root / name / "generation_config.json").write_text("{}\n")
        return root / name

    return of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def bf16_of(source: Path) -> dict[str, Tensor]:
    """Every tensor as it should be once it is BF16: FP8 and FP4 dequantised, tables of n-grams as they are."""
    tensors = oracle.load_tensors(source, ())
    block = oracle.block_size(source)
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn and ".engram.embed." not in name:
            found[name] = oracle_casts.dequantize(tensor, found.pop(oracle_casts.scale_name(name, tensors)), block)
        elif tensor.dtype == torch.int8:
            scale = found.pop(oracle_casts.scale_name(name, tensors)).float().repeat_interleave(32, 1)
            found[name] = (oracle_casts.unpack_fp4(tensor) * scale).bfloat16()
    return found


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if found[name].shape != wanted[name].shape] == []
    assert [name for name in wanted if not torch.equal(bits(found[name]), bits(wanted[name]))] == []


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def fp8_experts_of(source: Path) -> dict[str, Tensor]:
    """Every tensor as it should be once FP4 is FP8."""
    tensors = oracle.load_tensors(source, ())
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            scale = oracle_casts.scale_name(name, tensors)
            found[name], found[scale] = oracle_casts.fp4_to_fp8(tensor, tensors[scale], oracle.block_size(source))
    return found


def cast(source: Path, target: Path, job: str = "", *, most: int = 1 << 21, **settings: Any) -> dict[str, Tensor]:
    """Casts a whole checkpoint; returns what is in the target."""
    convert_checkpoint(Job(source, 1, to="hf", cast=job, max_file_size=most), target, Settings(**settings))
    return oracle.load_tensors(target, ())


# --- to BF16 ---


@pytest.mark.parametrize("name", V3_LINE + V4_LINE)
def test_every_tensor_is_bf16_as_torch_computes_it(name: str, source: Source, folder: Path) -> None:
    number = (V3_LINE + V4_LINE).index(name)
    found = cast(source(name), folder / "target", "bf16", jobs=(1, 2, 4)[number % 3], cache=("yes", "no")[number % 2])
    require_equal(found, bf16_of(source(name)))


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4-flash"])
def test_the_index_names_every_tensor_and_no_file_is_larger_than_asked(name: str, source: Source, folder: Path) -> None:
    most = 2_000_000
    found = cast(source(name), folder / "target", "bf16", most=most)
    index = json.loads((folder / "target" / INDEX).read_bytes())
    files = sorted(path.name for path in (folder / "target").glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    by_file = {file: load_file(folder / "target" / file) for file in files}
    assert index["weight_map"] == {tensor: file for file in files for tensor in by_file[file]}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    sizes = [(folder / "target" / file).stat().st_size for file in files]
    assert max(sizes) <= most
    # As full as they can be: two neighbours are more than one file may hold.
    assert min(map(sum, pairwise(sizes))) > most - 20_000


@pytest.mark.parametrize("most", range(100_000, 140_000, 3_989))
def test_the_headers_count_towards_the_size_of_a_file(most: int, source: Source) -> None:
    """Of so many files that some end just where they must."""
    files = plan_conversion(Job(source("deepseek-v3"), 1, to="hf", cast="bf16", max_file_size=most)).files
    assert len(files) > 100
    assert max(file.size for file in files if len(file.pieces) > 1) <= most


def test_a_tensor_that_is_larger_than_a_file_may_be_has_one_of_its_own(source: Source, folder: Path) -> None:
    most = 60_000
    found = cast(source("deepseek-v3"), folder / "target", most=most)
    by_file = [load_file(path) for path in (folder / "target").glob("*.safetensors")]
    large = [tensors for tensors in by_file if sum(tensor.nbytes for tensor in tensors.values()) > most]
    assert {name for tensors in large for name in tensors} == {
        name for name, tensor in found.items() if tensor.nbytes > most
    }
    assert len(large) > 2
    assert {len(tensors) for tensors in large} == {1}


def test_config_and_other_files_go_along(source: Source, folder: Path) -> None:
    for name in ("deepseek-v3", "deepseek-v4-flash", "deepseek-v4.1-flash"):
        target = folder / name
        cast(source(name), target, "bf16")
        config = json.loads((target / "config.json").read_bytes())
        before = FAMILIES[name].small
        key = "dtype" if "dtype" in before else "torch_dtype"
        assert config.pop(key) == "bfloat16"
        assert config == {
            key: before[key]
            for key in before
            if key not in {"quantization_config", "expert_dtype", "torch_dtype", "dtype"}
        }
        others = {path.name for path in source(name).iterdir() if path.suffix != ".safetensors"}
        assert {path.name for path in target.iterdir() if path.suffix != ".safetensors"} == others | {"reshard.json"}
        for other in others - {"config.json", INDEX}:
            assert (target / other).read_bytes() == (source(name) / other).read_bytes()


def test_every_file_says_that_torch_has_written_it(source: Source, folder: Path) -> None:
    """Without that word some loaders refuse a file."""
    cast(source("deepseek-v3"), folder / "target", "bf16")
    for path in (folder / "target").glob("*.safetensors"):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "glm-5.1-fp8"])
def test_transformers_loads_it_as_it_loads_the_tensors_of_torch(name: str, folder: Path) -> None:
    # The indexer of transformers rotates 64 of its channels, whatever their number.
    config = {**FAMILIES[name].small, "num_hidden_layers": 10} | (
        {} if name == "deepseek-v3" else {"index_head_dim": 96}
    )
    write_tensors(folder / "source", FAMILIES[name].tensors(config), config, 3)
    cast(folder / "source", folder / "target", "bf16")
    wanted = {key: tensor for key, tensor in bf16_of(folder / "source").items() if ".layers.10." not in key}
    (folder / "wanted").mkdir()
    save_file(wanted, folder / "wanted" / "model.safetensors", {"format": "pt"})
    config = {**config, "quantization_config": None, "torch_dtype": "bfloat16"}
    (folder / "wanted" / "config.json").write_text(
        json.dumps({key: config[key] for key in config if config[key] is not None})
    )
    models: list[Any] = []
    for which in ("target", "wanted"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder / which, output_loading_info=True)
        model, told = loaded
        assert not told["missing_keys"]
        assert not told["mismatched_keys"]
        assert model.dtype == torch.bfloat16
        models.append(model.eval())
    found, other = (model.state_dict() for model in models)
    assert [key for key in other if not torch.equal(found[key], other[key])] == []
    tokens = torch.tensor([[1, 5, 9, 200, 3]])
    with torch.no_grad():
        outputs = [model(tokens).logits for model in models]
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("code", "sign"), [(0x7F, 0), (0xFF, 0)])
def test_what_is_no_number_is_the_one_nan(code: int, sign: int, source: Source, folder: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    shutil.copytree(source("deepseek-v3"), folder / "source")
    change(folder / "source", name, lambda tensor: tensor.view(torch.uint8).view(-1).__setitem__(77, code))
    found = cast(folder / "source", folder / "target", "bf16")[name].view(torch.int16).view(-1)
    assert found[77] == 0x7FC0 | sign
    assert int((found & 0x7F80 == 0x7F80).sum()) == 1


def change(folder: Path, name: str, edit: Callable[[Tensor], object]) -> None:
    """Edits a tensor of a checkpoint in its place."""
    (path,) = [path for path in folder.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path, {"format": "pt"})


# --- in other files ---


@pytest.mark.parametrize("name", ["deepseek-v3.2", "kimi-k2", "deepseek-v4-pro", "deepseek-v4.1-flash"])
def test_without_a_cast_every_tensor_is_as_it_was(name: str, source: Source, folder: Path) -> None:
    found = cast(source(name), folder / "target", most=900_000)
    require_equal(found, oracle.load_tensors(source(name), ()))
    assert len(list((folder / "target").glob("*.safetensors"))) > 4
    assert json.loads((folder / "target" / "config.json").read_bytes()) == FAMILIES[name].small


def test_one_file_needs_no_index(source: Source, folder: Path) -> None:
    found = cast(source("deepseek-v4-pro"), folder / "target", most=1 << 40)
    require_equal(found, oracle.load_tensors(source("deepseek-v4-pro"), ()))
    assert [path.name for path in (folder / "target").glob("*.safetensors*")] == ["model.safetensors"]


# --- to FP8 ---


def scales_of(weight: Tensor, *, power: bool) -> Tensor:
    """One a block of 128: the largest magnitude over 448, or the power of two that is not below; 1 without any."""
    rows, columns = weight.shape
    found = torch.ones(-(-rows // 128), -(-columns // 128))
    for line in range(found.size(0)):
        for place in range(found.size(1)):
            block = weight[line * 128 : line * 128 + 128, place * 128 : place * 128 + 128].float()
            if block.abs().max() > 0:
                found[line, place] = block.abs().max() / 448
    if power:
        fraction, exponent = torch.frexp(found)
        found = torch.ldexp(torch.ones_like(found), exponent - (fraction == 0.5).int())
    return found


def fp8_of(tensors: dict[str, Tensor], *, power: bool) -> dict[str, Tensor]:
    """As GLM-5.1 is published in FP8: that says which weights are scaled."""
    family = FAMILIES["glm-5.1-fp8"]
    config = {**FAMILIES["glm-5.1"].small, "quantization_config": family.small["quantization_config"]}
    scaled = {name for name, dtype, _ in family.tensors(config) if dtype == "F8_E4M3"}
    found = dict(tensors)
    for name in scaled:
        scale = scales_of(tensors[name], power=power)
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        rows, columns = tensors[name].shape
        found[name] = (tensors[name].float() / spread[:rows, :columns]).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    return found


@pytest.mark.parametrize("power", [False, True])
def test_codes_and_scales_are_those_of_torch_and_come_back(power: bool, source: Source, folder: Path) -> None:  # noqa: FBT001
    shutil.copytree(source("glm-5.1"), folder / "source")
    zeros = "model.layers.2.self_attn.o_proj.weight"
    change(folder / "source", zeros, lambda tensor: tensor[:].zero_())
    wanted = fp8_of(oracle.load_tensors(folder / "source", ()), power=power)
    found = cast(folder / "source", folder / "fp8", "fp8-ue8m0" if power else "fp8", jobs=2)
    require_equal(found, wanted)
    assert (found[f"{zeros}_scale_inv"] == 1).all()
    config = json.loads((folder / "fp8" / "config.json").read_bytes())
    kept = {name for name, tensor in wanted.items() if tensor.ndim == 2 and tensor.dtype != torch.float8_e4m3fn}
    exempt = config["quantization_config"].pop("modules_to_not_convert")
    assert set(exempt) == {name.removesuffix(".weight") for name in kept if name.endswith(".weight")}
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    } | ({"scale_fmt": "ue8m0"} if power else {})
    require_equal(cast(folder / "fp8", folder / "back", "bf16"), oracle_casts.cast_to_bf16(folder / "fp8"))


def test_an_infinity_has_no_place_in_fp8(source: Source, folder: Path) -> None:
    name = "model.layers.3.self_attn.q_a_proj.weight"
    shutil.copytree(source("glm-5.1"), folder / "source")
    change(folder / "source", name, lambda tensor: tensor[3].__setitem__(7, float("inf")))
    with pytest.raises(Refused) as error:
        cast(folder / "source", folder / "target", "fp8")
    assert [(problem.kind, problem.subject) for problem in error.value.problems] == [("not-finite", name)]
    assert not (folder / "target").exists()
    (folder / "empty").mkdir()
    with pytest.raises(Refused):
        cast(folder / "source", folder / "empty", "fp8")
    assert not list((folder / "empty").iterdir())


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4.1-flash"])
def test_the_v4_line_is_not_cast_back(name: str, source: Source) -> None:
    with pytest.raises(Refused, match="reads FP8 and FP4 side by side"):
        plan_conversion(Job(source(name), 1, to="hf", cast="fp8"))


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v4.1-flash"])
def test_fp4_experts_alone_become_fp8(name: str, source: Source, folder: Path) -> None:
    job = Job(source(name), 1, to="hf", expert_dtype="fp8", max_file_size=3 << 20)
    convert_checkpoint(job, folder / "target", Settings(jobs=2))
    require_equal(oracle.load_tensors(folder / "target", ()), fp8_experts_of(source(name)))
    config = (folder / "target" / "config.json").read_text()
    assert "quant_method" in config
    assert "expert_dtype" not in config


# --- FP4 that FP8 cannot express ---

EXPERT = "layers.3.ffn.experts.5.w2"


@pytest.fixture
def wide(source: Source, folder: Path) -> Path:
    """A V4 with a group whose scale is 2^15 times the others' of its block; their 0.5 is then below all FP8 codes."""
    shutil.copytree(source("deepseek-v4-pro"), folder / "source")
    change(folder / "source", f"{EXPERT}.scale", lambda tensor: tensor.view(torch.uint8).fill_(110))
    change(folder / "source", f"{EXPERT}.scale", lambda tensor: tensor.view(torch.uint8)[0].__setitem__(0, 125))
    return folder / "source"


def test_a_value_that_fp8_has_not_is_refused_with_its_tensor(wide: Path, folder: Path) -> None:
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(wide, 1, expert_dtype="fp8"), folder / "target")
    (problem,) = error.value.problems
    assert (problem.kind, problem.subject) == ("inexact-cast", f"{EXPERT}.weight")
    assert "--allow-inexact" in problem.remedy
    assert not list((folder / "target").glob("*.safetensors"))


def test_rounded_if_allowed_and_counted(wide: Path, folder: Path) -> None:
    result = convert_checkpoint(Job(wide, 1, expert_dtype="fp8"), folder / "target", Settings(allow_inexact=True))
    tensors = oracle.load_tensors(wide, ())
    packed, scale = tensors[f"{EXPERT}.weight"], tensors[f"{EXPERT}.scale"]
    codes, new_scale = oracle_casts.fp4_to_fp8(packed, scale, 128)
    found = load_file(folder / "target" / "model0-mp1.safetensors")
    assert torch.equal(bits(found[f"{EXPERT}.weight"]), bits(codes))
    assert torch.equal(bits(found[f"{EXPERT}.scale"]), bits(new_scale))
    before = oracle_casts.unpack_fp4(packed).double() * scale.double().repeat_interleave(32, 1)
    after = codes.double() * new_scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert result.done is not None
    assert result.done.inexact == int((before != after).sum()) > 0


def test_a_scale_that_is_no_number_is_refused(source: Source, folder: Path) -> None:
    shutil.copytree(source("deepseek-v4-pro"), folder / "source")
    change(folder / "source", f"{EXPERT}.scale", lambda tensor: tensor.view(torch.uint8)[7].__setitem__(1, 255))
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(folder / "source", 1, expert_dtype="fp8"), folder / "target")
    assert [(problem.kind, problem.subject) for problem in error.value.problems] == [("not-finite", f"{EXPERT}.scale")]


# --- interrupted ---


@pytest.mark.parametrize("job", [{"to": "hf", "cast": "bf16", "max_file_size": 3 << 20}, {"expert_dtype": "fp8"}])
def test_a_crash_in_the_middle_of_a_cast_is_gone_on_from(
    job: dict[str, Any], source: Source, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a journal of what is done, which is flushed after every window."""
    work = Job(source("deepseek-v4-flash"), 1, **job)
    convert_checkpoint(work, folder / "wanted", Settings(jobs=1))
    add, count = reshard.execution.writer.Ledger.add, [0]

    def crashing(self: reshard.execution.writer.Ledger, records: bytes, inexact: int = 0) -> None:
        add(self, records, inexact)
        self.flush()
        count[0] += 1
        if count[0] == 20:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(reshard.execution.writer.Ledger, "add", crashing)
        with pytest.raises(Crash):
            convert_checkpoint(work, folder / "target", Settings(jobs=1))
    assert list((folder / "target").glob("*.partial"))
    done = convert_checkpoint(work, folder / "target", Settings(jobs=2, cache="no")).done
    assert done is not None
    assert done.resumed > 0
    assert contents(folder / "target") == contents(folder / "wanted")


def test_a_killed_run_that_casts_is_finished_by_the_next(source: Source, folder: Path) -> None:
    """V4 for ranks: `wo_a` is dequantised on the way."""
    name, mode, tally = "deepseek-v4-flash", Mode(2, "yes"), Tally()
    assert plan_conversion(Job(source(name), RANKS)).casts
    steps = undisturbed(source(name), folder / "wanted", mode)
    kills = [(steps * part // 5, 0.001) for part in (1, 2, 4)]
    torment(source(name), folder / "target", contents(folder / "wanted"), mode, kills, tally)
    assert tally.kills > 0
    assert tally.wrong == []


def test_verify_finds_every_cast_right(source: Source, folder: Path) -> None:
    """By the command, through the manifest; with the source it is tested beside verify."""
    target = folder / "target"
    words = ["convert", str(source("deepseek-v4-pro")), str(target), "--to", "hf", "--cast", "bf16"]
    assert main([*words, "--max-file-size", "3MB"]) == 0
    assert main(["verify", str(target)]) == 0
    assert len(list(target.glob("*.safetensors"))) > 4
