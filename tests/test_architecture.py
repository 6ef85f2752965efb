"""What the code keeps to: the order of its imports, the length of its functions, what the package holds."""

import ast
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import reshard
from reshard.recipes.recipe import load_recipe, packaged_recipes

FOLDER = Path(reshard.__file__).parent
ROOT = Path(__file__).parents[1]
MOST_LINES = 40
LAYERS = (
    "__init__ boxes decode errors formulas memory output tables text tiles types",
    "arrays books compiled copies disk draft header letters progress unchanged",
    "bands casts cut faults generate journal parallel read values windows",
    "casting found keys ranks recipe remake target",
    "compare joining names",
    "backwards holes workers",
    "forms match subset_text",
    "beside choose held only units",
    "gather padding pruning results verify",
    "coverage inspect layout subset",
    "derive plan",
    "configs execute lookup manifest",
    "audit origin",
    "restored sources",
    "convert lazy pairs",
    "commands diff loading proofs",
    "demo differences",
    "cli",
    "process",
    "__main__",
)
"""A module imports only from the lines above its own."""
LAYER = {module: number for number, line in enumerate(LAYERS) for module in line.split()}
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py")}
MODULES = sorted(TREES)
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def own_imports(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a piece of code imports; `__init__` stands for the package itself."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "reshard" if node.level else str(node.module)
            names = [f"{source}.{alias.name}" for alias in node.names] if source == "reshard" else [source]
        for parts in (name.split(".") for name in names):
            if parts[0] == "reshard":
                yield parts[1] if len(parts) > 1 and parts[1] in TREES else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_the_layers_below_it_only(module: str) -> None:
    assert module in LAYER, "a new module needs a place among the layers"
    for imported in own_imports(TREES[module]):
        assert LAYER[imported] < LAYER[module], f"{module} imports {imported}"


def test_the_layers_hold_the_modules_that_there_are() -> None:
    assert sorted(LAYER) == MODULES
    assert sum(len(line.split()) for line in LAYERS) == len(LAYER)


@pytest.mark.parametrize("module", MODULES)
def test_no_function_imports_a_module_of_ours(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, FUNCTION):
            assert list(own_imports(node)) == [], f"line {node.lineno}"


def test_the_command_names_functions_that_there_are() -> None:
    """It loads them when they run, so that no import shows them."""
    named = re.findall(r'"reshard\.(\w+):(\w+)"', (FOLDER / "cli.py").read_text(encoding="utf-8"))
    assert len(named) >= 5
    for module, function in named:
        functions = [node.name for node in TREES[module].body if isinstance(node, ast.FunctionDef)]
        assert function in functions, f"{module}:{function}"
        assert LAYER[module] < LAYER["cli"]


def test_the_package_names_functions_that_there_are() -> None:
    for name, (module, function) in vars(reshard)["PLACES"].items():
        tree = TREES[module.removeprefix("reshard.")]
        assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert name not in TREES, "a module of that name would take its place once it is imported"


def test_only_the_command_and_the_package_import_by_text() -> None:
    by_text = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
        and "import_module" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    }
    assert by_text == {"__init__", "cli"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_for_the_type_checker_only(module: str) -> None:
    """Such blocks hide circles."""
    names = {node.name for node in ast.walk(TREES[module]) if isinstance(node, ast.alias)}
    names |= {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    assert "TYPE_CHECKING" not in names


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_a_name_that_says_nothing(module: str) -> None:
    assert not set(module.split("_")) & {"util", "utils", "common", "core", "base", "helper", "helpers", "manager"}


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_LINES, node.name


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_asserted(module: str) -> None:
    """Python leaves assertions out when asked to: what must hold is raised."""
    assert [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Assert)] == []


def test_verify_shares_nothing_with_the_planner() -> None:
    """Else both could be wrong alike."""
    known, found = {"verify"}, set[str]()
    while known - found:
        module = min(known - found)
        found.add(module)
        known |= set(own_imports(TREES[module]))
    assert "compare" in found
    planner = {"plan", "cut", "copies", "match", "holes", "units", "results", "padding", "layout", "coverage"}
    assert not found & planner
    assert not found & {"casting", "casts", "compiled", "tables", "tiles", "gather", "joining", "configs"}
    assert not found & {"windows", "workers", "execute", "journal", "manifest", "audit"}


def test_every_recipe_is_in_the_wheel() -> None:
    """Hatch packs all that lies in the folder, but for what git is to ignore."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = project["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["src/reshard"]}
    assert build.keys() == {"targets"}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    recipes = sorted((ROOT / "src" / "reshard" / "recipes").iterdir())
    assert [path.suffix for path in recipes] == [".toml"] * len(recipes)
    for path in recipes:
        parts = path.relative_to(ROOT).parts
        assert not any(fnmatch(part, pattern.strip("/")) for part in parts for pattern in ignored), path


def test_every_recipe_in_the_folder_is_registered_under_its_own_name() -> None:
    files = sorted(path.stem for path in (FOLDER / "recipes").glob("*.toml"))
    assert [recipe.name for recipe in packaged_recipes()] == files
    assert [load_recipe(name).name for name in files] == files
    assert {"deepseek-v2", "deepseek-v3"} <= set(files)
