"""That csrc compiles for a processor we do not have, and which torch the extension is for. The wheel: test_wheel.py."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def test_the_source_distribution_has_all_that_is_compiled(tmp_path):
    copy = tmp_path / "copy"  # setuptools writes its .egg-info beside setup.py
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(lambda name: name and (ROOT / name).is_file(), names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    run(
        sys.executable,
        "setup.py",
        "-q",
        "sdist",
        "-d",
        str(tmp_path),
        cwd=copy,
        env={**os.environ, "RPP_KERNELS_BUILD": "cpu"},
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")} | {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
    }
    assert wanted <= inside, wanted - inside
