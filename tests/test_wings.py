"""The package's structure: a face and seven wings, imports in one direction."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import transformers_ma2mba

ROOT = Path(transformers_ma2mba.__file__).parent
MAY_IMPORT = {
    "mamba2": set(),
    "gradient_checkpointing": {"mamba2"},
    "video": set(),
    "session": {"mamba2", "video"},
    "data": {"gradient_checkpointing", "video"},
    "checkpoints": set(),
    "training": {"gradient_checkpointing"},
}
# The face's modules that import a wing, where not all may, and its modules that a wing may import.
IMPORTED_BY = {"checkpoints": {"__init__", "auto", "weights"}}
FACE_BELOW = {
    "data": {"modeling_ma2mba", "processing_ma2mba"},
    "checkpoints": {"configuration_ma2mba", "modeling_ma2mba", "processing_ma2mba", "video_processing_ma2mba"},
}
MODULES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> list[tuple[tuple[str, ...], list[str]]]:
    """The modules of this package that a module imports, as paths below the package, and the names that it takes."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = path.relative_to(ROOT).parts[: -node.level]
            names = [alias.name for alias in node.names]
            if node.module is None:  # `from . import auto`
                found += [((*above, name), []) for name in names]
            else:
                found.append(((*above, *node.module.split(".")), names))
    return found


def wing_of(parts: tuple[str, ...]) -> str | None:
    return parts[0] if parts[0] in MAY_IMPORT else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_other_wings_by_their_front_door(path):
    own = wing_of(path.relative_to(ROOT).parts)
    for target, _ in imports_of(path):
        other = wing_of(target)
        assert target != ("auto",) or path == ROOT / "__init__.py"
        if own is not None:
            allowed = other == own or other in MAY_IMPORT[own] or target[0] in FACE_BELOW.get(own, ())
            assert allowed, f"{own} must not import {'.'.join(target)}"
        if other not in (None, own):
            assert own is not None or path.stem in IMPORTED_BY.get(other, {path.stem}), f"{path.stem} imports {other}"
            assert target == (other,), f"import {'.'.join(target)} from {other}"


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_offers_the_names_that_the_rest_uses(wing):
    offered, used = set(), set()
    for target, names in imports_of(ROOT / wing / "__init__.py"):
        offered.update(names or target[-1:])
    for path in MODULES:
        if wing_of(path.relative_to(ROOT).parts) != wing:
            used.update(name for target, names in imports_of(path) if target == (wing,) for name in names)
    assert offered == used


def test_no_module_imports_itself_by_a_detour():
    graph = {}
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        targets = {target for target, _ in imports_of(path)}
        graph[parts] = {t if (ROOT / "/".join(t)).with_suffix(".py").exists() else (*t, "__init__") for t in targets}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
