"""The configuration: one flat, frozen dataclass; defaults, then `--config file.toml`, then the command line."""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tyro

import rpp_kernels as rpp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _trainable(row: dict[str, Any]) -> bool:
    """Whether an algorithm needs no critic, no greedy completions and no preferences, which the trainer has not."""
    return "loss_function" not in row and row.get("baseline") not in ("critic", "greedy")


RECIPES = tuple(name for name, row in rpp.ALGORITHMS.items() if _trainable(row))
# Fields that change the recipe where they are set.
OVERRIDES = (
    "baseline",
    "reward_zscore",
    "reward_clip",
    "reward_scale",
    "beta",
    "kl_estimator",
    "gamma",
    "epsilon_low",
    "epsilon_high",
    "reduction",
)


class ConfigError(ValueError):
    """Something the user wrote cannot be used; the message says what, and what was wanted."""


@dataclass(frozen=True)
class Config:
    """REINFORCE++, or another algorithm of its family, on any Hugging Face causal LM.

    Without arguments: a tiny Qwen2, made here, learns to sort letters on two CPU cores in about two minutes.
    Every option may also stand in a TOML file: `--config FILE`, or `--config smollm2` for one that ships with the
    trainer. Options on the command line win. [R++] is the REINFORCE++ paper, arXiv 2501.03262.
    """

    # ---- the run
    name: str = "demo"
    """Name of the run folder; a folder is never overwritten, `demo-2`, `demo-3`, ... follow."""
    output_dir: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    """Fixes the data, the initial weights and the sampling noise: same seed, same machine, same curve."""
    steps: int = 240
    """Rollouts; each is followed by epochs * rollout_batch_size / train_batch_size optimizer steps."""
    eval_every: int = 20
    """Rollouts between two held-out evaluations; 0 evaluates only before and after."""
    num_eval_prompts: int = 512
    """Held-out prompts. None of them is ever trained on. They are answered greedily."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where there is one."""
    threads: int = 0
    """CPU threads of torch. 0: one for a model under 20M parameters, all cores for a larger one.
    Small matrices are not worth sharing, and on a busy machine threads that wait for each other cost dearly."""

    # ---- the task
    task: str = "letters"
    """`letters` (the distinct letters of a word, sorted), or `reasoning-gym:NAME`.
    Options of such a data set are written `reasoning-gym:chain_sum?max_terms=2&max_digits=1`."""
    prompts: str = ""
    """A JSONL file instead of a task. A line: {"prompt": text or chat messages, ...}; the rest is for the reward."""
    reward: str = ""
    """`module:function`, called as function(prompt, completion, record) -> float. Needed with --prompts."""
    correct_at: float = 1.0
    """A completion counts as correct, in "accuracy", where its score reaches this."""

    # ---- the model
    model: str = ""
    """A folder, a hub id, or a .gguf file (`package:file.gguf`: one inside an installed Python package).
    Empty: a 2-layer Qwen2 with random weights and a tokenizer of letters, made on the spot."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of a loaded model's weights. Log-probs are float32 in any case.
    The steps of a small learning rate are lost in the 8 bits of bfloat16: float32 where memory allows."""
    logps_from: Literal["hidden_states", "logits"] = "hidden_states"
    """`hidden_states`: rpp.linear_logps, which never stores the (tokens, vocabulary) logits.
    `logits`: rpp.logps_from_logits, needed by models that soft-cap or scale them (gemma2, cohere, granite)."""

    # ---- supervised warm start (tasks with a written answer)
    warm_start_accuracy: float = 0.2
    """Supervised training stops when this share of sampled validation answers is right; 0 skips it.
    It gives RL something to reward. No supervised loss is used once RL begins."""
    warm_start_steps: int = 2000
    """At most so many supervised steps."""
    warm_start_batch_size: int = 64
    """Prompts in a supervised step."""
    warm_start_learning_rate: float = 3e-3
    """AdamW learning rate of the warm start."""

    # ---- rollout
    rollout_batch_size: int = 256
    """Completions in a rollout [R++ Table 1: 256; the paper does not say whether prompts or samples]."""
    group_size: int = 4
    """Completions of each prompt [R++ Table 1: 4]. The prompts of a rollout are rollout_batch_size / group_size."""
    max_completion_length: int = 16
    """Tokens, the EOS included. A completion that is cut off here is kept, and counted as `truncated`."""
    temperature: float = 1.0
    """Of sampling, and of every log-prob: the policy that is trained is the policy that is sampled."""
    generation_batch_size: int = 0
    """Completions generated at once, to bound memory; 0: all."""

    # ---- the algorithm
    recipe: Literal[RECIPES] = "reinforce_pp"  # type: ignore[valid-type]
    """The algorithm, a row of docs/algorithms.md: those that need no critic, greedy completions or preferences.
    Each option from `baseline` to `reduction` changes the row where it is set; None is the recipe's own."""
    dialect: Literal["rpp", "openrlhf", "verl", "trl", "nemo"] = "rpp"
    """`rpp` is the paper's definition; the others are what those trainers compute under the same name."""
    extras: tuple[str, ...] = ()
    """What is added to it, such as dual_clip or entropy_bonus (docs/algorithms.md)."""
    baseline: Literal["none", "mean", "leave-one-out"] | None = None
    """What is taken off a score: nothing, the mean score of the prompt's completions, or that of its other ones.
    Without a baseline REINFORCE++ likes symmetric scores such as -1 / +1."""
    reward_zscore: bool | None = None
    """Whether scores are whitened over the rollout first [R++ 3.4]."""
    reward_clip: float | None = None
    """Scores are clipped to +- this [R++ 3.4; the recipe's 10 is OpenRLHF's]; `inf` for no clipping."""
    reward_scale: float | None = None
    """And multiplied by this [R++ 3.4]."""
    beta: float | None = None
    """Coefficient of the KL [R++ Table 1: 0.01], to the initial policy (of kl_cov: to the policy that sampled)."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] | None = None
    """Estimator of that KL [R++ eq. 5: k1]."""
    gamma: float | None = None
    """Discount per token [R++ Table 1: 1.0]."""
    epsilon_low: float | None = None
    """The ratio is clipped below at 1 - epsilon_low [R++ eq. 6, Table 1: 0.2]."""
    epsilon_high: float | None = None
    """And above at 1 + epsilon_high [R++ Table 1: 0.2]."""
    reduction: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] | None = (
        None
    )
    """How the token losses of an optimizer step become one number [R++ eq. 6 is the token mean]."""

    # ---- update
    train_batch_size: int = 128
    """Completions in an optimizer step [R++ Table 1: 128]; a divisor of rollout_batch_size."""
    micro_batch_size: int = 0
    """Completions in one forward and backward, to bound memory; a divisor of train_batch_size, or 0 for all of it.
    Gradients add up to those of the whole batch."""
    epochs: int = 1
    """Passes over a rollout."""
    learning_rate: float = 1e-3
    """AdamW learning rate of the first step.
    The paper's 5e-7 is for 8B parameters; a small model wants more: the demo's 130k want this, 135M want about 1e-6."""
    learning_rate_schedule: Literal["constant", "linear"] = "linear"
    """`linear` falls to 0 at the end of the run, so that the last policy is a settled one."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted = _wanted(field.type, value)
            if wanted:
                raise ConfigError(f"{field.name}: is {value!r}, wanted {wanted}")
        positive = "rollout_batch_size group_size max_completion_length train_batch_size epochs num_eval_prompts"
        for name in positive.split():
            self._want(name, getattr(self, name) >= 1, "at least 1")
        for name in ["temperature", "learning_rate", "max_grad_norm", "warm_start_learning_rate"]:
            self._want(name, getattr(self, name) > 0, "more than 0")
        for name in ["steps", "eval_every", "threads", "generation_batch_size", "micro_batch_size"]:
            self._want(name, getattr(self, name) >= 0, "0 or more")
        for name in ["beta", "epsilon_high", "warm_start_steps"]:
            self._want(name, (getattr(self, name) or 0) >= 0, "0 or more")
        self._want("temperature", math.isfinite(self.temperature), "a finite number")
        self._want("reward_clip", self.reward_clip is None or self.reward_clip > 0, "more than 0")
        for name in ["epsilon_low", "gamma"]:
            self._want(name, 0 <= (getattr(self, name) or 0) <= 1, "between 0 and 1")
        self._want("warm_start_accuracy", 0 <= self.warm_start_accuracy < 1, "at least 0 and below 1")
        self._want_divisor("group_size", "rollout_batch_size")
        self._want_divisor("train_batch_size", "rollout_batch_size")
        if self.micro_batch_size:
            self._want_divisor("micro_batch_size", "train_batch_size")
        recipe = self.algorithm
        if recipe.baseline in ("mean", "leave-one-out", "length-weighted"):
            self._want("group_size", self.group_size > 1, f"more than 1 with baseline = {recipe.baseline!r}")
        if recipe.rollout_level != "none" or recipe.rollout_mask != "none":
            raise ConfigError(
                f"extras: is {self.extras!r}, wanted none against a rollout engine: the policy itself samples"
            )
        if recipe.sequences != "all":
            self._want("group_size", self.group_size > 1, f"more than 1 with sequences = {recipe.sequences!r}")
        if recipe.token_selection != "none":
            whole = f"0 with token_selection = {recipe.token_selection!r}, which is among the tokens of a whole step"
            self._want("micro_batch_size", self.micro_batch_size == 0, whole)
        if bool(self.prompts) != bool(self.reward):
            missing = "reward" if self.prompts else "prompts"
            raise ConfigError(f"{missing}: is empty, wanted with --{'prompts' if self.prompts else 'reward'}")

    @property
    def algorithm(self) -> rpp.Recipe:
        """The recipe, with the changes of this configuration."""
        changes = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        if self.reward_clip is not None:
            changes["reward_clip"] = (-self.reward_clip, self.reward_clip)
        try:
            return rpp.recipe(self.recipe, *self.extras, dialect=self.dialect, **changes)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _want(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"{name}: is {getattr(self, name)!r}, wanted {wanted}")

    def _want_divisor(self, name: str, whole: str) -> None:
        size = getattr(self, whole)
        self._want(name, size % getattr(self, name) == 0, f"a divisor of {whole} = {size}")


