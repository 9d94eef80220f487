"""Writes the generated tables of the documentation. `python docs/tables.py --check` fails where one is out of date."""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

import rpp_kernels as rpp
from rpp_kernels.backends import triton
from rpp_kernels.recipes import ALGORITHMS, DIALECTS, EXTRAS, Recipe

ROOT = Path(__file__).parents[1]

# Public function -> the kernels of a backend that it is made of; none of those that are plain PyTorch everywhere.
KERNELS = {
    "linear_policy_loss": ["chunk_logps_fwd", "chunk_logps_bwd_out", "policy_loss_fwd"],
    "linear_loss": ["chunk_logps_fwd", "chunk_logps_bwd_out"],
    "linear_logps": ["chunk_logps_fwd", "chunk_logps_bwd_out"],
    "logps_from_logits": ["logps_fwd", "logps_bwd_out"],
    "kl_penalty": ["kl_fwd", "kl_bwd"],
    "token_rewards": ["token_rewards_fwd", "token_rewards_bwd"],
    "normalize_rewards": ["moments", "whiten_out", "whiten_bwd"],
    "overlong_penalty": [],
    "returns": ["returns_fwd", "returns_bwd"],
    "gae": ["gae_fwd", "gae_bwd"],
    "whiten": ["moments", "whiten_out", "whiten_bwd"],
    "group_advantages": ["group_advantages_fwd", "group_advantages_bwd"],
    "best_of_group": [],
    "informative_groups": [],
    "reinforce_pp_advantages": ["reinforce_pp_fwd", "whiten_out"],
    "policy_loss": ["policy_loss_fwd"],
    "value_loss": ["value_loss_fwd"],
    "num_items_in_batch": [],
    "sum_over_ranks": [],
    "rollout_weights": ["rollout_weights_fwd"],
    "top_entropy_mask": [],
    "clip_cov_weights": [],
    "kl_cov_mask": [],
    "dpo_loss": ["dpo_loss_fwd", "preference_loss_bwd"],
    "copg_loss": ["copg_loss_fwd", "preference_loss_bwd"],
}


GPU_RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
CUDA_RESULTS = ROOT / "benchmarks" / "results" / "cuda.json"
TYPES = {"float": "float32", "double": "float64", "bf16": "bfloat16", "__half": "float16"}  # C++'s name: torch's


def native_cell(kernels: list[str]) -> str:
    dispatched = torch._C._dispatch_has_kernel_for_dispatch_key
    return "yes" if all(dispatched(f"rpp_kernels_C::{k}", "CPU") for k in kernels) else "no"


def cuda_cell(kernels: list[str]) -> str:
    """By the sources: what is installed for development has no CUDA kernels."""
    declared = re.findall(r"X\((\w+)\)", (ROOT / "csrc" / "ops.h").read_text())
    if not set(kernels) <= set(declared):
        return "no"
    return "yes" if GPU_RESULTS.exists() else "not run yet"


def triton_cell(kernels: list[str]) -> str:
    if not all(hasattr(triton.kernels(), k) for k in kernels):
        return "no"
    return "yes" if GPU_RESULTS.exists() else "not run yet"


def ops_table() -> str:
    functions = [n for n in rpp.__all__ if inspect.isfunction(getattr(rpp, n)) and n not in ("recipe", "use_backend")]
    if sorted(functions) != sorted(KERNELS):
        raise SystemExit(f"docs/tables.py: KERNELS does not list {sorted(set(functions) ^ set(KERNELS))}")
    rows = []
    for name, kernels in KERNELS.items():
        what = inspect.getdoc(getattr(rpp, name)).splitlines()[0].rstrip(".").replace("|", "\\|")
        cells = [native_cell(kernels), cuda_cell(kernels), triton_cell(kernels)] if kernels else ["PyTorch"] * 3
        rows.append([f"`{name}`", what, "yes", *cells])
    return markdown(["function", "what it gives", "reference", "native, CPU", "native, CUDA", "Triton, GPU"], rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


# The axes of a recipe and the fields that say where on each it stands; the first one names the place.
AXES = {
    "advantage": ["baseline", "std", "group_scale", "time", "gamma", "gae_lambda", "gap", "whiten", "whiten_eps_mode"],
    "KL": ["kl_place", "kl_estimator", "kl_gradient", "kl_clamp", "kl_bias_correction", "beta"],
    "surrogate": ["surrogate", "epsilon_low", "epsilon_high", "dual_clip", "tau_positive", "tau_negative"],
    "ratio of": ["importance_sampling_level"],
    "reduction": ["reduction"],
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Recipe)}
NAMING = ("name", "paper", "equation", "dialect")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " to ".join(map(shown, value)) if isinstance(value, tuple) else str(value)


