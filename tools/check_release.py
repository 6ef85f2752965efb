"""Checks a release: builds it, looks at what is in it, installs it into fresh environments and uses it there.

    python tools/check_release.py python3.11 python3.12 python3.13

Leaves the files to publish in `dist/`. Needs git, and the packages `build`, `packaging` and `twine`; `make release`
sets them up. Every step ends with a line; the first that fails ends the program with what it printed, and exit code 1.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.metadata import Metadata
from release_uses import EXTRAS, LACKING, USE, Place

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "development.txt"
TORCH = "torch==2.13.0"
"""Installed first and alone: asked for by another package, pip would take the build with several GB of CUDA."""
TESTS = ["recipes", "casts", "loading", "release", "test_errors.py", "test_public_interface.py"]
TESTS += [
    f"formats/test_{name}.py" for name in ("distcp", "index_parsing", "inert_pickle", "recognition", "safetensors")
]
TESTS += [f"cli/test_{name}.py" for name in ("bucket_addresses", "given_paths", "help", "hub_names")]
"""What runs with the wheel on every Python: broad, and some minutes in all."""
BUILT_APART = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
"""The files of the wheel that are made while it is built, and the licence."""
NEEDS_TORCH = re.compile(r"^ERROR (\S+\.py)", re.MULTILINE)
NO_TORCH = "ModuleNotFoundError: No module named 'torch'"


def run(words: Sequence[str | Path], folder: Path, code: int = 0, **variables: str) -> str:
    """Runs a command outside of this repository's environment. Returns its output; another exit code ends all."""
    foreign = ("PYTHON", "VIRTUAL_ENV", "PIP_CONSTRAINT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=kept | variables, capture_output=True, text=True, check=False
    )
    if done.returncode != code:
        shown = " ".join(map(str, words))
        raise SystemExit(f"{done.stdout}{done.stderr}\nFAILED: exit code {done.returncode}, not {code}: {shown}")
    return done.stdout + done.stderr


def require(is_right: bool, text: str) -> None:  # noqa: FBT001 - it reads like an assertion
    if not is_right:
        raise SystemExit(f"FAILED: {text}")


def say(began: float, text: str) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)


# --- the files ---


def build(what: str, source: Path, folder: Path) -> Path:
    """Builds an sdist or a wheel in an environment of its own, with the locked version of the backend."""
    date = run(["git", "log", "-1", "--format=%ct"], ROOT).strip()
    words: list[str | Path] = [sys.executable, "-m", "build", f"--{what}", "--outdir", folder, source]
    run(words, folder.parent, SOURCE_DATE_EPOCH=date, PIP_CONSTRAINT=str(LOCK))
    (path,) = folder.iterdir()
    return path


