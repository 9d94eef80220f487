"""Weights and masks for a sampler whose policy is not the trained one."""

import hosts
from batches import GROUP_SIZE, make
from compare import cases, distance, row

import rpp_kernels as rpp


def ours(level, outside, **bounds):
    return lambda b: (
        rpp.rollout_weights(
            b.old_logps, b.sampling_logps, b.completion_mask, level=level, outside=outside, **bounds
        ).weights
    )


def verl(level, threshold):
    return lambda b: hosts.verl_rollout_weights(
        b.old_logps, b.sampling_logps, b.completion_mask, level=level, threshold=threshold
    )


def trl(mode, low, high):
    def host(b):
        ratio = hosts.trl_rollout(
            "GRPOTrainer",
            b.scores,
            b.old_logps,
            b.completion_mask,
            group_size=GROUP_SIZE,
            sampling_logps=b.sampling_logps,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        )["importance_sampling_ratio"]
        return ratio.expand_as(b.logps)

    return host


def kept(weights):
    return weights.ne(0).to(weights)


BOUNDS = {"low": 0.7, "high": 1.5}
ROWS = [
    row("verl token truncated", verl("token", 1.5), ours("token", "truncate", high=1.5)),
    row("verl token icepop", verl("token", "0.7_1.5"), ours("token", "mask", **BOUNDS)),
    row("verl sequence truncated", verl("sequence", 1.5), ours("sequence", "truncate", high=1.5)),
    row("verl sequence icepop", verl("sequence", "0.3_3"), ours("sequence", "mask", low=0.3, high=3.0)),
    *[
        row(
            f"verl rejects by {kind}",  # its k1 is -log of the weight, so the bounds change places
            lambda b, kind=kind: hosts.verl_rejection_mask(
                b.old_logps, b.sampling_logps, b.completion_mask, kind=kind, threshold="0.8_1.6"
            ),
            lambda b, level=level: kept(ours(level, "mask", low=1 / 1.6, high=1 / 0.8)(b)),
        )
        for kind, level in [("token_k1", "token"), ("seq_sum_k1", "sequence"), ("seq_mean_k1", "geometric")]
    ],
    *[
        row(
            f"trl {mode}",
            trl(mode, low, high),
            ours(level, outside, low=low or 0.0, high=high),
            exact=None,  # the log-probs of the sampler are float32 always
        )
        for mode, level, outside, low, high in [
            ("token_truncate", "token", "truncate", 0.7, 1.5),
            ("token_truncate", "token", "truncate", None, 1.5),
            ("token_mask", "token", "mask", 0.7, 1.5),
            ("sequence_truncate", "sequence", "truncate", 0.3, 3.0),
            ("sequence_mask", "sequence", "mask", None, 3.0),
        ]
    ],
]


@cases(ROWS)
def test_the_host_weighs_the_same(row, dtype, seed):
    batch = make(seed, dtype)
    assert distance(row, batch) <= 1
