"""Rules of the code: the order of its packages, the wall around `verification`, names, lengths, what is packed."""

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from repository import ROOT

import reshard
from reshard.recipes.recipe import list_packaged_recipes, load_recipe
from reshard.storage.addresses import OPENERS, TARGET_OPENER

FOLDER = Path(reshard.__file__).parent
MOST_LINES = 40
"""Of a function, without its docstring."""
MOST_LINES_OF_A_MODULE = 350
ORDER = (
    "paths text < types recipe_types < numbered_names < errors < storage < formats < recipes casts"
    " < sources verification < planning < execution < target loading inspection synthetic < pages < api < cli"
    " < __main__"
)
"""A package imports only from itself and from those on the left of the `<` before it: data goes down only."""
PLACE = {package: place for place, packages in enumerate(ORDER.split(" < ")) for package in packages.split()}
BELOW_THE_WALL = {"paths", "text", "types", "recipe_types", "numbered_names", "errors", "storage", "formats", "recipes"}
BELOW_THE_WALL |= {"verification"}
"""The packages that `verification` may reach."""
SAYS_NOTHING = {"util", "utils", "common", "core", "base", "helper", "helpers", "manager", "misc"}
VERBS = set(
    """
    add advise allocate append arrange ask assemble assign audit build carry cast check choose collect compare compile
    compute concatenate convert count correct cover cut decide decode dequantize describe diff drop encode escape
    evaluate execute expand explain fill find flatten flush format gather get group heed hide identify ignore infer
    inspect interleave interrupt intersect invert join keep lay leave list load lock look make match measure mend merge
    move multiply name narrow normalize note number open order pack pad paint pair parse pick plan prepare print probe
    prove prune quantize raise read recode refuse remove rename renumber repair replace repeat require reserve restore
    reverse reword rewrite round run sample set shift shorten show skip slice sort split spread start stop store suggest
    summarize sync tabulate take trace transform unpack verify view wait widen write combine estimate try prefetch
    unflatten unstack fetch receive guess tell map request close connect begin quote
    cancel delete exchange feed finish put sign throw complete abort discard
    """.split()  # noqa: SIM905 - a list of eighty strings would be longer
)
"""First words of functions. A new verb is welcome here, if none of these says the same."""
PREDICATES = {"is", "has", "lacks", "can", "may", "holds", "takes", "covers", "keeps", "grows", "suits", "quantizes"}
PREDICATES |= {"dequantizes"}
OTHER_FUNCTIONS = {"main", "entry"}


def module_name(path: Path) -> str:
    """`planning.plan`; a package by its own name, and `__init__` for reshard itself."""
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for path in sorted(FOLDER.rglob("*.py"))}
MODULES = [name for name in PATHS if name != "__init__"]
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@cache
def parse_modules() -> Mapping[str, ast.Module]:
    """Not while tests are collected, which every worker does."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def own_imports(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a piece of code imports; `__init__` stands for the package itself."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, module = name.partition(".")
            if package == "reshard":
                yield find_module(module)


def find_module(dotted: str) -> str:
    """The module of `planning.plan.Plan` is `planning.plan`."""
    while dotted and dotted not in PATHS:
        dotted = dotted.rpartition(".")[0]
    return dotted or "__init__"


@cache
def list_imports() -> Mapping[str, set[str]]:
    return {name: set(own_imports(tree)) for name, tree in parse_modules().items()}


def reach(start: set[str]) -> set[str]:
    """All modules that some modules import, and those that these import, to the last."""
    found, known = set[str](), set(start)
    while known - found:
        module = min(known - found)
        found.add(module)
        known |= list_imports()[module]
    return found


# --- the order ---


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_packages_before_its_own(module: str) -> None:
    package = module.split(".", maxsplit=1)[0]
    assert package in PLACE, "a new package needs a place in the order"
    for imported in list_imports()[module] - {"__init__"}:  # which holds the version, and imports nothing of ours
        other = imported.split(".")[0]
        assert other == package or PLACE[other] < PLACE[package], f"{module} imports {imported}"


def test_the_order_has_the_packages_that_there_are() -> None:
    assert {module.split(".")[0] for module in MODULES} == PLACE.keys()
    assert list_imports()["__init__"] == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within a package too."""
    TopologicalSorter(list_imports()).prepare()


def test_verification_is_behind_its_wall() -> None:
    """It shares nothing with the planner that it checks: else both could be wrong alike."""
    found = reach({module for module in MODULES if module.split(".")[0] == "verification"})
    assert "formats.safetensors" in found
    assert {module.split(".")[0] for module in found} <= BELOW_THE_WALL


