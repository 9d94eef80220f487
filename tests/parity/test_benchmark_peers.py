"""The hosts as benchmarks/peers.py calls them agree with the specification, in the cases that they compete in."""

import dataclasses
import sys
from pathlib import Path

import hosts
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cases
import linear_cases
import peers
from case import OURS, Data
from run import check, load

HOSTS = tuple(peers.PACKAGES)


def small(case) -> Data:
    """The case's own inputs in few tokens; those of a loss keep their seeds."""
    if case.name.startswith("logps"):
        return cases._logits(torch.float32, 2 if "entropy" in case.name else 1, 16, 50, "cpu")
    if case.name == "linear_logps":
        return Data(linear_cases.head_inputs(64, 50, 16), linear_cases.WRT, (torch.randn(8, 8),))
    if case.name.startswith("linear"):
        return Data(linear_cases.policy_inputs(64, 50, 16), linear_cases.WRT, (torch.ones(()),))
    full = case.data()
    # Not too few: verl's standard deviation is that of a sample.
    cut = {k: x[:64, :200] if x.dim() == 2 else x[:64] for k, x in full.inputs.items()}
    return Data({k: x.contiguous() for k, x in cut.items()}, full.wrt, full.grads)


# In bfloat16 some hosts are wrong, which is for the tables to say. Those of the cross entropy need a GPU.
WITH_HOSTS = [case for case in cases.CASES if any(name.startswith(HOSTS) for name in case.competitors)]
WITH_HOSTS = [case for case in WITH_HOSTS if "bf16" not in case.name and case.name != "linear_cross_entropy"]


@pytest.mark.parametrize("case", WITH_HOSTS, ids=lambda case: case.name)
def test_every_host_agrees_with_the_specification(case):
    for package in peers.PACKAGES.values():
        hosts.module(package)  # skips, or fails where the hosts are required
    chosen = {k: loader for k, loader in case.competitors.items() if k == OURS or k.startswith(HOSTS)}
    case = dataclasses.replace(case, competitors=chosen, check_every=1, left_out={})
    functions, notes = load(case)
    data = small(case)
    errors, wrong = check(case, data, {name: data.work(function) for name, function in functions.items()})
    assert all(note.endswith("there is no CUDA device") for note in notes.values())
    assert not wrong
    assert set(errors) == set(chosen) - set(notes)


def test_a_host_that_is_wrong_is_named_and_not_timed():
    case = next(case for case in cases.CASES if case.name == "logps_fp32")
    data = small(case)

    def off(logits, target_ids):
        return (logits.log_softmax(-1).gather(-1, target_ids[:, None]).squeeze(-1) * 1.01,)

    def broken(logits, target_ids):
        raise TypeError("no such argument")

    case = dataclasses.replace(case, check_every=1)
    errors, wrong = check(case, data, {"TRL": data.work(off), "verl": data.work(broken)})
    assert errors == {}
    assert wrong["TRL"].startswith("wrong: error")
    assert wrong["verl"] == "fails: TypeError: no such argument"


def test_nothing_is_timed_where_ours_is_wrong():
    case = dataclasses.replace(next(case for case in cases.CASES if case.name == "logps_fp32"), check_every=1)
    data = small(case)
    with pytest.raises(SystemExit, match="rpp-kernels is wrong"):
        check(case, data, {OURS: data.work(lambda logits, target_ids: (logits.sum(1),))})
