"""No module imports itself by way of others, imports inside of functions included; TYPE_CHECKING is for annotations only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("ablation", "bench", "conf", "data", "kernels", "launch", "model", "training")

Graph = dict[str, set[str]]  # module: the modules that it imports


def modules_in(root: Path) -> dict[str, Path]:
    """Return {dotted name: file} of every module of the rooms below `root`; a package has the name of its folder."""
    files = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def executed(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements below `tree`, without those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from executed(ast.Module([other], []))
        else:
            yield from executed(node)


def imports_of(module: str, path: Path, source: str, known: set[str]) -> set[str]:
    """Return the modules of `known` that a module imports: the submodule where one is named, else the package."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for statement in executed(ast.parse(source)):
        if isinstance(statement, ast.Import):
            found.update(alias.name for alias in statement.names)
            continue
        base = statement.module or ""
        if statement.level:
            parents = package.split(".")[: len(package.split(".")) - statement.level + 1]
            base = ".".join([*parents, base] if base else parents)
        for alias in statement.names:
            submodule = f"{base}.{alias.name}"
            found.add(submodule if submodule in known else base)
    return (found & known) - {module}


def circles_in(graph: Graph) -> list[list[str]]:
    """Return the groups of modules each of which reaches all others of its group."""
    reached = {module: _reachable(graph, module) for module in graph}
    circles = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return sorted(map(list, circles))


def _reachable(graph: Graph, start: str) -> set[str]:
    visited: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in visited:
            visited.add(module)
            waiting.extend(graph[module])
    return visited


def test_no_module_imports_itself_by_way_of_others():
    modules = modules_in(ROOT)
    graph = {
        module: imports_of(module, path, path.read_text(encoding="utf-8"), set(modules))
        for module, path in modules.items()
    }
    assert len(graph) > 100
    assert circles_in(graph) == []


def test_the_search_follows_every_kind_of_import():
    known = {"kernels", "kernels.a", "kernels.b", "kernels.c", "kernels.d"}
    source = """
from typing import TYPE_CHECKING
from . import b
from .c import name
if TYPE_CHECKING:
    from kernels.d import Kind
def f():
    import kernels.a
    from kernels import d as other
"""
    imported = imports_of("kernels.e", Path("kernels/e.py"), source, known)
    assert imported == {"kernels.a", "kernels.b", "kernels.c", "kernels.d"}
    assert imports_of("kernels", Path("kernels/__init__.py"), "from .c import x", known) == {"kernels.c"}
    only_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kernels.d import Kind"
    assert imports_of("kernels.a", Path("kernels/a.py"), only_types, known) == set()


def test_the_search_tells_a_circle_from_a_diamond():
    assert circles_in({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circles_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
