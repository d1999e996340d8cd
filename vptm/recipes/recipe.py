"""One file of settings per published method, for `vptm train --recipe NAME`.

A recipe is a YAML mapping: `summary`, one line; `settings`, options of `vptm train` with underscores for dashes;
optionally `search`, for some of them the values that the authors try on validation images. What is given on the
command line goes before the recipe; given another number of epochs, the recipe's warm-up keeps its share of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vptm.messages import error_line, hint
from vptm.settings import FREE_ON_RESUME, train_options, without_prompt_location
from vptm.weights.files import one_line_errors

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
    return sorted(file.name[:-5] for file in resources.files("vptm.recipes").iterdir() if file.name.endswith(".yaml"))


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
        with one_line_errors(name):
            return _parse(path.read_text(encoding="utf-8"), path.stem, name)
    known = recipe_names()
    shipped = ALIASES.get(name, name)
    if shipped not in known:
        raise ValueError(
            f"recipe must be one of {', '.join(known)}, an alias ({', '.join(ALIASES)}), or a .yaml file, "
            f"got {name!r}{hint(name, [*known, *ALIASES])}"
        )
    text = resources.files("vptm.recipes").joinpath(f"{shipped}.yaml").read_text(encoding="utf-8")
    return _parse(text, shipped, shipped)


def scaled_warmup(warmup_epochs: int, epochs: int, new_epochs: int) -> int:
    """The share of `new_epochs` that `warmup_epochs` is of `epochs`, rounded up, at most all epochs but one.

    Example:
        >>> scaled_warmup(10, 100, 15)
        2
    """
    return min(max(new_epochs - 1, 0), -(-warmup_epochs * new_epochs // max(epochs, 1)))


def with_recipe(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Options of `vptm train` with those of their recipe, where there is one, in place of what is not `given`.

    Where another number of epochs is given, the recipe's warm-up keeps its share of them.

    Raises:
        ValueError: a recipe that does not exist, or with a setting that is none or of another type.
    """
    if values.get("recipe") is None:
        return dict(values)
    found = recipe_options(values["recipe"])
    if "epochs" in given and "warmup_epochs" in found:
        published = found.get("epochs", train_options()["epochs"].default)
        found["warmup_epochs"] = scaled_warmup(found["warmup_epochs"], published, values["epochs"])
    return {**values, **{name: value for name, value in found.items() if name not in given}}


def recipe_options(name: str) -> dict[str, Any]:
    """A recipe's settings, with the types of the options they stand for."""
    options = {key: option for key, option in train_options().items() if key not in {"recipe", *FREE_ON_RESUME}}
    found = {}
    for key, value in without_prompt_location(read_recipe(name).settings).items():
        if key not in options:
            raise ValueError(f"recipe {name}: unknown setting {key!r}{hint(key, list(options))}")
        try:
            found[key] = options[key].read(value)
        except ValueError as error:
            raise ValueError(f"recipe {name}: {key} {error}") from None
    return found


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
