import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rpp_trainer.config import Config, ConfigError
from rpp_trainer.tasks import LONGEST_EXAMPLE, letters_reward, load_task, prompt_stream


@pytest.mark.parametrize(
    ("completion", "score"),
    [("ehlo", 1.0), ("ehol", 0.0), ("", -1.0), ("hleo", -1.0), ("ehlox", 0.6), ("ehl", 0.5), ("ehlo>", 0.6)],
)
def test_letters_reward(completion: str, score: float) -> None:
    record = {"prompt": "hello>", "answer": "ehlo"}
    assert letters_reward(record["prompt"], completion, record) == pytest.approx(score)


def test_letters_answers_are_right() -> None:
    for record in load_task(Config()).train[:200]:
        word = record["prompt"].removesuffix(">")
        assert record["answer"] == "".join(sorted(set(word)))


def test_held_out_prompts_are_never_trained_on() -> None:
    task = load_task(Config())
    train, held_out, validation, examples = (
        {record["prompt"] for record in records}
        for records in (task.train, task.held_out, task.validation, task.examples)
    )
    assert len(held_out) == Config().num_eval_prompts
    assert not held_out & train
    assert not held_out & validation
    assert not validation & train
    assert examples <= train
    assert max(map(len, examples)) == LONGEST_EXAMPLE + 1  # and the ">"
    streamed = itertools.islice(prompt_stream(task.train, seed=0), len(task.train))
    assert {record["prompt"] for record in streamed} == train


def _jsonl_config(tmp_path: Path, lines: list[str], reward: str = "builtins:len") -> Config:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    return Config(prompts=str(file), reward=reward, num_eval_prompts=2)


def test_repeated_jsonl_prompts_do_not_leak_into_held_out(tmp_path: Path) -> None:
    task = load_task(_jsonl_config(tmp_path, [json.dumps({"prompt": "abc"[i % 3]}) for i in range(30)]))
    assert len(task.held_out) == 2
    assert len(task.train) == 1


def test_jsonl_errors_say_where(tmp_path: Path) -> None:
    for lines, message in (
        (['{"prompt": "a"}', "{"], ":2 is not JSON"),
        (['{"text": "a"}'], ":1 wants"),
        (['{"prompt": "a"}'], "num_eval_prompts: is 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_task(_jsonl_config(tmp_path, lines))
    with pytest.raises(ConfigError, match="cannot read"):
        load_task(Config(prompts="nowhere.jsonl", reward="builtins:len"))


@pytest.mark.parametrize(
    ("reward", "message"),
    [("no_such_module:f", "cannot import"), ("json:f", "no function 'f'"), ("json", "module:function")],
)
def test_reward_that_is_not_there(tmp_path: Path, reward: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(_jsonl_config(tmp_path, ['{"prompt": "a"}'] * 3, reward))


@pytest.mark.parametrize("value", ["nan", "inf", "None", "'good'"])
def test_reward_that_is_not_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, request: pytest.FixtureRequest
) -> None:
    module = f"bad_reward_{request.node.callspec.indices['value']}"
    (tmp_path / f"{module}.py").write_text(
        f"from math import inf, nan\ndef score(prompt, completion, record): return {value}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = _jsonl_config(tmp_path, [json.dumps({"prompt": p}) for p in "abc"], f"{module}:score")
    task = load_task(config)
    with pytest.raises(ConfigError, match="wanted a finite number"):
        task.score(task.train[0], "x")


def test_unknown_task(small: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="task: is 'chess'"):
        load_task(small(task="chess"))


def test_reasoning_gym(small: Callable[..., Config]) -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task(small(task="reasoning-gym:chain_sum?max_terms=2&max_digits=1"))
    record = task.train[0]
    assert task.score(record, record["answer"]) == 1.0
    assert task.score(record, f"It is <answer>{record['answer']}</answer>") == 1.0
    assert task.score(record, f"The answer is {record['answer']}.") == 1.0
    assert task.score(record, f"<answer>wrong</answer> {record['answer']}") == -1.0
    assert task.score(record, "no idea") == -1.0
    assert not {r["prompt"] for r in task.train} & {r["prompt"] for r in task.held_out}
    with pytest.raises(ConfigError, match="reasoning-gym cannot make"):
        load_task(small(task="reasoning-gym:no_such_game"))
