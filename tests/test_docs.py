"""What the documentation promises is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rpp_kernels as rpp

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_table_of_ops_is_the_generated_one():
    done = subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", page.read_text(), flags=re.M)
    assert {a or b for a, b in named} <= targets


def run_examples(page, names):
    for example in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S):
        exec(example, names)


def test_the_examples_of_the_readme_and_of_algorithms_md_run():
    B, S, H, V = 4, 5, 8, 11
    names = {
        "rpp": rpp,
        "hidden_states": torch.randn(B, S, H, requires_grad=True),
        "lm_head": torch.nn.Linear(H, V),
        "weight": torch.randn(V, H),
        "target_ids": torch.randint(V, (B, S)),
        "completion_mask": torch.arange(S) < torch.tensor([5, 3, 4, 5])[:, None],
        "scores": torch.tensor([1.0, -1.0, 0.5, 0.0]),
        **{name: -torch.rand(B, S) for name in ("logps", "old_logps", "ref_logps", "sampling_logps")},
    }
    run_examples("README.md", names)
    assert names["hidden_states"].grad.isfinite().all()
    run_examples("docs/algorithms.md", names)
    assert names["loss"].isfinite()


def test_the_examples_of_preference_md_run():
    P, S, H, V = 2, 5, 8, 11
    inside = torch.arange(S) < torch.tensor([5, 3, 4, 5])[:, None]
    names = {
        "P": P,
        "logps": -torch.rand(2 * P, S),
        "ref_logps": -torch.rand(2 * P, S),
        "scores": torch.tensor([1.0, -1.0, 0.5, 0.0]),
        "hidden_states": torch.randn(2 * P, S, H),
        "target_ids": torch.randint(V, (2 * P, S)),
    }
    names |= {f"packed_{k}": names[k][inside] for k in ("logps", "ref_logps", "hidden_states", "target_ids")}
    names |= {"completion_mask": inside, "cu_seqlens": torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))}
    names["lm_head"] = torch.nn.Linear(H, V, bias=False)
    learned = [names[name].requires_grad_() for name in ("logps", "hidden_states")]
    run_examples("docs/preference.md", names)
    assert all(x.grad.isfinite().all() for x in learned)
