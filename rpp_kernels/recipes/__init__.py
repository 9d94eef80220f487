"""Named algorithms: each is a row of one table over independent axes, and no code path of its own.

    recipe = rpp.recipe("grpo", beta=0.01)                  # a row, and what you want otherwise
    recipe = rpp.recipe("dapo", "icepop", dialect="verl")   # with an extra, as verl computes it

    worth = recipe.advantages(scores, completion_mask, group_size=8)
    loss, stats = recipe.loss(logps, old_logps, worth.advantages, worth.completion_mask)

docs/algorithms.md shows all rows, generated from here.
"""

import dataclasses
import difflib
from typing import Any

from rpp_kernels.recipes.algorithms import ALGORITHMS, EXTRAS
from rpp_kernels.recipes.dialects import DIALECTS
from rpp_kernels.recipes.recipe import NAMING, Recipe, Worth

__all__ = ["ALGORITHMS", "DIALECTS", "EXTRAS", "Recipe", "Worth", "recipe"]

_FIELDS = [field.name for field in dataclasses.fields(Recipe) if field.name not in NAMING]


def recipe(name: str, /, *extras: str, dialect: str = "rpp", **overrides: Any) -> Recipe:
    """`Recipe(**ALGORITHMS[name])`, changed by `dialect`, by each of `extras` and by `overrides`, in this order.

    Args:
        name: an algorithm, such as "reinforce_pp", "rloo", "grpo", "dapo", "copg": a key of `ALGORITHMS`.
        extras: what is added to it, such as "dual_clip", "icepop", "entropy_bonus": keys of `EXTRAS`.
        dialect: "rpp" is the papers' definition; "openrlhf", "verl", "trl" and "nemo" are what these compute under the
            same name, with their constants.
        overrides: fields of `Recipe`.

    Raises:
        ValueError: a name that does not exist, or that the dialect does not have; an extra that undoes another, or has
            nothing to work on; an override that is no field, out of its range, or without effect on this algorithm.
    """
    row = dict(_named("name", name, ALGORITHMS))
    if dialect != "rpp":
        row |= _named(f"name, in the dialect {dialect!r}", name, _named("dialect", dialect, {"rpp": {}} | DIALECTS))
    if extras and row.get("loss_function", "policy") != "policy":
        raise ValueError(f"extras: want none for {name!r}, a loss of preferences, got {', '.join(map(repr, extras))}")
    taken = {field: (name, row[field]) for field in row if field == "token_selection"}
    for extra in extras:
        changes = {k: v for k, v in _named("extras", extra, EXTRAS).items() if k != "paper"}
        for field, value in changes.items():
            other, before = taken.setdefault(field, (extra, value))
            if before != value:
                raise ValueError(f"extras: {extra!r} and {other!r} both set {field}, to {value!r} and {before!r}")
        row |= changes
    for field in overrides:
        _named("overrides", field, _FIELDS)
    made = Recipe(**(row | overrides | {"name": name, "dialect": dialect}))
    for field in overrides:
        if field in made.idle:
            raise ValueError(f"{field}: has no effect on {name!r}: {made.idle[field]}")
    if not made.beta and any("kl_place" in EXTRAS[extra] for extra in extras):
        raise ValueError(f"beta: want a positive number for the KL of {', '.join(map(repr, extras))}, got {made.beta}")
    return made


def _named(what: str, name: Any, names: Any) -> Any:
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(str(name).lower(), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what}: want one of {', '.join(map(repr, sorted(names)))}, got {name!r}{hint}")
    return names[name] if isinstance(names, dict) else name
