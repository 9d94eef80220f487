"""Small runs: a tiny policy, a few prompts, one thread, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rpp_trainer.config import Config
from rpp_trainer.models import Policy, load_policy

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Config]:
    """A config whose run takes about a second."""
    defaults = {
        "output_dir": str(tmp_path / "runs"),
        "steps": 2,
        "eval_every": 1,
        "num_eval_prompts": 8,
        "rollout_batch_size": 16,
        "train_batch_size": 8,
        "warm_start_steps": 2,
        "device": "cpu",
        "threads": 1,
    }
    return lambda **changes: Config(**{**defaults, **changes})


@pytest.fixture
def policy(small: Callable[..., Config]) -> Policy:
    """The demo's model, with weights large enough that its distributions are far from uniform."""
    policy = load_policy(small())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return policy


@pytest.fixture
def model_folder(policy: Policy, tmp_path: Path) -> Path:
    """A Hugging Face folder, as a user has one, with a chat template and a generation config of its own."""
    folder = tmp_path / "model"
    policy.model.generation_config.update(do_sample=True, top_k=2, repetition_penalty=3.0)
    policy.model.save_pretrained(folder)
    policy.tokenizer.chat_template = CHAT_TEMPLATE
    policy.tokenizer.save_pretrained(folder)
    return folder
