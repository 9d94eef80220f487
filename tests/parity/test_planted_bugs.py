"""Comparisons that cannot fail are worth nothing: each is made with a bug in our call, which has to show."""

from dataclasses import replace

import pytest
import torch
from batches import Batch, make
from compare import distance
from test_host_advantages import ADVANTAGES
from test_host_preference import ROWS as PREFERENCE
from test_policy_losses import HEAD, LIGER, POLICY, VALUE

import rpp_kernels as rpp

# The tolerance is 1: a bug is far beyond it.
SHOWS = 5.0


def from_the_model(row, temperature=1.0, shift=0):
    """The row with log-probs made of logits, ours with a temperature and with targets `shift` tokens late."""

    def host(batch):
        logps = batch.logits.log_softmax(-1).gather(-1, batch.target_ids[..., None])[..., 0]
        return row.host(Batch(batch, logps=logps))

    def ours(batch):
        target_ids = batch.target_ids.roll(shift, 1)
        logps = rpp.logps_from_logits(batch.logits, target_ids, temperature=temperature).logps
        return row.ours(Batch(batch, logps=logps, target_ids=target_ids, temperature=temperature * batch.temperature))

    return replace(row, host=host, ours=ours, wrt=HEAD[:2] if "hidden_states" in row.wrt else ("logits",))


def finest(row):
    """In the dtype in which the comparison is the closest."""
    return make(dtype=torch.float32 if row.exact is None else torch.float64, holes=row.holes)


@pytest.mark.parametrize("row", [*POLICY, *LIGER, *PREFERENCE])
def test_temperature_and_targets(row):
    batch = finest(row)
    assert distance(from_the_model(row), batch) <= 1
    assert distance(from_the_model(row, temperature=1.01), batch) > SHOWS
    assert distance(from_the_model(row, shift=1), batch) > SHOWS


NUMBERS = (
    "epsilon",
    "epsilon_low",
    "epsilon_high",
    "dual_clip",
    "tau_positive",
    "tau_negative",
    "beta",
    "entropy_coef",
    "max_completion_length",
    "num_items_in_batch",
)


def off_by_one_percent(name, option):
    """max_completion_length is a whole number, and more than 1% off."""
    if name == "max_completion_length":
        return option + 1
    return (lambda batch: 1.01 * option(batch)) if callable(option) else 1.01 * option


def wrong_options(options):
    """By name. An epsilon_low of 1 is no bound at all."""
    for name in NUMBERS:
        option = options.get(name)
        if option is not None and (name, option) != ("epsilon_low", 1.0):
            yield name, {name: off_by_one_percent(name, option)}
    if "weights" in options:
        yield "weights", {"weights": None}
    if "unbiased" in options:
        yield "unbiased", {"unbiased": not options["unbiased"]}


def wrong_divisor(options):
    """The count of sequences where it is that of tokens, and the other way round."""
    if options.keys().isdisjoint(("num_items_in_batch", "max_completion_length")):
        tokens = options.get("reduction", "token-mean") == "token-mean"
        yield "divisor", {"reduction": "seq-mean-token-sum" if tokens else "token-mean"}


def changeable(rows):
    return [(row, row.values[0].options) for row in rows if row.values[0].options is not None]


LOSSES = [*POLICY, *LIGER, *VALUE]
BUGS = [
    (row, bug) for row, options in changeable([*LOSSES, *ADVANTAGES, *PREFERENCE]) for bug in wrong_options(options)
]
BUGS += [(row, bug) for row, options in changeable(LOSSES) for bug in wrong_divisor(options)]


@pytest.mark.parametrize(
    ("row", "changes"),
    [pytest.param(*row.values, changes, id=f"{row.id}-{name}") for row, (name, changes) in BUGS],
)
def test_options(row, changes):
    def ours(batch):
        return row.ours(batch, **{name: x(batch) if callable(x) else x for name, x in changes.items()})

    assert distance(replace(row, ours=ours), finest(row)) > SHOWS
