"""benchmarks/steps.py and curves.py: the naive algorithms and ours are the same ones, and the numbers are complete."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rpp_trainer.config import Config
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import curves
import figures
import report
import steps
from actor import Actor

TINY = steps.Size(
    "tiny",
    "for the tests",
    prompts=2,
    prompt_length=3,
    completion_length=8,
    train_batch_size=4,
    group_size=4,
    threads=1,
    model={
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
)


def ragged_batch():
    """Prompts padded left, completions padded right, one of them a single token long."""
    prompt_lengths, lengths = torch.tensor([3, 1, 2, 3, 3, 2, 1, 3]), torch.tensor([8, 1, 5, 7, 2, 8, 3, 6])
    completion_mask = torch.arange(8) < lengths[:, None]
    prompt_mask = torch.arange(3) >= 3 - prompt_lengths[:, None]
    return {
        "input_ids": torch.randint(50, (8, 11)),
        "attention_mask": torch.cat([prompt_mask, completion_mask], 1),
        "completion_mask": completion_mask,
        "scores": torch.randn(8).double(),
    }


@pytest.mark.parametrize("algorithm", steps.ALGORITHMS)
def test_naive_is_ours_in_value_and_gradient(algorithm):
    torch.manual_seed(0)
    actor = Actor(Qwen2ForCausalLM(Qwen2Config(**TINY.model)).double().eval()).double()
    reference = copy.deepcopy(actor).requires_grad_(False)
    steps._move(actor)
    batch, losses, gradients = ragged_batch(), [], []
    steady = copy.deepcopy(actor)
    for one in steps.contestants(algorithm, TINY.group_size).values():
        learner = copy.deepcopy(steady)
        whole = batch | one.log_probs(learner, reference, batch)
        whole |= one.advantages(whole)
        with torch.no_grad():  # off the policy that sampled, so that some ratios are clipped
            for i, p in enumerate(learner.parameters()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype), alpha=0.1)
        loss = one.loss(learner, whole)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in learner.parameters() if p.grad is not None])
        ratio = (one.log_probs(learner, reference, batch)["old_logps"] - whole["old_logps"])[batch["completion_mask"]]
        assert (ratio.abs() > 0.25).any()
    # Everyone whitens with an eps of 1e-8, which the naive ones add to the variance and the recipes take as its floor.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=3e-8)
    assert len(gradients[0]) == len(gradients[1])
    for ours, naive in zip(gradients[1], gradients[0], strict=True):
        assert naive.isfinite().all()
        torch.testing.assert_close(ours, naive, rtol=1e-7, atol=3e-8)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    file = tmp_path_factory.mktemp("steps") / "steps.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "SIZES", {"tiny": TINY})
        patch.setattr(steps, "SECONDS", 0)
        patch.setattr(sys, "argv", ["steps.py", "--size", "tiny", "--threads", "1", "--json", str(file)])
        patch.setenv("OMP_NUM_THREADS", "1")
        steps.main()
    return json.loads(file.read_text())


def test_the_rows_are_complete(result):
    assert {(row["algorithm"], row["contestant"]) for row in result["rows"]} == {
        (algorithm, who) for algorithm in steps.ALGORITHMS for who in (steps.NAIVE, steps.OURS)
    }
    for row in result["rows"]:
        assert row["rounds"] == 3
        assert row["difference"]["loss"] < 1e-5
        assert row["difference"]["gradient"] < 1e-4
        assert row["head_peak_mib"] is None or row["head_peak_mib"] >= 0
        assert row["naive_over_this"]["update"] == 1 or row["contestant"] == steps.OURS


def test_phases_sum_to_the_update(result):
    for row in result["rows"]:
        medians = {what: seconds["median"] for what, seconds in row["seconds"].items()}
        update, _ = medians.pop("update"), medians.pop("policy part")
        assert set(medians) == {f"{p}{b}" for p in ("log-probs", "loss") for b in ("", ", body")} | {
            "advantages",
            "optimizer",
        }
        assert sum(medians.values()) == pytest.approx(update, rel=0.3)


def test_the_report_says_it_all(result, tmp_path):
    text = report.steps(result)
    assert len(re.findall(r"^\| tiny \|", text, flags=re.M)) == 1 + 3 + 6 + 6
    figures.steps(result, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 0


def test_learning_curves_are_the_same_until_rounding_parts_them(tmp_path):
    config = Config(
        steps=2, rollout_batch_size=8, train_batch_size=4, num_eval_prompts=4, warm_start_steps=1, recipe="grpo"
    )
    rows = curves.trained(config)
    assert [row["contestant"] for row in rows] == [steps.NAIVE, steps.OURS]
    assert rows[0]["rewards"][0] == rows[1]["rewards"][0]
    assert all(len(row[name]) == 2 for row in rows for name in ("rewards", "seconds", "update_seconds"))
    result = {"machine": steps_machine(), "algorithm": "grpo", "rows": rows}
    assert "accuracy" in report.curves(result)
    figures.curves(result, tmp_path / "curves.png")


def steps_machine():
    from run import machine

    return machine(1, "a test")
