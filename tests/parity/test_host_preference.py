"""Losses of pairs of completions: DPO and its relatives, in value and in gradient."""

import hosts
from batches import make
from compare import cases, distance, row

import rpp_kernels as rpp

BETA = 0.3
LOSSES = ("sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
SMOOTHED = ("robust", "exo_pair")


def ours(loss_type, **options):
    return lambda b, beta=BETA: (
        rpp.dpo_loss(b.logps, b.ref_logps, b.completion_mask, beta=beta, loss_type=loss_type, **options).loss
    )


def ours_from_hidden_states(loss_type, **options):
    def call(b, beta=BETA):
        mask = b.completion_mask
        logps = rpp.linear_logps(b.hidden_states, b.weight, b.target_ids, mask, temperature=b.temperature).logps
        ref_logps = rpp.linear_logps(b.ref_hidden_states, b.ref_weight, b.target_ids, mask).logps
        return rpp.dpo_loss(logps, ref_logps, mask, beta=beta, loss_type=loss_type, **options).loss

    return call


def openrlhf(**options):
    return lambda b: hosts.openrlhf_dpo_loss(b.logps, b.ref_logps, b.completion_mask, beta=BETA, **options)


def trl(loss_type, **options):
    return lambda b: hosts.trl_dpo_loss(loss_type, b.logps, b.ref_logps, b.completion_mask, beta=BETA, **options)


def liger(loss_type, **options):
    return lambda b: hosts.liger_dpo_loss(
        loss_type,
        b.hidden_states,
        b.weight,
        b.target_ids,
        b.ref_hidden_states,
        b.ref_weight,
        b.completion_mask,
        beta=BETA,
        **options,
    )


def smoothing(loss_type):
    return {"label_smoothing": 0.1} if loss_type in SMOOTHED else {}


LOGPS = {"wrt": ("logps",), "options": {"beta": BETA}}
ROWS = [
    row("openrlhf sigmoid", openrlhf(), ours("sigmoid"), **LOGPS),
    row("openrlhf smoothed", openrlhf(label_smoothing=0.1), ours("sigmoid", label_smoothing=0.1), **LOGPS),
    row("openrlhf ipo", openrlhf(ipo=True), ours("ipo"), **LOGPS),
    *[
        row(f"trl {name}", trl(name, **smoothing(name)), ours(name, **smoothing(name)), exact=1e-7, **LOGPS)
        for name in LOSSES
    ],
    row("trl ipo", trl("ipo"), ours("ipo", length_normalized=True), **LOGPS),
    row("trl sigmoid_norm", trl("sigmoid_norm"), ours("sigmoid", length_normalized=True), **LOGPS),
    *[
        row(
            f"liger {name}",
            liger(name, **smoothing(name)),
            ours_from_hidden_states(name, **smoothing(name)),
            wrt=("hidden_states", "weight"),
            exact=None,
            options={"beta": BETA},
        )
        for name in LOSSES
    ],
]


@cases(ROWS)
def test_the_host_says_the_same(row, dtype, seed):
    assert distance(row, make(seed, dtype)) <= 1