def build_twice(folder: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel, and the folder that the sdist holds. Fails if a second build gives other bytes."""
    sdists = [build("sdist", ROOT, folder / name) for name in ("sdist", "sdist-again")]
    require(sdists[0].read_bytes() == sdists[1].read_bytes(), "two builds of the sdist differ")
    with tarfile.open(sdists[0]) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheels = [build("wheel", source, folder / f"wheel-{source.name}") for source in (ROOT, unpacked)]
    require(wheels[0].read_bytes() == wheels[1].read_bytes(), "the wheel of the sdist is not that of the repository")
    return sdists[0], wheels[1], unpacked


def check_contents(sdist: Path, wheel: Path, tracked: set[str]) -> None:
    """The sdist has the files that git tracks, and the wheel those of the package. Neither has anything else."""
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    require(packed == tracked | {"PKG-INFO"}, f"the sdist is not what git tracks: {sorted(packed ^ tracked)}")
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    own = f"{wheel.name.rsplit('-', 3)[0]}.dist-info/"
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = package | {own + name for name in BUILT_APART}
    require(packed == expected, f"the wheel is not the package: {sorted(packed ^ expected)}")


def read_metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name))


def list_lowest(metadata: Metadata, extra: str) -> list[str]:
    """The requirements of the package and one extra, each at its lower bound."""
    wanted = [one for one in metadata.requires_dist or () if not one.marker or one.marker.evaluate({"extra": extra})]
    for one in wanted:
        require(str(one.specifier).startswith(">="), f"{one}: no lower bound alone")
    return [f"{one.name}{str(one.specifier).replace('>=', '==')}" for one in wanted]


# --- environments ---


def make_place(folder: Path, python: str, wheel: Path, extra: str = "", also: Sequence[str] = ()) -> Place:
    """A fresh environment with the wheel, one extra, and other requirements."""
    run([python, "-m", "venv", folder / "environment"], folder.parent)
    pip: list[str | Path] = [folder / "environment" / "bin" / "pip", "install", "--quiet"]
    if extra in ("torch", "transformers"):
        run([*pip, TORCH], folder)
    run([*pip, f"{wheel}[{extra}]" if extra else wheel, *also], folder)
    return Place(folder, folder / "environment" / "bin", ROOT)


def check_python(place: Place, version: str) -> str:
    """Uses the installed command and the library. Returns the version of Python."""
    said = run([place.bin / "reshard", "--version"], place.folder)
    require(version in said, f"reshard --version says {said}")
    run([place.bin / "reshard", "demo", "demo"], place.folder)
    run([place.bin / "python", "-c", USE], place.folder)
    return run([place.bin / "python", "--version"], place.folder).strip()


def check_lacking(place: Place) -> None:
    """What needs an extra is refused without it, and the refusal names the extra."""
    for extra, words in LACKING.items():
        said = run(place.complete(words), place.folder, code=2)
        require(f"reshard[{extra}]" in said, f"{' '.join(words)}: its extra is not named:\n{said}")


def run_tests(place: Place, unpacked: Path) -> str:
    """Runs the tests of the sdist with the installed wheel. Without torch, those files stay out that import it."""
    python: list[str | Path] = [place.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [f"tests/{name}" for name in TESTS]
    left_out: list[str] = []
    if not list((place.bin.parent / "lib").glob("python*/site-packages/torch")):
        listed = [*python, "--collect-only", "--continue-on-collection-errors", *tests]
        said = run(listed, unpacked, code=1)
        left_out = sorted(set(NEEDS_TORCH.findall(said)))
        require(said.count(f"E   {NO_TORCH}") == len(left_out), f"not all lack torch alone:\n{said}")
    ignored = [f"--ignore={name}" for name in left_out]  # of folders; of files that are named, pytest ignores none
    said = run([*python, "-n", "auto", *ignored, *(name for name in tests if name not in left_out)], unpacked)
    result = said.strip().splitlines()[-1].strip("= ")
    return f"{result}; {len(left_out)} files that need torch left out" if left_out else result


# --- the steps ---


def check_pythons(pythons: Sequence[str], wheel: Path, unpacked: Path, folder: Path, began: float) -> None:
    version = str(read_metadata(wheel).version)
    for number, python in enumerate(pythons):
        (folder / f"python-{number}").mkdir()
        place = make_place(folder / f"python-{number}", python, wheel)
        name = check_python(place, version)
        say(began, f"{name}: installed, demo, version, the library")
        if number == 0:
            check_lacking(place)
            say(began, f"{name}: refusals without an extra name it: {', '.join(LACKING)}")
        run([place.bin / "pip", "install", "--quiet", f"{wheel}[test]"], folder)
        say(began, f"{name}: {run_tests(place, unpacked)}")


def check_extras(
    python: str, wheel: Path, unpacked: Path, folder: Path, began: float, bounds: Mapping[str, Sequence[str]]
) -> None:
    """Each extra alone in an environment of its own: with the newest packages, or at the bounds that are given."""
    kind = "lowest" if bounds else "newest"
    for extra, check in EXTRAS.items():
        own = folder / f"{kind}-{extra}"
        own.mkdir()
        place = make_place(own, python, wheel, extra, bounds.get(extra, ()))._replace(root=unpacked)
        run([place.bin / "reshard", "demo", "demo"], own)
        run([place.bin / "reshard", "convert", "demo/source", "plain", "--mp", "2"], own)
        said = check(place, run)
        say(began, f"extra {extra}, {kind} versions: {said}")
        shutil.rmtree(own)


def check_lowest(python: str, wheel: Path, unpacked: Path, folder: Path, began: float) -> None:
    """The package and each extra at their lower bounds; then the tests at those of all that they need."""
    metadata = read_metadata(wheel)
    own = folder / "lowest"
    own.mkdir()
    place = make_place(own, python, wheel, also=list_lowest(metadata, ""))
    check_python(place, str(metadata.version))
    say(began, f"lowest versions: {', '.join(list_lowest(metadata, ''))}: demo, version, the library")
    check_extras(python, wheel, unpacked, folder, began, {extra: list_lowest(metadata, extra) for extra in EXTRAS})
    run([place.bin / "pip", "install", "--quiet", TORCH], own)
    run([place.bin / "pip", "install", "--quiet", f"{wheel}[test]", *list_lowest(metadata, "test")], own)
    say(began, f"lowest versions of the tests: {run_tests(place, unpacked)}")


def find_pythons(names: Sequence[str]) -> list[str]:
    """The paths of the interpreters. Ends the program with all those that are not there."""
    found = {name: shutil.which(name) for name in names}
    works = {
        name: path and not subprocess.run([path, "-c", ""], check=False).returncode for name, path in found.items()
    }
    lacking = [name for name in names if not works[name]]
    require(not lacking, f"no such Python: {', '.join(lacking)}; PYTHONS names those to try, by name or path")
    return [str(path) for path in found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks a release, and leaves its files in dist/.")
    parser.add_argument("pythons", nargs="+", help="interpreters, by name or path; the first gets the extras")
    pythons = find_pythons(parser.parse_args().pythons)
    began = time.monotonic()
    require(not run(["git", "status", "--porcelain"], ROOT), "the working tree has changes: commit or remove them")
    with tempfile.TemporaryDirectory(prefix="reshard-release-") as name:
        folder = Path(name)
        sdist, wheel, unpacked = build_twice(folder)
        say(began, f"built twice, the same bytes: {sdist.name}, {wheel.name}")
        check_contents(sdist, wheel, set(run(["git", "ls-files"], ROOT).splitlines()))
        say(began, "the sdist has what git tracks, the wheel the package, and nothing else")
        run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], folder)
        say(began, "twine check --strict: passed")
        check_pythons(pythons, wheel, unpacked, folder, began)
        check_extras(pythons[0], wheel, unpacked, folder, began, {})
        check_lowest(pythons[0], wheel, unpacked, folder, began)
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        (ROOT / "dist").mkdir()
        for path in (sdist, wheel):
            shutil.copy2(path, ROOT / "dist")
    say(began, "dist/: ready to publish")


if __name__ == "__main__":
    main()
