"""benchmarks/gpu.py, as far as it goes without a GPU: nothing that one stage does takes anything from the others."""

import dataclasses
import functools
import json
import math
import os
import sys
from pathlib import Path

import emulated
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_cases
import timing
from case import OURS
from timing import Sample, Work, results, run_once


def python(code, seconds=10):
    return gpu.Stage("stage", seconds, [sys.executable, "-c", code], {})


def all_cases():
    return [*gpu.cases("heads"), *gpu.cases("bytes")]


def of_name(name):
    return next(case for case, _ in all_cases() if case.name == name)


@pytest.fixture
def here(monkeypatch):
    """What the script asks of CUDA, answered without it."""
    monkeypatch.setattr(gpu, "machine", lambda commit: {"commit": commit or "this"})
    monkeypatch.setattr(gpu, "peak_mib", lambda work: len(results(work)))
    monkeypatch.setattr(gpu, "copy_of", lambda case: case.floor.work())
    monkeypatch.setattr(gpu, "stopwatch", without_events)
    monkeypatch.setattr(gpu, "timed", functools.partial(gpu.timed, seconds=0))
    monkeypatch.setattr(timing, "interleave", functools.partial(timing.interleave, rounds=2))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    monkeypatch.setattr(gpu_cases, "HEADS", ((64, 100, 16), (128, 100, 16)))
    monkeypatch.setattr(gpu_cases, "BACKENDS", {"CUDA": "native", "Triton": "reference"})
    for name in ("head", "logps_head", "cross_entropy_head"):
        monkeypatch.setattr(gpu_cases, name, functools.partial(getattr(gpu_cases, name), device="cpu"))


def without_events(works, host):
    def run(work):
        for times in host.values():
            times.append(1.0)
        return run_once(work)

    return run


def test_the_stages_fit_into_ten_minutes(tmp_path):
    wheel = tmp_path / "peer-1-py3-none-any.whl"
    wheel.touch()
    stages = gpu.stages(tmp_path, tmp_path)
    assert sum(stage.seconds for stage in stages) <= 600
    assert len({stage.name for stage in stages}) == len(stages)
    peers = next(stage for stage in stages if stage.name == "peers")
    assert str(wheel) in peers.command
    assert [stage.name for stage in stages if stage is not peers] == [stage.name for stage in gpu.stages(tmp_path)]


def test_what_is_worth_most_comes_first(tmp_path):
    names = [stage.name for stage in gpu.stages(tmp_path)]
    assert names[:5] == ["build", "tests", "heads", "curve", "bytes"]
    assert gpu.cases("heads")[0][0].name == "linear_policy_loss_8192_151936_4096"


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
    names = [case.name for case, _ in all_cases()]
    assert len(set(names)) == len(names) > 6
    assert of_name("logps_entropy_bf16").floor.amount["forward"] == 8192 * 151936 * 2
    assert of_name("policy_loss_of_logits_bf16").floor.amount["forward"] == 8192 * 131072 * 4
    assert of_name("linear_policy_loss_16384_131072_4096").floor.amount["both"] == 6 * 16384 * 131072 * 4096


def test_rows_say_bytes_a_second_and_the_share_of_a_copy():
    case = of_name("logps_entropy_bf16")
    ours = f"{OURS}, CUDA"
    samples = {"floor": [Sample(1e-3, 2e-3)] * 3, ours: [Sample(2e-3, 2e-3)] * 3}
    rows = gpu.rows_of(case, samples, {ours: 1e-3}, {ours: 5.0})
    ours = {row["phase"]: row for row in rows if row["competitor"] == ours}
    assert math.isclose(ours["forward"]["rate"], 8192 * 151936 * 2 / 2e-3 / 1e9)
    assert ours["forward"]["floor_share"] == 0.5
    assert ours["both"]["median_ms"] == 4
    assert [ours[phase]["error"] for phase in ("forward", "both")] == [None, 1e-3]
    assert [ours[phase]["peak_extra_mib"] for phase in ("forward", "both")] == [None, 5.0]
    assert ours["both"]["times_ours"] == 1
    assert json.loads(json.dumps(rows)) == rows


def test_who_is_wrong_or_fails_is_not_timed_and_the_reason_is_kept(here, tmp_path):
    case = of_name("dpo_loss")
    right = case.competitors["eager"]()

    def fails(**inputs):
        raise RuntimeError("no such thing")

    everyone = {
        "right": lambda: right,
        "wrong": lambda: lambda **inputs: tuple(1 + x for x in right(**inputs)),
        "fails": lambda: fails,
    }
    case = dataclasses.replace(case, competitors=everyone, left_out={})
    works, errors, notes = gpu.green(case, case.data(), gpu.Record(tmp_path, ""))
    assert set(works) == set(errors) == {"right"}
    assert errors["right"] < case.tolerance
    assert "wrong" in notes["wrong"]
    assert "no such thing" in notes["fails"]


