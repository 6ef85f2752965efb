"""What padding is for: the padded layers of 32 ranks compute what those of one rank do.

V3's MLP as its inference code runs it: `w1` and `w3` are cut by rows, `w2` by columns, and the ranks' outputs are added
up. In float64, so that nothing but the order of additions can differ.
"""

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from families import FAMILIES, write_small
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

NAME = "deepseek-v3-for-32"
RANKS = 32
BLOCK = 128
DENSE, SHARED = "layers.0.ffn", "layers.1.ffn.shared_experts"
Share = dict[str, Tensor]
"""The tensors of one rank file."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padding") / "source"
    write_small(folder, NAME, files=2)
    return folder


@pytest.fixture(scope="module")
def alone(source: Path) -> list[Share]:
    """What the only rank of one holds."""
    convert_checkpoint(Job(source, 1), source.parent / "alone")
    return [load_file(source.parent / "alone" / "model0-mp1.safetensors")]


@pytest.fixture(scope="module")
def padded(source: Path) -> list[Share]:
    """What each of the 32 ranks holds."""
    target = source.parent / "padded"
    convert_checkpoint(Job(source, RANKS, pad=True), target)
    return [load_file(target / f"model{rank}-mp{RANKS}.safetensors") for rank in range(RANKS)]


def weight_of(share: Share, name: str) -> Tensor:
    """Dequantised in float64, which is exact. The first scale is that of the rank's own first element."""
    weight, scale = share[f"{name}.weight"].double(), share[f"{name}.scale"].double()
    assert scale.shape == (-(-weight.size(0) // BLOCK), -(-weight.size(1) // BLOCK))
    spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight * spread[: weight.size(0), : weight.size(1)]


def as_it_is(values: Tensor) -> Tensor:
    return values


def as_fp8(values: Tensor) -> Tensor:
    """Activations as FP8 kernels take them: rounded, with a scale for each 128 in a row that is never zero."""
    length = values.size(-1)
    blocks = torch.nn.functional.pad(values, (0, -length % BLOCK)).reshape(values.size(0), -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    rounded = (blocks / scales).to(torch.float8_e4m3fn).double() * scales
    return rounded.reshape(values.size(0), -1)[:, :length]


def run(shares: list[Share], name: str, inputs: Tensor, activations: Callable[[Tensor], Tensor]) -> Tensor:
    """The MLP's outputs: each rank's part of the hidden units, and the sum over the ranks."""
    total = torch.zeros_like(inputs)
    for share in shares:
        taken = activations(inputs)
        hidden = silu(taken @ weight_of(share, f"{name}.w1").T) * (taken @ weight_of(share, f"{name}.w3").T)
        total += activations(hidden) @ weight_of(share, f"{name}.w2").T
    return total


@pytest.mark.parametrize("activations", [as_it_is, as_fp8])
@pytest.mark.parametrize("name", [DENSE, SHARED])
def test_the_padded_ranks_together_compute_what_one_rank_does(
    name: str, activations: Callable[[Tensor], Tensor], alone: list[Share], padded: list[Share]
) -> None:
    torch.manual_seed(32)
    inputs = torch.randn(7, FAMILIES[NAME].small["hidden_size"], dtype=torch.float64)
    wanted, found = (run(shares, name, inputs, activations) for shares in (alone, padded))
    assert wanted.abs().min() > 0
    assert torch.allclose(found, wanted, rtol=1e-11, atol=wanted.abs().max().item() * 1e-13)


@pytest.mark.parametrize(("name", "width", "part"), [(DENSE, 18432, 640), (SHARED, 2048, 128)])
def test_behind_the_true_units_there_is_nothing_and_before_them_everything(
    name: str, width: int, part: int, alone: list[Share], padded: list[Share]
) -> None:
    for weight, dimension in (("w1", 0), ("w3", 0), ("w2", 1)):
        parts = [weight_of(share, f"{name}.{weight}") for share in padded]
        assert {tensor.size(dimension) for tensor in parts} == {part}
        joined = torch.cat(parts, dimension)
        assert torch.equal(joined.narrow(dimension, 0, width), weight_of(alone[0], f"{name}.{weight}"))
        rest = joined.narrow(dimension, width, RANKS * part - width)
        assert rest.numel() > 0
        assert not rest.any()
        # A minus zero or a scale of zero would be as good to a matrix, but not to whoever divides by it.
        scales = torch.cat([share[f"{name}.{weight}.scale"] for share in padded], dimension)
        assert (scales.narrow(dimension, width // BLOCK, (RANKS * part - width) // BLOCK) == 1).all()


def test_a_single_wrong_unit_would_be_seen(alone: list[Share], padded: list[Share]) -> None:
    """The comparison is sharp: the smallest of all hidden units, taken away, is more than it allows."""
    torch.manual_seed(32)
    inputs = torch.randn(7, FAMILIES[NAME].small["hidden_size"], dtype=torch.float64)
    wanted = run(alone, DENSE, inputs, as_it_is)
    changed = [dict(share) for share in padded]
    weight = changed[5][f"{DENSE}.w2.weight"].clone()
    column = int(weight.float().abs().sum(0).argmin())
    weight[:, column] = 0
    changed[5][f"{DENSE}.w2.weight"] = weight
    found = run(changed, DENSE, inputs, as_it_is)
    assert not torch.allclose(found, wanted, rtol=1e-11, atol=wanted.abs().max().item() * 1e-13)


def test_all_else_is_cut_as_without_padding(source: Path, alone: list[Share], padded: list[Share]) -> None:
    """Attention, experts and embedding know nothing of it."""
    names = {name for share in padded for name in share}
    assert names == set(alone[0])
    for name in ("layers.0.attn.wo.weight", "layers.1.attn.wkv_b.weight", "embed.weight"):
        dimension = 1 if ".wo." in name else 0
        joined = torch.cat([share[name].view(torch.uint8) for share in padded], dimension)
        assert torch.equal(joined, alone[0][name].view(torch.uint8))
    experts = oracle.count_experts(oracle.load_tensors(source, ()))
    assert sum(f"layers.1.ffn.experts.{expert}.w1.weight" in padded[expert] for expert in range(experts)) == experts
