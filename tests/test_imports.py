"""Who may import whom: no circles, and one direction through the rooms (docs/design.md)."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = ("frozen", "weights", "data")
# rooms, and those that each may import from; from the leaves anyone may
ROOMS = {
    "commands": {"recipes", "methods", "serving", "export", "inspection", "training", "models", *BELOW},
    "methods": {"recipes", "training", "models", *BELOW},
    "export": {"models", *BELOW},
    "serving": {"inspection", "training", "models", *BELOW},
    "inspection": {"models", *BELOW},
    "training": {"models", *BELOW},
    "models": set(BELOW),
    "frozen": set(),
    "weights": {"data"},
    "data": set(),
    "recipes": set(),
}
LEAVES = {
    "vptm.messages",
    "vptm.settings",
    "vptm.terminal",
    "vptm.version",
    "vptm.weights.files",
    "vptm.inspection.figures",
    "vptm.frozen.sharing",
}


def modules(package: str) -> dict[str, Path]:
    names = {}
    for path in (ROOT / package).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    return names


MODULES = modules("vptm") | modules("vptm_kernels")


def imported(name: str) -> set[str]:
    """Our modules that a module imports anywhere: under TYPE_CHECKING and inside functions as well."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            named = {f"{source}.{alias.name}" for alias in node.names}
            found |= {each if each in MODULES else source for each in named}
    return {each for each in found if each in MODULES and each != name}


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") > 1 or name.removeprefix("vptm.") in ROOMS else ""


def test_there_are_no_circles() -> None:
    """In a circle nothing can be read, tested or moved alone, and the order of imports decides whether it works."""
    graph = {name: imported(name) for name in MODULES}
    # the packages' front doors load public names when they are asked for: nobody inside goes through them
    assert [name for name, found in graph.items() if "vptm" in found and name != "vptm.__main__"] == []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_rooms_are_entered_in_one_direction(name: str) -> None:
    """A model that knows a command, or weights that know a model, would be in everybody's way."""
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if module.startswith(f"vptm.{name}.")
        for other in imported(module) - LEAVES
        if other.startswith("vptm.") and room(other) not in (ROOMS[name] | {name})
    ]
    assert wrong == []


def test_every_room_and_leaf_is_known() -> None:
    """A new one has to say where it stands."""
    found = {path.name for path in (ROOT / "vptm").iterdir() if (path / "__init__.py").is_file()}
    assert found == set(ROOMS)
    files = {f"vptm.{path.stem}" for path in (ROOT / "vptm").glob("*.py")} - {"vptm.__init__", "vptm.__main__"}
    assert files <= LEAVES <= set(MODULES)
    assert {other for leaf in LEAVES for other in imported(leaf)} <= LEAVES


def test_kernels_know_no_model() -> None:
    """They are imported with torch alone."""
    assert [
        name
        for name in MODULES
        if name.startswith("vptm_kernels") and any(other.partition(".")[0] == "vptm" for other in imported(name))
    ] == []


def test_a_room_has_no_second_door() -> None:
    """A name that can be imported from two places has no home."""
    for name in ROOMS:
        (docstring,) = ast.parse((ROOT / "vptm" / name / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), name
