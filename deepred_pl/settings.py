"""Settings before anything is built of them: where they are, and what none may be."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_type_hints

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

CALLABLES = ("network", "optimizer", "lr_scheduler", "regularizer", "denoiser")
PARTS = (nn.Module, Optimizer, LRScheduler)  # what a function in the settings may make

# A file of settings has some hundred values, five deep.
LARGEST, MOST_NODES, DEEPEST = 2**20, 100_000, 50

# In an installed package beside this module; in a checkout, at the top level.
_PACKAGE = Path(__file__).parent
CONFIGS = next(
    (d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir()), _PACKAGE
)


def find_configs(args: Sequence[str]) -> list[str]:
    """The arguments with names of shipped configurations made paths."""
    found = list(args)
    for i, arg in enumerate(found):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c") and equals:
            found[i] = f"{option}={find_config(value)}"
        elif option in ("--config", "-c") and i + 1 < len(found):
            found[i + 1] = find_config(found[i + 1])
    return found


def find_config(name: str) -> str:
    """The path of a configuration: a file, or a shipped one by its name.

    Raises:
        ValueError: There is none.
    """
    if Path(name).is_file():
        _refuse_bombs(name)
        return name
    shipped = {
        p.relative_to(CONFIGS).with_suffix("").as_posix(): p for p in CONFIGS.rglob("*.yaml")
    }
    known = name.removeprefix("configs/").removesuffix(".yaml")
    if known not in shipped:
        raise ValueError(
            f"expected a YAML file or a shipped configuration, found no {name}; shipped are "
            + ", ".join(sorted(shipped))
        )
    return str(shipped[known])


def check_factories(settings: Namespace) -> None:
    """Refuse a function that would be called as if it were a class.

    Where a setting is a callable, the parser takes any function for a class, and building it calls
    it: os.system, for one.

    Args:
        settings: A section's, as `model.init_args` or `red`.

    Raises:
        ValueError: There is one whose annotation does not say that it makes such a part.
    """
    for name, part in settings.items(branches=True):
        path = getattr(part, "class_path", None)
        if name in CALLABLES and path is not None and not _makes_a_part(resolve_name(path)):
            raise ValueError(
                f"expected a class for {name}, or a function annotated to return a network, an "
                f"optimizer or a schedule, got {path}"
            )


def _makes_a_part(made: Any) -> bool:
    if inspect.isclass(made):
        return True
    try:
        returned = get_type_hints(made).get("return")
    except (TypeError, NameError):  # nothing that has annotations, or that can be resolved
        return False
    return inspect.isclass(returned) and issubclass(returned, PARTS)


def _refuse_bombs(path: str) -> None:
    """Refuse a YAML file that aliases blow up, or that is nested without end.

    Raises:
        ValueError: It is such a file, or no YAML at all.
    """
    try:
        if Path(path).stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        _check_size(Path(path).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"expected a YAML file of settings, cannot read {path}: {error}"
        ) from error


def _check_size(text: str) -> None:
    """Refuse YAML that comes to more than settings can be.

    Raises:
        yaml.YAMLError: It does, or is no YAML.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int = 0) -> int:
        """The nodes it comes to with its aliases written out."""
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep, or within itself")
        if id(node) not in sizes:
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = [child if isinstance(child, tuple) else (child,) for child in children]
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for pair in pairs for child in pair)
        return sizes[id(node)]

    node = yaml.compose(text, yaml.SafeLoader)
    if node is not None and size(node) > MOST_NODES:
        raise yaml.YAMLError(f"its aliases come to more than {MOST_NODES} values")


_load = get_loader("yaml")


def _load_within_bounds(text: str) -> Any:
    if "&" in text and "*" in text:  # without aliases, a text is as large as what it comes to
        _check_size(text)
    return _load(text)


def bound_values() -> None:
    """From now on, the parser takes no value that aliases blow up, from whatever file or string."""
    set_loader("yaml", _load_within_bounds, exceptions=(yaml.YAMLError,))
