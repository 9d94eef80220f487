from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rpp_trainer.config import Config, ConfigError
from rpp_trainer.models import Policy, load_policy
from rpp_trainer.rollout import prompt_text, rollout

RECORDS = [{"prompt": prompt} for prompt in ("a>", "hello>", "xyzzyx>", "ab>")] * 8


def test_masks_cover_the_completion_up_to_and_including_the_eos(policy: Policy, small: Callable[..., Config]) -> None:
    result = rollout(policy, RECORDS, small(max_completion_length=6), seed=1)
    batch, length = result.batch, result.batch.completion_mask.shape[1]
    assert batch.completion_mask.dtype == batch.attention_mask.dtype == torch.bool
    eos, ended = policy.eos_ids[0], 0
    for ids, mask, text, truncated in zip(
        batch.target_ids, batch.completion_mask, result.completions, result.truncated, strict=True
    ):
        tokens = ids.tolist()
        count = tokens.index(eos) + 1 if eos in tokens else length
        assert mask.tolist() == [True] * count + [False] * (length - count)
        assert truncated == (eos not in tokens)
        assert text == policy.tokenizer.decode(tokens[: count - (eos in tokens)])
        ended += eos in tokens
    assert 0 < ended < len(RECORDS)  # both cases were seen


def test_prompts_are_padded_left(policy: Policy, small: Callable[..., Config]) -> None:
    batch = rollout(policy, RECORDS, small(), seed=1).batch
    width = len("xyzzyx>")
    for record, ids, mask in zip(RECORDS, batch.input_ids, batch.attention_mask, strict=True):
        size = len(record["prompt"])
        assert mask[:width].tolist() == [False] * (width - size) + [True] * size
        assert policy.tokenizer.decode(ids[width - size : width]) == record["prompt"]
    assert torch.equal(batch.attention_mask[:, width:], batch.completion_mask)


def test_several_eos_ids_and_a_pad_that_is_an_eos(policy: Policy, small: Callable[..., Config]) -> None:
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    a = policy.tokenizer.convert_tokens_to_ids("a")
    both = Policy(policy.model, policy.tokenizer, [policy.eos_ids[0], a])
    result = rollout(both, RECORDS, small(), seed=1)
    assert not any("a" in text.replace("<pad>", "") or "<eos>" in text for text in result.completions)
    last = result.batch.completion_mask.sum(1) - 1
    last_ids = result.batch.target_ids.gather(1, last[:, None])[:, 0]
    assert torch.isin(last_ids[~result.truncated], torch.tensor(both.eos_ids)).all()
    assert a in last_ids


def test_the_seed_fixes_the_samples(policy: Policy, small: Callable[..., Config]) -> None:
    first = rollout(policy, RECORDS, small(), seed=1).completions
    torch.rand(3)  # the global generator plays no part
    assert rollout(policy, RECORDS, small(), seed=1).completions == first
    assert rollout(policy, RECORDS, small(), seed=2).completions != first


def test_generation_in_chunks_gives_the_same_greedy_completions(policy: Policy, small: Callable[..., Config]) -> None:
    whole = rollout(policy, RECORDS, small(), seed=1, greedy=True)
    parts = rollout(policy, RECORDS, small(generation_batch_size=3), seed=1, greedy=True)
    assert parts.completions == whole.completions
    assert torch.equal(parts.batch.completion_mask, whole.batch.completion_mask)


def test_samples_come_from_the_policy_and_not_from_its_generation_config(
    model_folder: Path, small: Callable[..., Config]
) -> None:
    """The folder asks for top_k = 2 and a repetition penalty; first tokens follow the model's softmax all the same."""
    config = small(model=str(model_folder), max_completion_length=1, temperature=2.0)
    policy = load_policy(config)
    asked = policy.model.generation_config.to_dict()
    assert asked["top_k"] == 2
    count = 4000
    batch = rollout(policy, [{"prompt": "aab"}] * count, config, seed=0).batch
    prompt = policy.tokenizer("aab>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = (policy.model(prompt).logits[0, -1] / 2.0).softmax(0)
    seen = torch.bincount(batch.target_ids[:, 0], minlength=len(expected)) / count
    assert (seen - expected).abs().max() < 4 * 0.5 / count**0.5
    assert policy.model.generation_config.to_dict() == asked  # and is put back


def test_chat_template_is_used_where_there_is_one(model_folder: Path, small: Callable[..., Config]) -> None:
    tokenizer = load_policy(small(model=str(model_folder))).tokenizer
    assert prompt_text(tokenizer, "ab") == "ab>"
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    assert prompt_text(tokenizer, messages) == "xy>"
    tokenizer.chat_template = None
    assert prompt_text(tokenizer, "ab") == "ab"
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_text(tokenizer, messages)