def _wanted(hint: Any, value: Any) -> str | None:
    """What a value of this type would have been, or None where it is one."""
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return (
            None if isinstance(value, (tuple, list)) and all(isinstance(x, str) for x in value) else "a list of texts"
        )
    if type(None) in get_args(hint):
        return None if value is None else _wanted(get_args(hint)[0], value)
    if hint in (int, float):
        is_number = isinstance(value, int | hint) and not isinstance(value, bool)
        return None if is_number else f"a number ({hint.__name__})"
    return None if isinstance(value, hint) else f"a {hint.__name__}"


def parse_config(argv: list[str]) -> Config:
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    known, rest = pre.parse_known_args(argv)
    defaults = read_toml(known.config) if known.config else Config()
    return tyro.cli(Config, prog="rpp-train", args=rest, default=defaults)


def read_toml(path: str) -> Config:
    """The file at `path`, or the one of that name that ships with the trainer."""
    file = Path(path)
    shipped = Path(__file__).parent / "configs" / f"{path}.toml"
    if not file.is_file() and shipped.is_file():
        file = shipped
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.toml")))
        raise ConfigError(
            f"--config: no file {path!r}, and none of that name ships with the trainer ({names})"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config: {file} is not TOML: {error}") from None
    return config_from(values, source=str(file))


def config_from(values: dict[str, Any], source: str) -> Config:
    names = [field.name for field in dataclasses.fields(Config)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`rpp-train --help` lists them all"
            raise ConfigError(f"{source}: unknown key {key!r}; {hint}")
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def to_toml(config: Config) -> str:
    """What `read_toml` reads back as an equal config: json writes all but floats, and repr those, as TOML does."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    return "".join(f"{k} = {repr(v) if isinstance(v, float) else json.dumps(v)}\n" for k, v in values.items())
