from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rpp_trainer.batch import Batch
from rpp_trainer.config import Config, ConfigError
from rpp_trainer.models import Policy, check_head_is_linear, load_policy, token_logps
from rpp_trainer.rollout import rollout
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

RECORDS = [{"prompt": prompt} for prompt in ("a>", "hello>", "xyzzyx>", "ab>")]
SMALL = {"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def plain_logps(model: PreTrainedModel, batch: Batch, temperature: float) -> list[torch.Tensor]:
    """One sequence at a time, without padding: log_softmax of the model's own logits."""
    rows = []
    for ids, attended, mask in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        ids, count = ids[attended], int(mask.sum())
        with torch.no_grad():
            all_logps = (model(ids[None]).logits[0, :-1].double() / temperature).log_softmax(-1)
        rows.append(all_logps.gather(1, ids[1:, None])[-count:, 0])
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("logps_from", ["hidden_states", "logits"])
def test_logps_are_those_of_the_model_and_padding_does_not_change_them(
    policy: Policy, small: Callable[..., Config], logps_from: str, temperature: float
) -> None:
    config = small(logps_from=logps_from, temperature=temperature)
    batch = rollout(policy, RECORDS, config, seed=1).batch
    with torch.no_grad():
        logps = token_logps(policy.model, batch, config).logps
    for row, mask, expected in zip(
        logps, batch.completion_mask, plain_logps(policy.model, batch, temperature), strict=True
    ):
        torch.testing.assert_close(row[mask].double(), expected, atol=2e-5, rtol=2e-5)
        assert (row[~mask] == 0).all()


@pytest.mark.parametrize(
    "model",
    [
        lambda: PhiForCausalLM(PhiConfig(**SMALL, intermediate_size=64)),  # a head with a bias
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=32, n_layer=1, n_head=2)),  # tied, and has dropout
        lambda: CohereForCausalLM(CohereConfig(**SMALL, intermediate_size=64, logit_scale=1.0)),
    ],
    ids=["phi", "gpt2", "cohere-unscaled"],
)
def test_other_architectures(
    model: Callable[[], PreTrainedModel], policy: Policy, small: Callable[..., Config]
) -> None:
    other = model().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases too
    check_head_is_linear(other)
    config = small()
    batch = rollout(Policy(other, policy.tokenizer, policy.eos_ids), RECORDS, config, seed=1).batch
    logps = token_logps(other, batch, config).logps
    expected = torch.cat(plain_logps(other, batch, 1.0))
    torch.testing.assert_close(logps[batch.completion_mask].double(), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, intermediate_size=64)),
            r"Gemma2ForCausalLM \(gemma2\) has final_logit_softcapping = 30.0.*--logps-from logits",
        ),
        (
            lambda: CohereForCausalLM(CohereConfig(**SMALL, intermediate_size=64, logit_scale=0.25)),
            r"cohere.*logit_scale = 0.25",
        ),
    ],
    ids=["gemma2", "cohere"],
)
def test_models_that_transform_their_logits_are_refused(
    model: Callable[[], PreTrainedModel], named: str, tmp_path: Path, policy: Policy, small: Callable[..., Config]
) -> None:
    model().save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=named):
        load_policy(small(model=str(tmp_path / "model")))

    config = small(model=str(tmp_path / "model"), logps_from="logits")  # the way out
    loaded = load_policy(config)
    batch = rollout(loaded, RECORDS, config, seed=1).batch
    logps = token_logps(loaded.model, batch, config).logps
    expected = torch.cat(plain_logps(loaded.model, batch, 1.0))
    torch.testing.assert_close(logps[batch.completion_mask].double(), expected, atol=5e-5, rtol=5e-5)


def test_an_unknown_transform_is_found_by_trying(policy: Policy) -> None:
    class Doubled(Qwen2ForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    policy.model.__class__ = Doubled
    with pytest.raises(ConfigError, match=r"Doubled .* not hidden_states @ weight.T"):
        check_head_is_linear(policy.model)


def test_a_model_that_is_not_there(small: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="cannot load 'nowhere/at-all'"):
        load_policy(small(model="nowhere/at-all"))


def test_the_demos_model_is_not_offered_other_tasks(small: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="model: is empty, wanted with any task but 'letters'"):
        load_policy(small(task="reasoning-gym:chain_sum"))


def test_gguf_in_a_package_that_is_not_installed(small: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="wants the Python package 'no_such_package'"):
        load_policy(small(model="no_such_package:model.gguf"))
