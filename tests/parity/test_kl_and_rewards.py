"""KL estimators in value and gradient, rewards for each token, and the penalty on long completions."""

import hosts
from batches import make
from compare import cases, distance, row

import rpp_kernels as rpp


def far(batch, estimator, **options):
    """Our KL of log-ratios wide enough for every clamp: their spread is 16."""
    return rpp.kl_penalty(
        40 * batch.logps, 40 * batch.ref_logps, batch.completion_mask, estimator=estimator, kl_clamp=10.0, **options
    )


KL = [
    *[
        row(
            f"verl {name}",
            lambda b, name=name: hosts.verl_kl_penalty(b.logps, b.ref_logps, name),
            lambda b, ours=ours: rpp.kl_penalty(b.logps, b.ref_logps, b.completion_mask, **ours),
            wrt=("logps",),
        )
        for name, ours in [
            ("kl", {"estimator": "k1"}),
            ("abs", {"estimator": "abs"}),
            ("mse", {"estimator": "k2"}),
            ("low_var_kl", {"estimator": "k3", "kl_clamp": 10.0}),
            ("k1+", {"estimator": "k1", "gradient": "k2"}),
            ("abs+", {"estimator": "abs", "gradient": "k2"}),
            ("k3+", {"estimator": "k3", "kl_clamp": 10.0, "gradient": "k2"}),
        ]
    ],
    *[
        row(
            f"verl {name}, clamped",
            lambda b, name=name: hosts.verl_kl_penalty(40 * b.logps, 40 * b.ref_logps, name),
            lambda b, ours=ours: far(b, "k3", **ours),
            wrt=("logps",),
        )
        for name, ours in [("k3", {}), ("k3+", {"gradient": "k2"})]
    ],
    *[
        row(
            f"openrlhf {kind}{' unbiased' * unbiased}",
            lambda b, kind=kind, unbiased=unbiased: hosts.openrlhf_kl(
                40 * b.logps, 40 * b.ref_logps, kind, unbiased_gradient=unbiased
            ),
            lambda b, kind=kind, unbiased=unbiased: far(b, kind, gradient="k2" if unbiased else None),
            wrt=("logps",),
            exact=None,
        )
        for kind in ("k1", "k2", "k3")
        for unbiased in (False, True)
        if not (kind == "k2" and unbiased)
    ],
    row(
        "openrlhf k2 unbiased",  # below the clamp only: beyond it the gradient of our k2 is 0 however it is asked for
        lambda b: hosts.openrlhf_kl(b.logps, b.ref_logps, "k2", unbiased_gradient=True),
        lambda b: rpp.kl_penalty(b.logps, b.ref_logps, b.completion_mask, estimator="k2", gradient="k2", kl_clamp=10.0),
        wrt=("logps",),
        exact=None,
    ),
]

REWARDS = [
    row(
        "openrlhf compute_reward",
        lambda b: hosts.openrlhf_token_rewards(b.scores, b.kl, b.completion_mask, beta=0.1, clip=(-1.5, 1.5)),
        lambda b: rpp.token_rewards(b.scores.clamp(-1.5, 1.5), b.kl, b.completion_mask, beta=0.1),
    ),
    row(
        "verl rewards",
        lambda b: b.score_rewards - 0.1 * hosts.verl_kl_penalty(b.old_logps, b.ref_logps, "kl"),
        lambda b: rpp.token_rewards(
            b.scores, rpp.kl_penalty(b.old_logps, b.ref_logps, b.completion_mask), b.completion_mask, beta=0.1
        ),
    ),
    row(
        "openrlhf overlong penalty",
        lambda b: hosts.openrlhf_overlong_penalty(
            b.completion_mask.sum(1), max_completion_length=9, buffer_length=4, scale=0.5
        ),
        lambda b: rpp.overlong_penalty(b.completion_mask.sum(1), max_completion_length=9, buffer_length=4, scale=0.5),
        exact=None,
        holes=False,
    ),
    row(
        "trl overlong penalty",
        lambda b: hosts.trl_overlong_penalty(b.completion_mask.sum(1), max_completion_length=9, buffer_length=4),
        lambda b: rpp.overlong_penalty(b.completion_mask.sum(1), max_completion_length=9, buffer_length=4),
        exact=None,
        holes=False,
    ),
]


@cases([*KL, *REWARDS])
def test_the_host_has_the_same(row, dtype, seed):
    assert distance(row, make(seed, dtype, holes=row.holes)) <= 1


def test_the_clamps_of_kl_are_reached():
    batch = make()
    d = 40 * (batch.logps - batch.ref_logps)[batch.completion_mask]
    assert d.min() < -20
    assert d.max() > 20
    assert d.abs().min() < 1
