"""Recipes besides the built-in ones: the rows of ladder.toml, checked, each with what its bases set.

train_gpt.py runs this file where it stands beside it, so that RECIPE may name any row. scripts/sweep.py reads it for
ladders, notes and published scores.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("study") / "ladder.toml"
ABOUT = ("base", "note", "published")  # what a row says of itself; the rest are its settings


def closest(name: str, known: Iterable[str]) -> str:
    return "closest: " + (", ".join(difflib.get_close_matches(name, list(known), 3, cutoff=0.4)) or "none")


def read(error: type[Exception]) -> dict[str, dict[str, Any]]:
    """Read the tables `rows` (by name), `ladders` (lists of rows) and `left_out` (reasons); all empty without the file.

    Raises:
        error: the file is damaged.
    """
    try:
        found = tomllib.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    except (OSError, ValueError) as fault:
        raise error(f"{FILE} is damaged ({fault}); repair it, or move it away and use built-in recipes") from fault
    tables = {name: found.get(name, {}) for name in ("rows", "ladders", "left_out")}
    for name, table in [*tables.items(), *(tables["rows"].items() if isinstance(tables["rows"], dict) else ())]:
        if not isinstance(table, dict):
            raise error(f"{FILE} is damaged ({name} must be a table, not {table!r}); repair it, or move it away")
    return tables


def changes(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a row holds itself."""
    return {key: value for key, value in row.items() if key not in ABOUT}


def resolve(built_in: Mapping[str, dict[str, Any]], settings: Any, error: type[Exception]) -> dict[str, dict[str, Any]]:
    """Return all settings of every recipe, built in or a row, by name: those of its bases and over them its own.

    Args:
        built_in: settings of the recipes of train_gpt.py.
        settings: the dataclass of all settings; its defaults say of what type they are.
        error: what is raised.

    Raises:
        error: the file is damaged, or a row has an unknown base, stands on itself, sets what is no setting, writes a
            value unlike its default (which would change the names of runs), or sets anything for a built-in recipe.
    """
    rows, recipes, faults = read(error)["rows"], dict(built_in), list[str]()
    own = {name: changes(row) for name, row in rows.items()} | dict(built_in)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, row in rows.items():
        chain, known = [name], [*built_in, *rows]
        while chain[-1] not in built_in:
            base = rows[chain[-1]].get("base")
            if base not in known or base in chain:
                rule = f"is no recipe or row; {closest(str(base), known)}"
                if base in chain:
                    rule = f"makes a circle, {' -> '.join([*chain, base])}; base one on a built-in recipe"
                faults.append(f"row {name!r}: base {base!r} of {chain[-1]!r} {rule}")
                break
            chain.append(base)
        for key, value in changes(row).items():
            if key not in defaults:
                faults.append(f"row {name!r}: {key} is not a setting; {closest(key, defaults)}")
            elif type(value) is not type(defaults[key]) or value == math.inf:
                faults.append(f"row {name!r}: {key}={value!r} must be written like its default, {defaults[key]!r}")
            elif name in built_in:
                faults.append(f"row {name!r}: {key}={value!r} would do nothing: the recipe is built in; rename the row")
        if not faults and name not in built_in:
            recipes[name] = {k: v for at in reversed(chain) for k, v in own[at].items()}
    if faults:
        raise error("\n".join(f"{FILE}, {fault}" for fault in faults))
    return recipes
