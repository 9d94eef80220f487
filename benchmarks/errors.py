"""How far log-probs are from float64, and a ratio that should be 1 from 1: `python benchmarks/errors.py`, 30 seconds.

Hidden states and the head's weight are bfloat16, as a model has them, and the float64 results are of these very
operands: what is measured is the way from them to a log-prob. Targets are drawn from the model itself, as those of a
rollout are. A spread is the standard deviation of the logits; the largest of a row is several times that.

The ratio exp(logps - old_logps) of a policy that has not changed is 1 by definition. It is shown for old log-probs of
the same op, and for those of other paths, as where an inference engine or another library made them.

benchmarks/report.py turns the JSON into docs/logp_errors.png and the tables of docs/numerics.md.
"""

import argparse
import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

TOKENS, VOCAB, HIDDEN = 1024, 32000, 512
SPREADS = (2, 4, 8)
EXPONENTS = [-8 + i / 4 for i in range(37)]  # of the bins, powers of 10
OURS = "rpp-kernels, linear_logps"
BY_PARTS = 100  # tokens


def main() -> None:
    args = _parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from run import machine

    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "machine": machine(args.threads, " ".join(["python", "benchmarks/errors.py", *sys.argv[1:]])),
        "size": {"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden},
        "exponents": EXPONENTS,
        "errors": [],
        "ratios": [],
    }
    for spread in SPREADS:
        errors, ratios, largest = measured(args.tokens, args.vocab, args.hidden, spread)
        result["errors"] += [{"spread": spread, "largest_logit": largest, "path": k, **v} for k, v in errors.items()]
        result["ratios"] += [{"spread": spread, "old": k, **v} for k, v in ratios.items()]
    args.json.write_text(json.dumps(result, indent=1) + "\n")


def measured(
    tokens: int, vocab: int, hidden: int, spread: float
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]], float]:
    """Errors by path, ratios by where the old log-probs are from, and the largest logit."""
    import torch

    import rpp_kernels as rpp

    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, hidden, generator=generator) * (spread / hidden**0.5)).to(torch.bfloat16)
    hidden_states = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
    exact = hidden_states.double() @ weight.double().T
    gumbel = torch.empty_like(exact).exponential_(generator=generator).log_().neg_()
    ids = gumbel.add_(exact).argmax(-1)
    wanted = exact.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    largest = float(exact.abs().max())
    del exact, gumbel

    def ours(rows: slice = slice(None), **options: bool) -> torch.Tensor:
        return rpp.linear_logps(hidden_states[rows], weight, ids[rows], **options).logps

    def by_parts(**options: bool) -> torch.Tensor:
        return torch.cat([ours(slice(i, i + BY_PARTS), **options) for i in range(0, tokens, BY_PARTS)])

    def chosen(logps: torch.Tensor) -> torch.Tensor:
        return logps.gather(-1, ids[:, None]).squeeze(-1).float()

    logps = ours()
    logits = hidden_states @ weight.T
    others = {
        "bfloat16 logits, log_softmax in float32": chosen(logits.float().log_softmax(-1)),
        "bfloat16 logits and log_softmax": chosen(logits.log_softmax(-1)),
        "float32 logits, log-probs returned in bfloat16": logps.to(torch.bfloat16).float(),
    }
    errors = {path: error_of(x.double() - wanted) for path, x in {OURS: logps, **others}.items()}
    again = {
        "the same call": ours(),
        f"the same op, {BY_PARTS} tokens a call": by_parts(),
        f"the same op, {BY_PARTS} tokens a call, batch_invariant": by_parts(batch_invariant=True),
    }
    invariant = ours(batch_invariant=True)
    ratios = {old: ratio_of((invariant if "invariant" in old else logps) - x) for old, x in {**again, **others}.items()}
    return errors, ratios, largest


def error_of(error: Any) -> dict[str, Any]:
    size = error.abs()
    edges = error.new_tensor([0.0, *(10**x for x in EXPONENTS[1:-1]), math.inf])
    counts = [int(((size >= low) & (size < high)).sum()) for low, high in pairwise(edges)]
    return {
        "median": float(size.median()),
        "p99": float(size.quantile(0.99)),
        "max": float(size.max()),
        "counts": counts,
    }


def ratio_of(log_ratio: Any) -> dict[str, float]:
    ratio = log_ratio.double().exp()
    return {
        "p1": float(ratio.quantile(0.01)),
        "p99": float(ratio.quantile(0.99)),
        "farthest": float(ratio[(ratio - 1).abs().argmax()]),
        "exactly_1": float((ratio == 1).double().mean()),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "errors.json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