def axis(recipe: Recipe, fields: list[str]) -> str:
    """The place on an axis, and every constant there that is not the default."""
    first, *others = ((field, getattr(recipe, field)) for field in fields)
    if first[1] == "none" and first[0] == "kl_place":
        return "none"
    said = [f"{field} {shown(value)}" for field, value in others if value != DEFAULTS[field]]
    return ", ".join([shown(first[1]), *said])


def algorithms_table() -> str:
    in_axes = {field for fields in AXES.values() for field in fields}
    rows = []
    for name in ALGORITHMS:
        recipe = rpp.recipe(name)
        extras = [f for f in DEFAULTS if f not in in_axes and f not in NAMING and getattr(recipe, f) != DEFAULTS[f]]
        cells = [axis(recipe, fields) for fields in AXES.values()]
        if recipe.loss_function != "policy":
            cells = ["pairs", axis(recipe, AXES["KL"]), f"`{recipe.loss_function}_loss`", "sequence", "mean"]
        more = ", ".join(f"{field} {shown(getattr(recipe, field))}" for field in extras) or "-"
        equation = recipe.equation.replace("|", "\\|")
        rows.append([f"`{name}`", recipe.paper, equation, *cells, more])
    return markdown(["algorithm", "source", "loss of a token", *AXES, "other"], rows)


def extras_table() -> str:
    rows = []
    for name, row in EXTRAS.items():
        fields = ", ".join(f"{field} {shown(value)}" for field, value in row.items() if field != "paper")
        rows.append([f"`{name}`", row["paper"], fields])
    return markdown(["extra", "source", "sets"], rows)


def dialects_table() -> str:
    """A row for each field in which a dialect differs from the papers' algorithm."""
    rows = []
    for name in ALGORITHMS:
        ours = rpp.recipe(name)
        theirs = {host: rpp.recipe(name, dialect=host) for host, names in DIALECTS.items() if name in names}
        for field in DEFAULTS:
            values = [getattr(r, field) for r in theirs.values()]
            if field in NAMING or all(value == getattr(ours, field) for value in values):
                continue
            cells = []
            for host in DIALECTS:
                value = getattr(theirs.get(host), field, None)
                same = host in theirs and value == getattr(ours, field)
                cells.append("-" if host not in theirs else "" if same else shown(value))
            rows.append([f"`{name}`", field, shown(getattr(ours, field)), *cells])
    return markdown(["algorithm", "field", "rpp", *DIALECTS], rows)


def cuda_table() -> str:
    """One line for each kernel and the types it is for: of its variants the most registers and the least occupancy."""
    result = json.loads(CUDA_RESULTS.read_text())
    archs = list(dict.fromkeys(row["arch"] for row in result["rows"]))
    groups: dict[tuple[str, str, int], dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        types = [TYPES[word] for word in row["variant"].split(", ") if word in TYPES]
        kind = (row["kernel"], " to ".join(dict.fromkeys(types)), row["threads"])
        groups.setdefault(kind, {}).setdefault(row["arch"], []).append(row)
    rows = []
    for (kernel, types, threads), of in groups.items():
        worst = [f"{max(r['registers'] for r in of[a])}, {min(r['occupancy'] for r in of[a]):.0%}" for a in archs]
        rows.append([f"`{kernel}`", types, str(len(of[archs[0]])), str(threads), *worst])
    table = markdown(["kernel", "dtype", "variants", "threads", *archs], rows)
    return f"Compiled by nvcc {result['nvcc']}. Each cell: registers, share of a multiprocessor's warps.\n\n{table}"


TABLES = {
    ROOT / "README.md": {"ops": ops_table},
    ROOT / "docs" / "cuda.md": {"kernels": cuda_table},
    ROOT / "docs" / "algorithms.md": {
        "algorithms": algorithms_table,
        "extras": extras_table,
        "dialects": dialects_table,
    },
}


def with_table(text: str, name: str, table: str) -> str:
    pattern = rf"(<!-- generated by docs/tables\.py: {name} -->\n).*?(<!-- end -->)"
    if len(re.findall(pattern, text, flags=re.S)) != 1:
        raise SystemExit(f"there is no place for the table {name!r}")
    return re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.S)


def main() -> None:
    for path, tables in TABLES.items():
        text = wanted = path.read_text()
        for name, table in tables.items():
            wanted = with_table(wanted, name, table())
        if "--check" in sys.argv[1:] and wanted != text:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date: run `python docs/tables.py`")
        path.write_text(wanted)


if __name__ == "__main__":
    main()
