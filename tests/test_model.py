"""What the model predicts is near what was measured, as the committed results have it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import model  # noqa: E402
import scaling  # noqa: E402

HEAD = ["--tokens", "1024", "--vocab", "32000", "--hidden", "64"]


def test_memory_is_within_a_fifth_of_what_was_measured():
    """Or within 32 MiB, of which an allocator keeps what was freed."""
    rows = [row for row in model.checks() if row.what.startswith("peak")]
    assert len(rows) > 20
    for row in rows:
        assert abs(row.predicted - row.measured) < max(0.2 * row.measured, 32 * model.MIB), row


def test_time_is_within_a_factor_of_what_was_measured():
    rows = [row for row in model.checks() if row.what.startswith("seconds")]
    assert len(rows) > 50
    for row in rows:
        assert 1 / 2 < row.predicted / row.measured < 2, row


def test_more_tokens_take_no_more_memory_but_for_what_is_as_long():
    few, many = (model.peak(model.Shape(T, 151936, 64, "bfloat16"), model.FUSED, cpu=False) for T in (1 << 14, 1 << 20))
    per_token = (many - few) / ((1 << 20) - (1 << 14))
    assert per_token < 2 * 64 + 100


@pytest.mark.parametrize("device", model.GPUS)
def test_a_gpu_takes_at_least_what_its_products_take(device):
    shape, gpu = model.Shape(8192, 128256, 4096, "bfloat16"), model.GPUS[device]
    bare = 3 * shape.flops / gpu.half
    fused, then, eager = (model.gpu_seconds(shape, name, gpu) for name in model.CONTESTANTS)
    assert bare < fused < 1.5 * bare
    assert fused < then < eager * 4 / 3


def test_chunks_are_those_of_the_package():
    tokens, gradients = model.chunks(model.Shape(1024, 32000, 64), cpu=True)
    assert gradients == 0
    import rpp_kernels as rpp
    from rpp_kernels.ops.chunks import Chunks

    seen, project = [], Chunks.project
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Chunks, "project", lambda self, rows, *rest: (seen.append(len(rows)), project(self, rows, *rest))[1]
        )
        with torch.no_grad():
            rpp.linear_logps(torch.zeros(1024, 64), torch.zeros(32000, 64), torch.zeros(1024, dtype=torch.long))
    assert max(seen) == tokens


def test_a_power_law_is_fitted_over_the_larger_sizes():
    fit = scaling.fitted([(n, 100.0 if n < 16 else 3 * n**1.5) for n in (1, 4, 16, 64, 256)])
    assert fit["exponent"] == pytest.approx(1.5)
    assert fit["at_1"] == pytest.approx(3)
    assert (fit["from"], fit["to"]) == (16, 256)


@pytest.mark.parametrize(
    "how", [["-m", "benchmarks.model"], [str(ROOT / "benchmarks/model.py")]], ids=["module", "script"]
)
def test_it_answers_as_a_module_and_as_a_script(how):
    command = [sys.executable, *how, *HEAD, "--available-gib", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ours, _, eager = (line for line in done.stdout.splitlines() if line.startswith(model.CONTESTANTS) and "ms" in line)
    assert ours.endswith("fits")
    assert "does not fit" in eager


def test_bad_input_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.model", "--tokens", "-1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "--tokens: want a positive integer, got -1" in done.stderr
