"""The policy: load or make one, and its log-probs of a batch of completions."""

import copy
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rpp_kernels as rpp
from rpp_trainer.batch import Batch
from rpp_trainer.config import Config, ConfigError
from rpp_trainer.tasks import LETTERS

# Models that do something to hidden_states @ weight.T before the softmax say so under one of these names.
LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "output_logit_soft_cap",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
)


@dataclass(frozen=True)
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]  # any of them ends a completion

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def load_policy(config: Config) -> Policy:
    if not config.model and (config.prompts or config.task != "letters"):
        raise ConfigError(
            "model: is empty, wanted with any task but 'letters': the model of the demo reads letters only"
        )
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = _load(config) if config.model else (_tiny_model(), _letters_tokenizer())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is always masked, so which token it is does not matter
    eos = model.generation_config.eos_token_id
    eos_ids = [tokenizer.eos_token_id] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    # No dropout, ever: the policy that is updated must be the policy that sampled.
    model = model.to(_device(config)).eval()
    if config.logps_from == "hidden_states":
        check_head_is_linear(model)
    return Policy(model, tokenizer, eos_ids)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).requires_grad_(False)


def token_logps(model: PreTrainedModel, batch: Batch, config: Config) -> rpp.TokenLogps:
    """Log-probs and entropies (B, S) of the completions, under the temperature they were sampled with."""
    length = batch.completion_mask.shape[1]
    # The last token predicts nothing, so it is not an input; the last S inputs then predict the S completion tokens.
    attention_mask = batch.attention_mask[:, :-1].long()
    inputs = {"input_ids": batch.input_ids[:, :-1], "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)  # left padding has no position
    targets, mask, temperature = batch.target_ids, batch.completion_mask, config.temperature
    if config.logps_from == "logits":
        logits = model(**inputs, logits_to_keep=length).logits
        return rpp.logps_from_logits(logits, targets, mask, temperature=temperature)
    hidden_states = model.base_model(**inputs).last_hidden_state[:, -length:]
    head = model.get_output_embeddings()
    return rpp.linear_logps(hidden_states, head.weight, targets, mask, bias=head.bias, temperature=temperature)


@torch.no_grad()
def check_head_is_linear(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not hidden_states @ weight.T + bias: by what it declares, then by trying."""
    text_config = model.config.get_text_config()
    for name in LOGIT_TRANSFORMS:
        value = getattr(text_config, name, None)
        if value not in (None, 0, 1):
            _refuse(model, f"has {name} = {value}")
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        _refuse(model, f"has a {type(head).__name__} for a head, not a Linear")
    ids = torch.arange(1, 9, device=model.device)[None] % head.weight.shape[0]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    linear = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    tolerance = 1e-2 if model.dtype == torch.bfloat16 else 1e-4
    if logits.shape != linear.shape or (logits - linear).abs().max() > tolerance * (1 + logits.abs().max()):
        _refuse(model, "gives logits that are not hidden_states @ weight.T + bias")


def _refuse(model: PreTrainedModel, why: str) -> None:
    raise ConfigError(
        f"model: {type(model).__name__} ({model.config.model_type}) {why}, so log-probs from its hidden states "
        "would be wrong; use --logps-from logits"
    )


def _device(config: Config) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _load(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path, options = config.model, {}
    if path.endswith(".gguf"):
        folder, file = _gguf_file(path)
        path, options = str(folder), {"gguf_file": file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **options)
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"model: cannot load {config.model!r}: {error}") from error
    return (_unquantized(model) if options else model), tokenizer


def _gguf_file(path: str) -> tuple[Path, str]:
    """Folder and name of `folder/file.gguf`, or of `package:file.gguf`; the package is found, not imported."""
    package, _, rest = path.rpartition(":")
    if not package:
        return Path(path).parent, Path(path).name
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model: {path!r} wants the Python package {package!r}, which is not installed")
    return Path(spec.submodule_search_locations[0]), rest


def _unquantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be saved: one loaded from GGUF stays marked as quantized, and refuses."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


# ---------------------------------------------------------------- the model of the demo: nothing is downloaded


def _letters_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", ">", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _tiny_model() -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=3 + len(LETTERS),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config)
