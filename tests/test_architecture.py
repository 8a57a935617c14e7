"""Which modules of the package may import which."""

import ast
from pathlib import Path

import pytest

import deepred_pl

PACKAGE = Path(deepred_pl.__file__).parent
MODULES = {
    ".".join(("deepred_pl", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
WITHOUT_LIGHTNING = [
    *("networks", "admm", "operators", "noise", "denoisers", "images", "tiles", "background"),
    *("fidelity", "fast_conv", "problem", "losses", "metrics", "moments", "sources", "files"),
    *("checks", "graphs", "memory", "optim", "report", "resize"),
]


def imports(name):
    """The modules that a module imports, anywhere in its code, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reachable(name):
    """The modules that a module imports, directly or through modules of this package."""
    seen, left = set(), {name}
    while left:
        module = left.pop()
        seen.add(module)
        if module in MODULES:
            left |= imports(module) - seen - {"deepred_pl"}
    return seen


def defines_callback(name):
    bases = (
        {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.ClassDef)
    )
    return any({"Callback", "Checkpoint", "ProgressBar", "RestorationCallback"} & b for b in bases)


CALLBACKS = {name for name in MODULES if name.startswith("deepred_pl.callbacks.")}


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_no_callback_imports_another(name):
    others = {other for other in CALLBACKS - {name} if defines_callback(other)}
    assert len(others) >= 9
    assert not (reachable(name) & others) - {"deepred_pl.callbacks.base"}
    assert "deepred_pl.callbacks" not in imports(name)


@pytest.mark.parametrize("room", WITHOUT_LIGHTNING)
def test_no_lightning_where_there_is_no_training(room):
    names = {name for name in MODULES if f"{name}.".startswith(f"deepred_pl.{room}.")}
    if room != "fidelity":  # planned
        assert names
    for name in names:
        lightning = {m for m in reachable(name) if "lightning" in m.partition(".")[0]}
        assert not lightning, f"{name} imports {lightning}"
