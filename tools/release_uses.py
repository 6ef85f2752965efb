"""Small real uses of an installed wheel: of the library, and of each extra; and what is refused without an extra."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

RunCommand = Callable[..., str]
"""Runs words in a folder, with more environment variables; returns the output, and ends the program if it fails."""


class Place(NamedTuple):
    """An environment with the wheel, and the folder to work in, where `demo/` and its conversion `plain/` lie."""

    folder: Path
    bin: Path
    root: Path
    """The sources of the release, for what is not in the wheel."""

    def complete(self, words: Sequence[str]) -> list[str]:
        """A command of this environment, with full paths."""
        program, *rest = words
        return [str(self.bin / program), *(word.replace("{root}", str(self.root)) for word in rest)]


USE = """
import reshard

assert "site-packages" in reshard.__file__, reshard.__file__
plan = reshard.plan("demo/source", mp=2)
assert len(plan.files) == 2
reshard.convert("demo/source", "two", mp=2)
report = reshard.verify("two", "demo/source")
assert report.is_proven, report
state = reshard.load("demo/source", mp=2, rank=1, framework="numpy")
with reshard.open("two", framework="numpy") as tensors:
    assert (tensors["model.norm.weight"][:] == state["norm.weight"]).all()
assert reshard.verify("two").is_proven
"""
"""In a folder with `demo/`."""

LOAD = "import reshard; reshard.load('demo/source', mp=2, rank=0, framework='torch')"
LOAD_AND_END = f"""
import reshard, sys
try:
    {LOAD.partition("; ")[2]}
except reshard.Refused as refused:
    sys.exit(print(refused) or 2)
"""

LACKING = {
    "completion": ["reshard", "--print-completion", "bash"],
    "ray": ["reshard", "convert", "demo/source", "by-ray", "--mp", "2", "--on", "ray"],
    "remote": ["reshard", "inspect", "s3://models/DeepSeek-V3"],
    "torch": ["python", "-c", LOAD_AND_END],
    "transformers": ["python", "{root}/tools/derive_recipe.py", "demo/source"],
}
"""By extra: a command that needs it. `fast` is needed by none: casts are slower without it."""


def require_same(one: Path, other: Path) -> str:
    """Fails unless both folders have the same rank files, and these the same bytes."""
    names = [path.name for path in sorted(one.glob("*.safetensors"))]
    same = [(one / name).read_bytes() == (other / name).read_bytes() for name in names]
    if not names or not all(same):
        raise SystemExit(f"FAILED: {one.name} is not {other.name}")
    return f"{len(names)} rank files, the same bytes"


def use_completion(place: Place, run: RunCommand) -> str:
    (place.folder / "script").write_text(run(place.complete(["reshard", "--print-completion", "bash"]), place.folder))
    said = run(["bash", "-c", "source ./script; complete -p reshard"], place.folder)
    return f"bash knows it: {said.strip()}"


def use_numba(place: Place, run: RunCommand) -> str:
    """Casts with numba, and with a Python that is told that there is none."""
    check = "from reshard.casts.kernels import choose_recode, recode; assert choose_recode() {} recode"
    start = "from reshard.cli.main import main; sys.exit(main('convert demo/source {} --mp 2 --cast bf16'.split()))"
    slow = "import sys; sys.modules['numba'] = None"
    for before, word, target in (("import sys", "is not", "fast"), (slow, "is", "slow")):
        code = f"{before}; {check.format(word)}; {start.format(target)}"
        run(place.complete(["python", "-c", code]), place.folder)
    return f"a cast with numba and without: {require_same(place.folder / 'fast', place.folder / 'slow')}"


def use_ray(place: Place, run: RunCommand) -> str:
    run(place.complete(["reshard", "convert", "demo/source", "by-ray", "--mp", "2", "--on", "ray"]), place.folder)
    return f"a conversion on a cluster of its own: {require_same(place.folder / 'plain', place.folder / 'by-ray')}"


def use_bucket(place: Place, run: RunCommand) -> str:
    """From a small server of the tests that speaks S3, by obstore."""
    sys.path.insert(0, str(place.root / "tests" / "support"))
    from store_servers import serve_bucket  # noqa: PLC0415 - it lies in the sources of the release

    with serve_bucket(place.folder / "demo" / "source") as served:
        variables = {"AWS_ENDPOINT_URL": served.endpoint, "AWS_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}
        variables |= {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anysecret"}
        words = ["reshard", "convert", "s3://models/inner", "of-bucket", "--mp", "2"]
        run(place.complete(words), place.folder, **variables)
    return f"a conversion from a bucket: {require_same(place.folder / 'plain', place.folder / 'of-bucket')}"


def use_torch(place: Place, run: RunCommand) -> str:
    """The bytes of each tensor of rank 0 are those of the rank file, as safetensors' own layout has them."""
    code = """
import reshard, torch
state = reshard.load("demo/source", mp=2, rank=0)
with reshard.open("plain/model0-mp2.safetensors", framework="torch") as file:
    assert set(file) == set(state), set(file) ^ set(state)
    for name in file:
        tensor = file[name][...]
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name
print(len(state), "tensors")
"""
    return f"rank 0 in memory: {run(place.complete(['python', '-c', code]), place.folder).strip()}, those of its file"


def use_transformers(place: Place, run: RunCommand) -> str:
    code = """
import transformers
config = transformers.LlamaConfig(
    vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
transformers.LlamaForCausalLM(config).save_pretrained("llama")
"""
    run(place.complete(["python", "-c", code]), place.folder)
    derive = ["python", "{root}/tools/derive_recipe.py", "llama", "-o", "mine.toml"]
    run(place.complete(derive), place.folder)
    run(place.complete(["reshard", "convert", "llama", "mine", "--mp", "2", "--recipe", "mine.toml"]), place.folder)
    run(place.complete(["reshard", "verify", "mine", "--source", "llama", "--recipe", "mine.toml"]), place.folder)
    return "a recipe derived for a small Llama, its ranks proven"


EXTRAS = {
    "completion": use_completion,
    "fast": use_numba,
    "ray": use_ray,
    "remote": use_bucket,
    "torch": use_torch,
    "transformers": use_transformers,
}
"""By extra: a function that uses it, and tells what was seen."""
