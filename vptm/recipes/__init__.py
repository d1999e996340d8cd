"""One file of settings per published method, for `vptm train --recipe NAME`.

A recipe is a YAML mapping: `summary`, one line; `settings`, options of `vptm train` with underscores for dashes;
optionally `search`, for some of them the values that the authors try on validation images. What is given on the
command line goes before the recipe; given another number of epochs, the recipe's warm-up keeps its share of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vptm.messages import error_line, hint

ALIASES = {"spt": "spt-deep", "provp-ref": "provp"}


@dataclass(frozen=True)
class Recipe:
    """A method's name, one line about it, its `vptm train` options, and values to try."""

    name: str
    summary: str
    settings: dict[str, Any]
    search: dict[str, list[Any]] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.name[:-5] for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str) -> Recipe:
    """A recipe by name or alias ("spt" is "spt-deep", "provp-ref" is "provp"), or from a `.yaml` file of your own.

    Raises:
        ValueError: unknown name (the known ones are listed, the nearest suggested), or a file that is no recipe.
        FileNotFoundError: a `.yaml` path that does not exist.

    Example:
        >>> read_recipe("spt-deep").settings["prompt_init"]
        'random'
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"recipe not found: {name}")
        from vptm.weights.files import one_line_errors

        with one_line_errors(name):
            return _parse(path.read_text(encoding="utf-8"), path.stem, name)
    known = recipe_names()
    shipped = ALIASES.get(name, name)
    if shipped not in known:
        raise ValueError(
            f"recipe must be one of {', '.join(known)}, an alias ({', '.join(ALIASES)}), or a .yaml file, "
            f"got {name!r}{hint(name, [*known, *ALIASES])}"
        )
    text = resources.files(__name__).joinpath(f"{shipped}.yaml").read_text(encoding="utf-8")
    return _parse(text, shipped, shipped)


def scaled_warmup(warmup_epochs: int, epochs: int, new_epochs: int) -> int:
    """The share of `new_epochs` that `warmup_epochs` is of `epochs`, rounded up, at most all epochs but one.

    Example:
        >>> scaled_warmup(10, 100, 15)
        2
    """
    return min(max(new_epochs - 1, 0), -(-warmup_epochs * new_epochs // max(epochs, 1)))


def _parse(text: str, name: str, source: str) -> Recipe:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {source} must be YAML: {error_line(error)}") from None
    if not isinstance(content, dict) or not {"summary", "settings"} <= content.keys() <= {
        "summary",
        "settings",
        "search",
    }:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"recipe {source} must have summary, settings and optionally search, got {found}")
    search = content.get("search") or {}
    if not isinstance(content["settings"], dict) or not isinstance(search, dict):
        raise ValueError(f"recipe {source}: settings and search must be mappings")
    if wrong := [key for key, values in search.items() if not isinstance(values, list) or not values]:
        raise ValueError(f"recipe {source}: search.{wrong[0]} must be a list of values")
    return Recipe(name, str(content["summary"]), dict(content["settings"]), search)
