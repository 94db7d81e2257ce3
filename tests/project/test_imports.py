"""Who imports whom: downwards only, never from the demo, and in no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    "cli",
    "commands",
    "demo",
    "audit",
    "training",
    "report",
    "planning",
    "evaluation",
    "methods",
    "optim",
    "models",
    "data",
    "distributed",
    "system",
    "errors",
)
"""From the roof down. `mollm/__init__.py`, which names what users import, stands beside them."""


def modules():
    """Every module of the two packages, with its file."""
    found = {}
    for package in ("mollm", "mollm_ops"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def statements(node, late=False):
    """Every statement in `node`, and whether it runs later than this one or never."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue
        typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        inside = late or typing or isinstance(child, ast.FunctionDef)
        yield child, inside
        yield from statements(child, inside)


def imports_of(path):
    """(module, whether it is imported when this one is, line) of every import of our own."""
    for node, late in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module, late, node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, late, node


ARROWS = [
    (name, target, late, node)
    for name, path in MODULES.items()
    for target, late, node in imports_of(path)
    if target.split(".")[0] in ("mollm", "mollm_ops")
]


def floor(module):
    package, _, rest = module.partition(".")
    if package == "mollm_ops":
        return len(FLOORS)
    return FLOORS.index(rest.split(".")[0])


def test_arrows_point_downwards():
    up = [
        f"{name}, line {node.lineno}, imports {target}"
        for name, target, _, node in ARROWS
        if name not in ("mollm", "mollm.__main__") and target != "mollm"
        if floor(target) < floor(name)
    ]
    assert not up


def test_nothing_but_the_command_line_imports_the_demo():
    guests = ("mollm.demo", "mollm.commands")
    inward = [
        (name, target)
        for name, target, _, _ in ARROWS
        if target.startswith(guests) and not name.startswith(guests) and name != "mollm.cli"
    ]
    assert not inward


def test_there_is_no_circle():
    graph = {name: set() for name in MODULES}
    for name, target, late, _ in ARROWS:
        if not late and target != name:
            graph[name].add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_a_private_name_stays_in_its_file():
    private = [
        f"{name}, line {node.lineno}, imports {alias.name}"
        for name, _, _, node in ARROWS
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and f"{node.module}.{alias.name}" not in MODULES
        if alias.name != "__version__"
    ]
    assert not private


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["unlearn", "--help"], ["no"]])
def test_the_command_line_answers_without_torch(arguments):
    code = (
        "import sys\n"
        "from mollm.cli import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "except SystemExit:\n"
        "    pass\n"
        "slow = {'torch', 'numpy', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_is_there():
    import mollm

    for name in mollm.__all__:
        assert getattr(mollm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mollm.nothing
