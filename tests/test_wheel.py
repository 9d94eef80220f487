"""The wheel: what is in it, what its kernels need, and that it works alone, beside each torch that it promises to.

It has CUDA kernels where there is an nvcc. `make wheel` does the same for a wheel to be kept.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton")  # benchmarks/aot.py knows how many warps fit on a GPU
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import build_wheel as making  # noqa: E402

import setup  # noqa: E402

# ---------------------------------------------------------------- what setup.py builds


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def test_an_nvcc_that_will_do_is_taken(home, monkeypatch):
    script(home / "bin/nvcc", 'echo "Cuda compilation tools, release 12.8, V12.8.1"')
    monkeypatch.setenv("RPP_KERNELS_BUILD", "cuda")
    assert setup.with_cuda() == str(home)
    monkeypatch.delenv("RPP_KERNELS_BUILD")
    assert setup.with_cuda() == str(home)
    monkeypatch.setenv("RPP_KERNELS_BUILD", "cpu")
    assert setup.with_cuda() is None


@pytest.mark.parametrize(
    ("nvcc", "why"),
    [
        (None, "there is no nvcc"),
        ("exit 1", "there is no nvcc"),
        ('echo "release 12.6, V12.6.20"', "want nvcc 12.8 or later"),
        ("echo hello", "is hello"),
    ],
)
def test_without_an_nvcc_that_will_do_auto_says_why_and_cuda_fails(nvcc, why, home, monkeypatch, capsys):
    if nvcc:
        script(home / "bin/nvcc", nvcc)
    monkeypatch.setenv("RPP_KERNELS_BUILD", "auto")
    assert setup.with_cuda() is None
    assert why in capsys.readouterr().out
    monkeypatch.setenv("RPP_KERNELS_BUILD", "cuda")
    with pytest.raises(SystemExit, match=why):
        setup.with_cuda()


def test_another_word_is_an_error(monkeypatch):
    monkeypatch.setenv("RPP_KERNELS_BUILD", "gpu")
    with pytest.raises(SystemExit, match="want auto, cpu or cuda, got 'gpu'"):
        setup.with_cuda()


SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(float* p, int n) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = p[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i * 7 + 3) % 64] + p[k];
#pragma unroll
  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = x[i];
}
"""


def test_a_kernel_that_spills_fails_the_build(tmp_path):
    try:
        nvcc = f"{setup.cuda_home()}/bin/nvcc"
    except setup.NoCUDA as why:
        pytest.skip(str(why))
    (tmp_path / "spills.cu").write_text(SPILLS)
    one_gpu = [flag for flag in setup.NVCC_FLAGS if "gencode" not in flag] + ["-arch=sm_80"]
    with pytest.raises(RuntimeError, match="Registers are spilled to local memory"):
        making.run(nvcc, *one_gpu, "-c", tmp_path / "spills.cu", "-o", tmp_path / "spills.o")


# ---------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def kind():
    try:
        setup.cuda_home()
    except setup.NoCUDA:
        return "cpu"
    return "cuda"


@pytest.fixture(scope="module")
def wheel(kind, tmp_path_factory):
    return making.build(tmp_path_factory.mktemp("wheel"), kind)


@pytest.mark.slow
def test_both_packages_and_nothing_else(wheel, kind):
    assert making.wrong_contents(wheel) == []
    # CPU: every kernel for three instruction sets; that of rows in four dtypes, with sums of squares and without.
    assert wheel.stat().st_size < (2 << 20 if kind == "cpu" else 12 << 20)


@pytest.mark.slow
def test_no_kernel_spills_and_the_committed_figures_are_of_these(wheel, kind):
    if kind == "cpu":
        pytest.skip("there is no nvcc")
    rows, ptx = making.kernels_of(wheel)
    assert making.wrong_kernels(rows, ptx) == []
    assert not making.stale(rows), "run `make wheel`"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("auditwheel"), reason="auditwheel is not installed: `make wheel`")
def test_the_audit(wheel, tmp_path):
    assert "manylinux_2_34" in making.audited(wheel, tmp_path).name


def environment(folder, *requirements):
    try:
        return making.environment(Path(folder), *requirements)
    except RuntimeError as error:
        pytest.skip(f"{requirements[0]} cannot be installed: {str(error).strip().splitlines()[-1]}")


@pytest.mark.slow
def test_it_works_beside_torch_alone(wheel, kind, tmp_path):
    python = environment(tmp_path, f"torch=={torch.__version__.split('+')[0]}")
    assert str(tmp_path) in making.try_out(wheel, python, kind)


# The oldest that is supported, and the newest when this was written; the registry has both with CUDA alone.
TORCHES = ("2.10.0", "2.15.0")
DISK = 16 << 30

# What torch does not promise, and rpp_kernels uses: each comes up in one of these calls.
PRIVATE = """
import tempfile, torch, torch.distributed as dist, rpp_kernels as rpp
assert torch.__version__.startswith({version!r}), torch.__version__

dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
x = torch.randn(3, 4)
torch.testing.assert_close(rpp.whiten(x, process_group=dist.group.WORLD), rpp.whiten(x))  # _resolve_process_group
dist.destroy_process_group()

h, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
out = rpp.linear_loss(h, w, torch.arange(5), lambda logps, entropy, rows: -logps)
(kept,) = torch.autograd.grad(out.loss, h, retain_graph=True)  # _get_current_graph_task_keep_graph
ones = torch.eye(2)[0]
both = torch.autograd.grad(out.loss, h, ones, is_grads_batched=True, retain_graph=True)[0]  # is_batchedtensor
torch.testing.assert_close(both[0], kept)
torch.testing.assert_close(torch.autograd.grad(out.loss, h)[0], kept)

with torch.autograd.forward_ad.dual_level():  # forward_ad._current_level
    try:
        rpp.kl_penalty(torch.autograd.forward_ad.make_dual(x, x), x)
    except Exception as error:
        print(type(error).__name__, error)
    else:
        raise AssertionError("a tangent was lost")
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", TORCHES)
def test_it_works_beside_other_torches_and_those_with_cuda(wheel, kind, version):
    if shutil.disk_usage(tempfile.gettempdir()).free < DISK:
        pytest.skip(f"torch {version} with CUDA and what pip unpacks want {DISK >> 30} GiB of disk")
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which would stay
        python = environment(f"{folder}/venv", f"torch=={version}", "pytest", "hypothesis", "numpy")
        making.try_out(wheel, python, kind)
        shutil.copytree(ROOT / "tests", f"{folder}/tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RPP_KERNELS"))}
        clean["OMP_NUM_THREADS"] = "1"
        making.run(python, "-c", PRIVATE.format(version=version), cwd=folder, env=clean)
        ops = ["tests/ops/test_kl.py", "tests/ops/test_logps.py"]
        making.run(python, "-m", "pytest", "-q", "-k", "native", *ops, cwd=folder, env=clean)
