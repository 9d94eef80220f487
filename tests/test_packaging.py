"""The wheel: what is in it, that it installs alone, and that csrc compiles for a processor we do not have."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), str(source)]
    run(*pip)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_one_abi3_wheel_with_both_packages_and_nothing_else(wheel):
    assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "rpp_kernels",
        "rpp_trainer",
        wheel.name.split("-cp310")[0] + ".dist-info",
    }
    assert [name for name in names if name.endswith(".so")] == ["rpp_kernels/_C.abi3.so"]
    for wanted in ("rpp_kernels/py.typed", "rpp_kernels/ops/logps.py", "rpp_trainer/configs/smollm2.toml"):
        assert wanted in names
    assert any(name.endswith("LICENSE") for name in names)
    # Every kernel for three instruction sets; that of rows of logits, in four dtypes, with sums of squares and without.
    assert zipfile.ZipFile(wheel).getinfo("rpp_kernels/_C.abi3.so").file_size < 25 << 16


@pytest.mark.slow
def test_the_wheel_installs_beside_torch_alone_and_works(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), str(wheel))
    code = (
        "import torch, rpp_kernels as rpp; "
        "x = torch.randn(3, 50, requires_grad=True); "
        "out = rpp.logps_from_logits(x, torch.tensor([1, 2, 3])); "
        "out.logps.sum().backward(); "
        "print(rpp.__file__, torch.ops.rpp_kernels_C.cpu_capability(), bool(x.grad.isfinite().all()))"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert printed.startswith(str(tmp_path))
    assert printed.endswith("True\n")


CROSS_COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CROSS_COMPILER), reason=f"{CROSS_COMPILER} is not installed")
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/cpu/*.cpp")), ids=lambda path: path.name)
def test_kernels_compile_for_aarch64(source, tmp_path):
    includes = [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    flags = ["-c", "-O1", "-std=c++20", "-Wall", "-Werror", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    run(CROSS_COMPILER, *flags, *includes, str(source), "-o", str(tmp_path / "out.o"))


def test_the_extension_was_built_for_the_oldest_torch_that_is_supported():
    setup = (ROOT / "setup.py").read_text()
    assert "0x020a000000000000" in setup  # 2.10
    assert '"torch>=2.10"' in (ROOT / "pyproject.toml").read_text()
    assert tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)
