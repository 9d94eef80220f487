"""benchmarks/gpu.py, as far as it goes without a GPU: nothing that one stage does takes anything from the others."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import emulated
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_cases
from case import OURS
from timing import Sample


def python(code, seconds=10):
    return gpu.Stage("stage", seconds, [sys.executable, "-c", code], {})


def of_name(name):
    return next(case for case, _ in gpu.cases() if case.name == name)


def test_the_stages_fit_into_ten_minutes(tmp_path):
    stages = gpu.stages(tmp_path)
    assert sum(stage.seconds for stage in stages) <= 600
    assert len({stage.name for stage in stages}) == len(stages)


def test_time_that_is_left_over_goes_to_the_next_stage_and_each_keeps_its_share():
    first, *later = python("", 100), python("", 40), python("", 30)
    assert gpu.limit(first, later, 570) == 500
    assert gpu.limit(later[0], later[1:], 470) == 440
    assert gpu.limit(later[1], [], 12) == 12
    assert gpu.limit(first, later, 10) == 5


@pytest.mark.parametrize(
    ("stage", "status"),
    [
        (python("print('well')"), 0),
        (python("print('well'); raise SystemExit(3)"), 3),
        (python("print('well', flush=True); import time; time.sleep(60)"), "time is up"),
    ],
)
def test_what_a_stage_says_is_in_its_log_however_it_ends(stage, status, tmp_path):
    done = gpu.run_stage(stage, tmp_path, 3)
    assert done["status"] == status
    assert done["seconds"] < 10
    assert (tmp_path / "stage.log").read_text() == "well\n"


def test_a_stage_that_cannot_start_or_fails_does_not_stop_the_next(tmp_path):
    missing = gpu.Stage("missing", 1, ["/no/such/program"], {})
    variable = gpu.Stage(
        "last", 1, [sys.executable, "-c", "import os; print(os.environ['OF_STAGE'])"], {"OF_STAGE": "x"}
    )
    done = gpu.run_all([missing, python("raise SystemExit(1)"), variable], tmp_path / "out", 30)
    assert "No such file" in done[0]["status"]
    assert [stage["status"] for stage in done[1:]] == [1, 0]
    assert json.loads((tmp_path / "out" / "stages.json").read_text()) == done
    assert (tmp_path / "out" / "last.log").read_text() == "x\n"


def test_the_cases_have_logits_of_a_large_vocabulary_and_all_that_moves_bytes():
    names = [case.name for case, _ in gpu.cases()]
    assert len(set(names)) == len(names) > 6
    assert of_name("logps_entropy_bf16").floor.amount["forward"] == 8192 * 151936 * 2
    assert of_name("policy_loss_of_logits_bf16").floor.amount["forward"] == 8192 * 131072 * 4
    assert of_name("linear_policy_loss_16384_131072_4096").floor.amount["both"] == 6 * 16384 * 131072 * 4096


def test_rows_say_bytes_a_second_and_the_share_of_a_copy():
    case = of_name("logps_entropy_bf16")
    samples = {"floor": [Sample(1e-3, 2e-3)] * 3, OURS: [Sample(2e-3, 2e-3)] * 3}
    rows = gpu.rows_of(case, samples, {OURS: 1e-3})
    ours = {row["phase"]: row for row in rows if row["competitor"] == OURS}
    assert math.isclose(ours["forward"]["rate"], 8192 * 151936 * 2 / 2e-3 / 1e9)
    assert ours["forward"]["floor_share"] == 0.5
    assert ours["both"]["median_ms"] == 4
    assert [ours[phase]["error"] for phase in ("forward", "both")] == [None, 1e-3]
    assert json.loads(json.dumps(rows)) == rows


def test_who_is_wrong_or_fails_is_not_timed_and_the_reason_is_kept():
    case = of_name("dpo_loss")
    right = case.competitors["eager"]()

    def fails(**inputs):
        raise RuntimeError("no such thing")

    everyone = {
        "right": lambda: right,
        "wrong": lambda: lambda **inputs: tuple(1 + x for x in right(**inputs)),
        "fails": lambda: fails,
    }
    works, errors, notes = gpu.green(type(case)(**{**vars(case), "competitors": everyone, "left_out": {}}), case.data())
    assert set(works) == set(errors) == {"right"}
    assert errors["right"] < case.tolerance
    assert "wrong is wrong" in dict(notes)["wrong"]
    assert dict(notes)["fails"] == "no such thing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_copy_is_timed_on_the_gpu():
    case = of_name("dpo_loss")
    host = {"floor": []}
    works = {"floor": gpu.copy_of(case)}
    sample = gpu.stopwatch(works, host)(works["floor"])
    assert 0 < sample.forward < 0.1
    assert len(host["floor"]) == 1


@pytest.mark.parametrize("name", ["rpp-kernels, CUDA, one read", "rpp-kernels, CUDA, two reads"])
def test_the_goals_are_right_in_small(name, monkeypatch):
    """On the emulated kernels, under the name of those that a GPU would run."""
    if emulated.PROBLEM:
        pytest.skip(emulated.PROBLEM)
    monkeypatch.setattr(torch.ops, "rpp_kernels_C", emulated.kernels())
    monkeypatch.setitem(gpu_cases.BACKENDS, "CUDA", "emulated")
    case = gpu_cases.one_read(8, 1000, "cpu")
    case = dataclasses.replace(case, competitors={name: case.competitors[name]}, check_every=1)
    works, errors, notes = gpu.green(case, case.data())
    assert set(works) == {name}, notes
    assert errors[name] < case.tolerance


def test_heads_are_right_in_small(monkeypatch):
    if emulated.PROBLEM:
        pytest.skip(emulated.PROBLEM)
    monkeypatch.setitem(gpu_cases.BACKENDS, "CUDA", "emulated")
    _, case = gpu_cases.head(128, 200, 32, "cpu")
    ours = {name: f for name, f in case.competitors.items() if "Triton" not in name}
    works, _, notes = gpu.green(dataclasses.replace(case, competitors=ours), case.data())
    assert set(works) == set(ours), notes
