"""Prompts in, completions out: plain sampling from the policy by transformers' `generate`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from rpp_trainer.batch import Batch
from rpp_trainer.config import Config, ConfigError
from rpp_trainer.models import Policy
from rpp_trainer.tasks import Record


class Rollout(NamedTuple):
    batch: Batch
    completions: list[str]  # without the EOS
    truncated: Tensor  # (B,) bool: no EOS within max_completion_length


@torch.no_grad()
def rollout(policy: Policy, records: list[Record], config: Config, *, seed: int, greedy: bool = False) -> Rollout:
    """One completion of each record's prompt."""
    tokenizer = policy.tokenizer
    encoded = tokenizer(
        [prompt_text(tokenizer, record["prompt"]) for record in records],
        add_special_tokens=tokenizer.chat_template is None,  # a chat template writes its own
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(policy.model.device)
    prompt_ids, prompt_mask = encoded["input_ids"], encoded["attention_mask"].bool()

    # `generate` fills what its argument leaves open from the model's own generation config (a top_p, a repetition
    # penalty, ...), and would then sample from something else than the policy whose log-probs we take: so replace it.
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    own_config, policy.model.generation_config = (
        policy.model.generation_config,
        GenerationConfig(
            **({"do_sample": False} if greedy else sampling),
            max_new_tokens=config.max_completion_length,
            eos_token_id=policy.eos_ids,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )
    size = config.generation_batch_size or len(records)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            outputs = [
                policy.model.generate(input_ids=ids, attention_mask=mask.long())[:, ids.shape[1] :]
                for ids, mask in zip(prompt_ids.split(size), prompt_mask.split(size), strict=True)
            ]
    finally:
        policy.model.generation_config = own_config

    # A chunk stops early where all its rows have ended: what is added here stands behind an EOS.
    completion_ids = prompt_ids.new_full((len(records), max(x.shape[1] for x in outputs)), tokenizer.pad_token_id)
    for start, output in zip(range(0, len(records), size), outputs, strict=True):
        completion_ids[start : start + size, : output.shape[1]] = output
    is_eos = torch.isin(completion_ids, torch.tensor(policy.eos_ids, device=completion_ids.device))
    completion_mask = is_eos.cumsum(1) - is_eos.long() == 0  # no EOS before this token
    batch = Batch(
        input_ids=torch.cat([prompt_ids, completion_ids], 1),
        attention_mask=torch.cat([prompt_mask, completion_mask], 1),
        completion_mask=completion_mask,
    )
    text_mask = completion_mask & ~is_eos
    completions = [tokenizer.decode(ids[mask]) for ids, mask in zip(completion_ids, text_mask, strict=True)]
    return Rollout(batch, completions, truncated=~is_eos.any(1))


def prompt_text(tokenizer: Any, prompt: str | list[dict[str, str]]) -> str:
    """What the model reads: the chat template's text where the tokenizer has one, else the prompt as it is."""
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ConfigError(
                "prompts: one is a list of chat messages, and this model's tokenizer has no chat template"
            )
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
