"""What to learn: prompts, split once into training, validation and held-out ones, and a score for a completion."""

import importlib
import json
import math
import os
import random
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from rpp_trainer.config import Config, ConfigError

Record = dict[str, Any]  # {"prompt": text or chat messages, ...}; "answer" where the task can be taught by example
Reward = Callable[[Any, str, Record], float]


@dataclass(frozen=True)
class Task:
    """No prompt stands in two of `train`, `held_out` and `validation`."""

    name: str
    reward: Reward
    train: list[Record]
    held_out: list[Record]
    validation: list[Record]  # when the warm start stops
    examples: list[Record]  # what the warm start teaches: a part of `train`

    def score(self, record: Record, completion: str) -> float:
        value = self.reward(record["prompt"], completion, record)
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ConfigError(f"reward of {self.name}: returned {value!r} for {completion!r}, wanted a finite number")
        return score


def load_task(config: Config) -> Task:
    if config.prompts:
        return _jsonl_task(config)
    if config.task == "letters":
        return _letters_task(config)
    if config.task.startswith("reasoning-gym:"):
        return _reasoning_gym_task(config)
    raise ConfigError(f"task: is {config.task!r}, wanted 'letters' or 'reasoning-gym:NAME'")


def prompt_stream(records: list[Record], seed: int) -> Iterator[Record]:
    """All records in a random order, then again in another, without end."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(records, len(records))


def _split(name: str, reward: Reward, records: list[Record], config: Config, num_validation: int = 0) -> Task:
    """Repeated prompts are dropped first, so that the lists are disjoint."""
    unique = list({json.dumps(r["prompt"], sort_keys=True): r for r in records}.values())
    random.Random(config.seed).shuffle(unique)
    first, second = config.num_eval_prompts, config.num_eval_prompts + num_validation
    held_out, validation, train = unique[:first], unique[first:second], unique[second:]
    if not train:
        raise ConfigError(f"num_eval_prompts: is {config.num_eval_prompts}, and {name} has only {len(unique)} prompts")
    return Task(name, reward, train, held_out, validation, [record for record in train if record.get("example")])


# ---------------------------------------------------------------- letters: a task made here

LETTERS = string.ascii_lowercase
WORD_LENGTHS = (4, 14)
LONGEST_EXAMPLE = 5


def _letters_task(config: Config) -> Task:
    """`hello>` -> `ehlo`: the distinct letters of a random word, sorted; then the EOS.

    Only answers to short words are taught by example. The long ones are for RL to learn, from its reward alone.
    """
    rng = random.Random(config.seed)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(*WORD_LENGTHS))) for _ in range(25_000)]
    records = [
        {"prompt": f"{word}>", "answer": "".join(sorted(set(word))), "example": len(word) <= LONGEST_EXAMPLE}
        for word in words
    ]
    return _split("letters", letters_reward, records, config, num_validation=256)


def letters_reward(prompt: str, completion: str, record: Record) -> float:
    """+1 for the answer; else -1 plus partial credit for the letters that are right before the first wrong one."""
    answer = record["answer"]
    matches = [a == b for a, b in zip(completion, answer, strict=False)]
    right = [*matches, False].index(False)
    return 2 * right / max(len(completion), len(answer)) - 1


# ---------------------------------------------------------------- reasoning-gym, and the user's own


def _reasoning_gym_task(config: Config) -> Task:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"task: {config.task!r} needs `pip install reasoning-gym` ({error})") from None
    name, _, query = config.task.removeprefix("reasoning-gym:").partition("?")
    options = {key: json.loads(value) for key, value in parse_qsl(query)}
    size = config.num_eval_prompts + min(25_000, config.steps * config.rollout_batch_size // config.group_size)
    try:
        data = reasoning_gym.create_dataset(name, size=2 * size, seed=config.seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"task: reasoning-gym cannot make {config.task!r}: {error}") from None

    def reward(prompt: str, completion: str, record: Record) -> float:
        """The verifier's score in [0, 1], made symmetric. It is shown what stands in <answer> tags; without tags, the
        completion and its last word, as chat models like to say `The answer is 7.`, and the better score counts."""
        tagged = reasoning_gym.utils.extract_answer(completion)
        answers = [completion.strip(), completion.strip().rstrip(".").split(" ")[-1]] if tagged is None else [tagged]
        return 2 * max(float(data.score_answer(answer, record["entry"])) for answer in answers) - 1

    records = [{"prompt": entry["question"], "answer": entry["answer"], "entry": entry} for entry in data]
    return _split(config.task, reward, records, config)


def _jsonl_task(config: Config) -> Task:
    records = []
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"prompts: cannot read {config.prompts!r}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"prompts: {config.prompts}:{number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str | list) or not record["prompt"]:
            raise ConfigError(f'prompts: {config.prompts}:{number} wants {{"prompt": text or list of messages, ...}}')
        records.append(record)
    return _split(config.prompts, _load_reward(config.reward), records, config)


def _load_reward(path: str) -> Reward:
    module_name, _, function_name = path.partition(":")
    if not function_name:
        raise ConfigError(f"reward: is {path!r}, wanted module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not look in the current folder by itself
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"reward: cannot import {module_name!r} from {os.getcwd()} or sys.path: {error}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"reward: {module.__file__} has no function {function_name!r}")
    return function
