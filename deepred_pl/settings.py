"""Settings before anything is built of them: where they are, and what none may be."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import get_type_hints

import yaml
from jsonargparse import Namespace
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

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

    Raises:
        ValueError: There is one whose annotation does not say that it makes such a part.
    """
    for name in ("network", "optimizer", "lr_scheduler", "regularizer"):
        path = getattr(settings.get(name), "class_path", None)
        made = None if path is None else resolve_name(path)
        if made is None or inspect.isclass(made):
            continue
        returned = get_type_hints(made).get("return") if inspect.isroutine(made) else None
        if not (inspect.isclass(returned) and issubclass(returned, PARTS)):
            raise ValueError(
                f"expected a class for model.{name}, or a function annotated to return a network, "
                f"an optimizer or a schedule, got {path}"
            )


def _refuse_bombs(path: str) -> None:
    """Refuse a YAML file that aliases blow up, or that is nested without end.

    Raises:
        ValueError: It is such a file, or no YAML at all.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int = 0) -> int:
        """The nodes it comes to with its aliases written out."""
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep, or within itself")
        if id(node) not in sizes:
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = [child if isinstance(child, tuple) else (child,) for child in children]
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for pair in pairs for child in pair)
        return sizes[id(node)]

    try:
        if Path(path).stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
        if node is not None and size(node) > MOST_NODES:
            raise ValueError(f"its aliases come to more than {MOST_NODES} values")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"expected a YAML file of settings, cannot read {path}: {error}"
        ) from error
