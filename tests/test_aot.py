"""The Triton kernels compile for GPUs that are not there, need no more of them than they may, and are tuned by data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "rpp_kernels/backends/triton").glob("*.py"))

pytest.importorskip("triton")
sys.path.insert(0, str(ROOT / "benchmarks"))

from aot import GPUS, MOST_WARPS, Row, declared, kernels, problems, programs_at_once  # noqa: E402

from rpp_kernels.backends.triton import tuning  # noqa: E402


def run(*command):
    """In a process of its own, in which Triton compiles: here it interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, cwd=ROOT)


# ---------------------------------------------------------------- what is compiled


def test_the_greediest_variant_of_each_kernel_keeps_to_its_limits_and_to_the_committed_figures():
    done = run("benchmarks/aot.py", "--arch", "sm_90", "--quick", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"])
def test_every_variant_compiles_and_keeps_to_its_limits_and_to_the_committed_figures(arch):
    done = run("benchmarks/aot.py", "--arch", arch, "--full", "--check")
    assert done.returncode == 0, done.stderr


GREEDY = """
import torch, triton, triton.language as tl
from aot import _row, pretend

@triton.jit
def greedy_kernel(out, x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    y = tl.load(x + at)
    tl.store(out + at, tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [y], tl.float32, True, 1))
    tl.debug_barrier()
    tl.store(out + BLOCK + at, y)

rows = []
def compile(kernel, programs, arguments, options):
    compiled = kernel.warmup(*arguments, grid=(programs,), **options)
    rows.append(_row("greedy_kernel", "", torch.float32, "sm_90", compiled, options))

with pretend("sm_90", compile):
    from rpp_kernels.backends.triton import launch
    launch.run(greedy_kernel, 1, (torch.empty(1), torch.empty(1)), {"BLOCK": 32768, "num_warps": 2})
print(rows[0])
"""


def test_a_kernel_that_spills_is_seen_to(tmp_path):
    file = tmp_path / "greedy.py"  # Triton reads the source of a kernel
    file.write_text(GREEDY)
    done = run(file)
    assert done.returncode == 0, done.stderr
    row = eval(done.stdout, {"Row": Row})
    assert row.spills > 0
    assert row.inline_assembly
    said = "\n".join(problems([row]))
    assert re.search(r"spills \d+ bytes\n.* has inline assembly", said), said


def test_what_a_kernel_may_not_need_is_said():
    row = Row("k", "v", "float32", "sm_90", 255, 8, 0, 1024, 32, 0, 0.0, True)
    assert [re.sub(r".*\) ", "", line) for line in problems([row])] == [
        "spills 8 bytes",
        "has 32 warps, more than 16",
        "leaves less than 2 warps to each scheduler: 255 registers",
        "has inline assembly",
    ]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 32, 0, 4, 16),  # all 64 warps
        ("sm_90", 33, 0, 4, 12),  # given out as 40: 12 warps for each scheduler
        ("sm_90", 255, 0, 4, 2),
        ("sm_90", 255, 0, 16, 0),  # two warps for each scheduler, and the program wants four
        ("sm_90", 16, 0, 1, 32),  # no more programs, though there is room
        ("sm_90", 32, 100 << 10, 4, 2),
        ("sm_80", 32, 100 << 10, 4, 1),
        ("sm_80", 32, 164 << 10, 4, 0),  # of which the system has its part
        ("gfx942", 64, 0, 4, 8),
        ("gfx942", 65, 0, 4, 7),
        ("gfx942", 24, 20 << 10, 4, 3),
    ],
)
def test_as_many_programs_run_at_once_as_registers_and_shared_memory_allow(arch, registers, shared, warps, programs):
    assert programs_at_once(GPUS[arch], registers, shared, warps) == programs


# ---------------------------------------------------------------- what is declared


def test_every_row_of_the_tuning_table_is_of_a_kernel_and_every_kernel_has_one():
    assert {kernel for kernel, _, _ in tuning.TABLE} == declared()
    for arch in (None, "interpreter"):
        assert {kernel for kernel, dtype, a in tuning.TABLE if (dtype, a) == (None, arch)} == declared()


@pytest.mark.parametrize("key", tuning.TABLE, ids=str)
def test_blocks_and_warps_are_powers_of_two_and_say_where_they_come_from(key):
    config = tuning.TABLE[key]
    assert config.block & (config.block - 1) == 0 < config.block
    assert config.warps & (config.warps - 1) == 0 < config.warps <= MOST_WARPS
    assert config.source


def test_every_exported_kernel_is_a_function_of_its_file():
    assert kernels()
    for name, function in kernels().items():
        assert function.__name__ == name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_grids_have_one_dimension_and_offsets_64_bits(path):
    source = path.read_text()
    assert not re.search(r"program_id\((?!0\))", source)
    for of_32_bits in re.findall(r"tl\.program_id\(0\)(?!\.to\(tl\.int64\))", source):
        raise AssertionError(f"{path.name}: {of_32_bits} is to be cast to int64 at once")
