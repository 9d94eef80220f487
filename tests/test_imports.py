"""Who may import whom (DESIGN.md): the arrows of the architecture, held."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*ROOT.glob("rpp_kernels/**/*.py"), *ROOT.glob("python/rpp_trainer/**/*.py")])

# Layer -> what it may import of this project. The first layer whose prefix fits a module is its own.
ALLOWED = {
    "rpp_kernels.reference": ("rpp_kernels.reference", "rpp_kernels.distributed"),
    "rpp_kernels.distributed": (),
    "rpp_kernels.backends": ("rpp_kernels.backends",),
    "rpp_kernels.ops": ("rpp_kernels.ops", "rpp_kernels.backends", "rpp_kernels.reference", "rpp_kernels.distributed"),
    "rpp_kernels.recipes": (
        "rpp_kernels.recipes",
        "rpp_kernels.ops",
        "rpp_kernels.reference",
        "rpp_kernels.distributed",
    ),
    "rpp_kernels.integrations": ("rpp_kernels.integrations", "rpp_kernels.recipes", "rpp_kernels.ops"),
    "rpp_kernels.testing": ("rpp_kernels",),
    "rpp_kernels": ("rpp_kernels",),  # __init__ and __main__ gather the rest
    "rpp_trainer": ("rpp_trainer", "rpp_kernels"),
}
# What the library may need of others; the trainer brings its own through the extra `train`.
THIRD_PARTY = {"torch"}


def name_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "python" if "rpp_trainer" in path.parts else ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from rpp_kernels import reference` imports the module rpp_kernels.reference
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows(path):
    module = name_of(path)
    layer = next(layer for layer in ALLOWED if within(module, layer))
    ours = {name for name in imports_of(path) if within(name, "rpp_kernels") or within(name, "rpp_trainer")}
    wrong = {name for name in ours if not any(within(name, allowed) for allowed in ALLOWED[layer])}
    assert not wrong, f"{module} is in the layer {layer}, which may not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [p for p in MODULES if within(name_of(p), "rpp_trainer")], ids=name_of)
def test_the_trainer_uses_public_names_only(path):
    import rpp_kernels

    public = {f"rpp_kernels.{name}" for name in rpp_kernels.__all__} | {"rpp_kernels"}
    assert {name for name in imports_of(path) if within(name, "rpp_kernels")} <= public


@pytest.mark.parametrize("path", [p for p in MODULES if within(name_of(p), "rpp_kernels")], ids=name_of)
def test_the_library_needs_torch_and_nothing_else(path):
    roots = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"rpp_kernels"}
    triton = {"triton"} if within(name_of(path), "rpp_kernels.backends.triton") else set()
    assert roots <= THIRD_PARTY | triton


def test_importing_the_library_brings_no_heavy_package():
    code = (
        "import sys, rpp_kernels; heavy = ('transformers', 'matplotlib', 'rich', 'rpp_trainer', 'numpy.testing', "
        "'rpp_kernels.backends.triton.math'); print([m for m in heavy if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_listed_and_documented():
    import rpp_kernels

    assert len(set(rpp_kernels.__all__)) == len(rpp_kernels.__all__)  # ruff keeps it in order
    for name in rpp_kernels.__all__:
        assert getattr(rpp_kernels, name).__doc__, f"{name} has no docstring"


# How a call is carried out, of which the spec knows nothing.
EXECUTION = {"chunk_bytes", "keep_bytes", "skip_rows", "batch_invariant", "inplace_backward"}


def test_public_functions_have_the_signatures_of_the_spec():
    import inspect

    import rpp_kernels
    from rpp_kernels import reference

    for name in rpp_kernels.__all__:
        public = getattr(rpp_kernels, name)
        if inspect.isfunction(public) and name not in ("recipe", "use_backend"):
            ours, spec = (inspect.signature(getattr(f, name)).parameters for f in (rpp_kernels, reference))
            said = {k: (v.kind, v.default) for k, v in ours.items() if k not in EXECUTION}
            assert list(said.items()) == [(k, (v.kind, v.default)) for k, v in spec.items()], name
            assert all(v.kind == v.KEYWORD_ONLY for k, v in ours.items() if k in EXECUTION), name