def test_who_leaves_the_device_unusable_is_left_out_and_the_stage_starts_again(here, tmp_path, monkeypatch):
    class Restarted(Exception):
        pass

    def restart(*command):
        raise Restarted

    def dead():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(os, "execv", restart)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    record = gpu.Record(tmp_path, "")
    with pytest.raises(Restarted):
        gpu.tried({"peer": Work(lambda: ())}, record)
    again = gpu.Record(tmp_path, "")
    assert "it left the device unusable" in again.result["broken"]["peer"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    peaks, notes = gpu.tried({"peer": Work(lambda: ()), "other": Work(lambda: ())}, again)
    assert set(peaks) == {"other"}
    assert "left the device unusable" in notes["peer"]


def test_heads_and_curve_write_one_file_that_has_a_row_or_a_reason_for_everyone(here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(gpu, "TOKENS", [64, 128])
    gpu.bench("heads", tmp_path, "")
    gpu.curve(tmp_path, "")
    result = json.loads((tmp_path / "gpu.json").read_text())
    for case, _ in gpu.cases("heads"):
        assert "failed" not in result["cases"][case.name], result["cases"][case.name]
        rows = {row["competitor"]: row for row in result["rows"] if row["case"] == case.name}
        assert set(rows) == {"floor", *case.competitors}
        assert all(row["note"] or row["median_ms"] for row in rows.values())
    timed = [row for row in result["curve"]["rows"] if row.get("ms")]
    assert {row["tokens"] for row in timed if row["contestant"] == f"{OURS}, CUDA, one read"} == {64, 128}
    gpu.bench("heads", tmp_path, "")
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    gpu.bench("heads", tmp_path, "another")
    assert "curve" not in json.loads((tmp_path / "gpu.json").read_text())


def test_from_where_one_runs_out_it_is_not_run(here, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TOKENS", [64, 128, 256])
    monkeypatch.setattr(gpu, "green", lambda case, data, record: ({"eager": None}, {}, {"peer": "not installed"}))

    made = []
    monkeypatch.setattr(gpu, "timed", lambda make: made.append(make) or {"note": "out of memory"})
    gpu.curve(tmp_path, "")
    rows = json.loads((tmp_path / "gpu.json").read_text())["curve"]["rows"]
    assert [row["note"] for row in rows if row["contestant"] == "eager"] == [
        "out of memory",
        *["out of memory at 64 tokens"] * 2,
    ]
    assert len(made) == 2
    assert rows[-1] == {"contestant": "peer", "note": "not installed"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_copy_is_timed_on_the_gpu():
    case = of_name("dpo_loss")
    host = {"floor": []}
    works = {"floor": gpu.copy_of(case)}
    sample = gpu.stopwatch(works, host)(works["floor"])
    assert 0 < sample.forward < 0.1
    assert len(host["floor"]) == 1


@pytest.mark.parametrize("name", ["rpp-kernels, CUDA, one read", "rpp-kernels, CUDA, two reads"])
def test_the_goals_are_right_in_small(name, here, tmp_path, monkeypatch):
    """On the emulated kernels, under the name of those that a GPU would run."""
    if emulated.PROBLEM:
        pytest.skip(emulated.PROBLEM)
    monkeypatch.setattr(torch.ops, "rpp_kernels_C", emulated.kernels())
    monkeypatch.setitem(gpu_cases.BACKENDS, "CUDA", "emulated")
    case = gpu_cases.one_read(8, 1000, "cpu")
    case = dataclasses.replace(case, competitors={name: case.competitors[name]}, check_every=1)
    works, errors, notes = gpu.green(case, case.data(), gpu.Record(tmp_path, ""))
    assert set(works) == {name}, notes
    assert errors[name] < case.tolerance


def test_heads_are_right_in_small(here, tmp_path, monkeypatch):
    if emulated.PROBLEM:
        pytest.skip(emulated.PROBLEM)
    monkeypatch.setitem(gpu_cases.BACKENDS, "CUDA", "emulated")
    _, case = gpu_cases.head(128, 200, 32, with_peers=False)
    ours = {name: f for name, f in case.competitors.items() if "Triton" not in name}
    case = dataclasses.replace(case, competitors=ours)
    works, _, notes = gpu.green(case, case.data(), gpu.Record(tmp_path, ""))
    assert set(works) == set(ours), notes
