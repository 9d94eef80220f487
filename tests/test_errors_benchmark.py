"""benchmarks/errors.py and tokens.py in small: what they claim, and that their results can be rendered."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import errors
import figures
import report
import tokens

MACHINE = {"cpu": "a cpu", "threads": 1, "torch": "2", "commit": "c", "command": "x"}


def test_our_log_probs_are_a_thousand_times_closer_and_our_ratio_is_1(tmp_path):
    found, ratios, largest = errors.measured(256, 2000, 64, 4)
    ours, *others = found.values()
    assert largest > 8
    assert ours["max"] < 1e-4
    assert all(1000 * ours["median"] < other["median"] for other in others)
    assert all(sum(row["counts"]) == 256 for row in found.values())
    exact = ["the same call", f"the same op, {errors.BY_PARTS} tokens a call, batch_invariant"]
    assert [ratios[name]["exactly_1"] for name in exact] == [1.0, 1.0]
    assert all(abs(ratios[name]["farthest"] - 1) > 1e-3 for name in list(ratios)[3:])
    result = {
        "machine": MACHINE,
        "size": {"tokens": 256, "vocab": 2000, "hidden": 64},
        "exponents": errors.EXPONENTS,
        "errors": [{"spread": 4, "largest_logit": largest, "path": k, **v} for k, v in found.items()],
        "ratios": [{"spread": 4, "old": k, **v} for k, v in ratios.items()],
    }
    assert "the same call | 100% | 1.000 to 1.000 | 1.000 |" in report.errors(json.loads(json.dumps(result)))
    figures.logp_errors(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tokens, "VOCAB", 100)
    monkeypatch.setattr(tokens, "HIDDEN", 16)


def test_everyone_has_a_row_for_each_number_of_tokens(small, capsys, tmp_path):
    for contestant in ("linear_policy_loss", "eager", tokens.FLOOR):
        tokens.alone(contestant, [64, 128], 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["tokens"] for row in rows] == [64, 128] * 3
    assert all(row["ms"] > 0 for row in rows)
    assert [row["peak_extra_mib"] is None for row in rows] == [False] * 4 + [True] * 2
    result = {"machine": MACHINE, "vocab": 100, "hidden": 16, "dtype": "float32", "rows": rows}
    table = report.tokens(result)
    assert "| eager |" in table
    figures.tokens(result, tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(("ms", "mib", "note"), [(10.0, 1.0, "too long"), (0.1, 4.0, "out of memory")])
def test_where_the_next_would_take_too_much_it_is_not_run_and_says_why(ms, mib, note, small, monkeypatch, capsys):
    def measure(tokens):
        return {"ms": ms * tokens, "peak_extra_mib": mib * tokens}

    monkeypatch.setattr(tokens, "_measure", lambda contestant: measure)
    tokens.alone("eager", [512, 1024, 4096, 8192], 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("note") for row in rows] == [None, None, note, note]


def test_what_does_not_grow_is_never_said_to_run_out_of_memory(small, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "_measure", lambda contestant: lambda n: {"ms": 2.0 * n, "peak_extra_mib": 400.0})
    tokens.alone("verl", [1024, 2048, 65536], 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("note") for row in rows] == [None, None, "too long"]


def test_a_contestant_that_is_not_installed_says_so(small, monkeypatch, capsys):
    def load():
        raise ImportError("no package trl")

    monkeypatch.setattr(tokens, "_contestants", lambda: {"TRL": load})
    tokens.alone("TRL", [64, 128], 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["note"] for row in rows] == ["not installed: no package trl"] * 2