@pytest.mark.parametrize("module", MODULES)
def test_no_function_imports_a_module_of_ours(module: str) -> None:
    for node in ast.walk(parse_modules()[module]):
        if isinstance(node, FUNCTION):
            assert list(own_imports(node)) == [], f"line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_for_the_type_checker_only(module: str) -> None:
    """Such blocks hide circles."""
    names = {node.name for node in ast.walk(parse_modules()[module]) if isinstance(node, ast.alias)}
    names |= {node.id for node in ast.walk(parse_modules()[module]) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(parse_modules()[module]) if isinstance(node, ast.Attribute)}
    assert "TYPE_CHECKING" not in names


# --- what is imported by its name as text ---


def test_few_modules_import_by_text() -> None:
    by_text = {
        module
        for module, tree in parse_modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
        and "import_module" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    }
    assert by_text == {"__init__", "cli.main", "storage.addresses"}


def test_the_command_names_functions_that_there_are() -> None:
    named = re.findall(r'"reshard\.([\w.]+):(\w+)"', (FOLDER / "cli" / "main.py").read_text(encoding="utf-8"))
    assert len(named) >= 5
    for module, function in named:
        assert module.split(".")[0] == "cli", "else the order does not show it"
        assert callable(getattr(import_module(f"reshard.{module}"), function))


def test_addresses_name_functions_of_their_own_package() -> None:
    for place in (*OPENERS.values(), TARGET_OPENER):
        module, function = place.removeprefix("reshard.").split(":")
        assert module.startswith("storage.")
        assert function in names_of(parse_modules()[module])


def test_the_package_names_what_there_is() -> None:
    for name, (module, own_name) in vars(reshard)["PLACES"].items():
        assert own_name in names_of(parse_modules()[module.removeprefix("reshard.")])
        assert name not in PATHS, "a module of that name would take its place once it is imported"


# --- names and lengths ---


def names_of(tree: ast.Module) -> list[str]:
    """The functions and classes of a module that are not inside others."""
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_a_name_that_says_nothing(module: str) -> None:
    assert not set(re.split(r"[._]", module)) & SAYS_NOTHING


@pytest.mark.parametrize("module", MODULES)
def test_names_of_functions_begin_with_a_verb(module: str) -> None:
    functions = [node.name for node in parse_modules()[module].body if isinstance(node, ast.FunctionDef)]
    first_words = {name: name.lstrip("_").partition("_")[0] for name in functions if name not in OTHER_FUNCTIONS}
    assert {name for name, word in first_words.items() if word not in VERBS | PREDICATES} == set()


def test_no_two_public_functions_or_types_share_a_name() -> None:
    places = defaultdict(list)
    for module, tree in parse_modules().items():
        for name in names_of(tree):
            if not name.startswith("_"):
                places[name].append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    for node in ast.walk(parse_modules()[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length(node, module) <= MOST_LINES, node.name


def length(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> int:
    """Lines without the docstring; for public functions, whose arguments stand one a line, without these too."""
    first = node.body[0]
    described = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
    is_public = (f"reshard.{module}", node.name) in vars(reshard)["PLACES"].values()
    return (node.end_lineno or 0) + 1 - (first.lineno if is_public else node.lineno) - described


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=module_name)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_MODULE


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_is_in_it(module: str) -> None:
    assert re.match(r"(?!What )\S.*", ast.get_docstring(parse_modules()[module]) or "")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_asserted(module: str) -> None:
    """Python leaves assertions out when asked to: what must hold is raised."""
    assert [node.lineno for node in ast.walk(parse_modules()[module]) if isinstance(node, ast.Assert)] == []


# --- what is packed ---


def test_every_recipe_is_in_the_wheel() -> None:
    """Hatch packs all that lies in the folder, but for what git is to ignore."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = project["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["src/reshard"]}
    assert build.keys() == {"targets"}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    recipes = sorted((ROOT / "src" / "reshard" / "recipes" / "families").iterdir())
    assert [path.suffix for path in recipes] == [".toml"] * len(recipes)
    packed = [*recipes, *(path for path in FOLDER.rglob("*") if path.suffix in {".py", ".css", ".json", ".typed"})]
    for path in packed:
        parts = path.relative_to(FOLDER).parts
        assert not any(fnmatch(part, pattern.strip("/")) for part in parts for pattern in ignored), path


def test_the_types_are_for_others_too() -> None:
    assert (FOLDER / "py.typed").exists()


def test_every_recipe_in_the_folder_is_registered_under_its_own_name() -> None:
    files = sorted(path.stem for path in (FOLDER / "recipes" / "families").glob("*.toml"))
    assert [recipe.name for recipe in list_packaged_recipes()] == files
    assert [load_recipe(name).name for name in files] == files
    assert {"deepseek-v2", "deepseek-v3"} <= set(files)
