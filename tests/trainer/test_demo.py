import json
from pathlib import Path

import pytest
from rpp_trainer.config import Config
from rpp_trainer.train import train


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_learns_by_rl(seed: int, tmp_path: Path) -> None:
    """What README promises of `make demo`: held-out accuracy from at most 0.45 to at least 0.85."""
    path = train(Config(seed=seed, output_dir=str(tmp_path))).path
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["held_out_accuracy"] <= 0.45
    assert rows[-1]["held_out_accuracy"] >= 0.85
