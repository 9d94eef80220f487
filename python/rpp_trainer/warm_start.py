"""A short supervised phase before RL: until a model that knows nothing is right often enough to be rewarded."""

import torch

from rpp_trainer.batch import Batch
from rpp_trainer.config import Config
from rpp_trainer.evaluate import evaluate
from rpp_trainer.models import Policy, token_logps
from rpp_trainer.tasks import Record, Task, prompt_stream

CHECK_EVERY = 10  # steps; accuracy climbs steeply once it climbs, and the warm start must not do the work of RL


def warm_start(policy: Policy, task: Task, config: Config) -> tuple[int, float]:
    """Steps taken and validation accuracy reached. Stops by itself at config.warm_start_accuracy."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.warm_start_learning_rate, weight_decay=0.0)
    records = prompt_stream(task.examples, seed=config.seed)
    accuracy = 0.0
    for step in range(1, config.warm_start_steps + 1):
        batch = answer_batch(policy, [next(records) for _ in range(config.warm_start_batch_size)])
        logps = token_logps(policy.model, batch, config).logps
        loss = -logps.sum() / batch.completion_mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY == 0:
            accuracy = evaluate(policy, task, task.validation, config, greedy=False).accuracy
            if accuracy >= config.warm_start_accuracy:
                break
    return step, accuracy


def answer_batch(policy: Policy, records: list[Record]) -> Batch:
    """Prompts with their written answers where the completions go."""
    tokenizer, device = policy.tokenizer, policy.model.device
    options = {"padding": True, "return_tensors": "pt"}
    prompts = tokenizer([r["prompt"] for r in records], padding_side="left", **options).to(device)
    answers = tokenizer([r["answer"] + tokenizer.eos_token for r in records], padding_side="right", **options).to(
        device
    )
    completion_mask = answers["attention_mask"].bool()
    return Batch(
        input_ids=torch.cat([prompts["input_ids"], answers["input_ids"]], 1),
        attention_mask=torch.cat([prompts["attention_mask"].bool(), completion_mask], 1),
        completion_mask=completion_mask,
    )
