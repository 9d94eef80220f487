"""The gate fails where a kernel takes more than before, and on nothing else."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gate  # noqa: E402

BEFORE = {
    "machine": {"commit": "0123"},
    "made_by": {"compiler": "12.2.0", "valgrind": "valgrind-3.19.0", "torch": "2.13.0", "python": "3.11.7"},
    "kernels": {"avx2 kl_fwd float32": 1000, "avx2 returns_fwd float32": 2000},
    "functions": {"policy_loss": 1000},
    "memory": {"MiB of a loss": 100.0},
}


def changed(kind, name, value, **made_by):
    now = copy.deepcopy(BEFORE)
    now["made_by"] |= made_by
    if value is None:
        del now[kind][name]
    else:
        now[kind][name] = value
    return now


def bad(now, **options):
    return [change.name for change in gate.compared(BEFORE, now, **options) if change.bad]


KL = "avx2 kl_fwd float32"


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.04])
def test_what_stays_within_its_limit_passes(factor, capsys):
    assert gate.judged(BEFORE, changed("kernels", KL, int(1000 * factor))) == 0
    assert "4 compared with commit 0123, 0 beyond" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("kernels", KL, 1100), ("functions", "policy_loss", 1150), ("memory", "MiB of a loss", 115.0)],
)
def test_what_grows_fails_and_is_named(kind, name, value, capsys):
    assert gate.judged(BEFORE, changed(kind, name, value)) == 1
    said = capsys.readouterr().out
    assert name in said
    assert "--write" in said


def test_a_call_that_is_new_or_gone_fails():
    assert bad(changed("kernels", KL, None)) == [KL]
    assert bad(changed("kernels", "avx2 new float32", 1)) == ["avx2 new float32"]


def test_of_some_kernels_the_others_are_not_missed():
    now = changed("kernels", KL, None) | {"functions": {}, "memory": {}}
    assert bad(now, partial=True) == []


def test_another_compiler_has_a_wider_limit_and_says_so(capsys):
    assert gate.judged(BEFORE, changed("kernels", KL, 1200, compiler="13.1.0")) == 0
    assert "GCC 12.2.0, this extension is of GCC 13.1.0" in capsys.readouterr().out
    assert bad(changed("kernels", KL, 1300, compiler="13.1.0")) == [KL]
    assert bad(changed("kernels", KL, 1100, compiler="12.4.0")) == [KL]


def test_public_functions_are_compared_under_the_same_pytorch_and_python(capsys):
    assert gate.judged(BEFORE, changed("functions", "policy_loss", 5000, torch="2.14.0")) == 0
    assert "Not compared: public functions" in capsys.readouterr().out


def test_instructions_are_those_of_each_library_itself():
    dump = """events: Ir
ob=(1) /lib/libtorch_cpu.so
fn=(1) outer
10 7
cob=(2) /here/_C.abi3.so
cfn=(2) kernel
calls=1 20
10 500

ob=(2)
fn=(2)
20 100
+1 300
* 50
cob=(3) /lib/libm.so.6
cfn=(3) log
calls=5 0
* 45

ob=(3)
fn=(3)
0 45
"""
    found = gate.instructions(dump)
    assert found == {"/lib/libtorch_cpu.so": 7, "/here/_C.abi3.so": 450, "/lib/libm.so.6": 45}
    assert sum(n for library, n in found.items() if gate._is_own(library)) == 495


def test_without_valgrind_it_fails_and_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install valgrind" in gate.why_not()


def test_the_committed_result_has_every_call():
    committed = json.loads(gate.COMMITTED.read_text())
    names = {name for name, _, _ in gate.kernel_calls()}
    assert set(committed["kernels"]) == {f"{isa} {name}" for isa in gate.ISAS for name in names}
    assert set(committed["functions"]) == {name for name, _, _ in gate.public_calls()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_one_kernel_passes_and_a_planted_loss_is_caught(capsys):
    before, now = json.loads(gate.COMMITTED.read_text()), gate.measure(["returns_fwd"])
    assert len(now["kernels"]) == 10
    assert gate.judged(before, now, partial=True) == 0, capsys.readouterr().out
    name = "avx2 returns_fwd float32"
    before["kernels"][name] = int(before["kernels"][name] / 1.1)
    assert gate.judged(before, now, partial=True) == 1
    assert name in capsys.readouterr().out
