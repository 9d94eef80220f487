"""Empty stand-ins for what the hosts import and their loss code never calls: ray, tensordict, deepspeed and the like.

A package is replaced only where it is missing, and only while a host is being imported: afterwards the stand-ins are
taken out of `sys.modules`, so that no question elsewhere whether one is installed ever sees them. flash_attn and triton
are not among them: hosts try to import those, and would take another path.
"""

import contextlib
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

NEVER_CALLED = frozenset(
    ["aiohttp", "codetiming", "deepspeed", "orjson", "peft", "pylatexenc", "ray", "tensordict", "vllm"]
)
# Packages whose __init__ pulls in models and clusters; their own modules are the real ones. The last is all cluster.
WITHOUT_INIT = frozenset(["openrlhf.models", "openrlhf.utils"])
CLUSTER = "openrlhf.trainer.ray"


class _Name(type):
    """What a stand-in has of any name: a class to inherit from, and a decorator that changes nothing."""

    def __getattr__(cls, name: str) -> "_Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})

    def __call__(cls, *args: object, **kwargs: object) -> object:
        return args[0] if len(args) == 1 and callable(args[0]) else cls


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        spec = ModuleSpec(name, self, is_package=True)
        if name.startswith(CLUSTER):
            return spec
        if name in WITHOUT_INIT:
            spec.submodule_search_locations = PathFinder.find_spec(name, path).submodule_search_locations
            return spec
        missing = name.partition(".")[0] in NEVER_CALLED and PathFinder.find_spec(name, path) is None
        return spec if missing else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def stubs() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Module)]:
            del sys.modules[name]
