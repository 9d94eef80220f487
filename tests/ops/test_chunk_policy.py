"""The kernel that reads logits once: log-probs, and the gradient of the policy loss, against the spec in float64."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels import backends, reference
from rpp_kernels.ops.chunks import Chunks
from rpp_kernels.ops.policy_loss import PolicyOptions, check_options
from rpp_kernels.testing import assert_close_to_reference, make_batch

f64 = torch.float64
# What one block keeps, what two, four and eight keep, what no cluster keeps; whole vectors or not.
VOCABULARIES = (1, 3, 8, 100, 4097, 20_000, 33_000, 73_735, 80_000, 152_064)


@pytest.fixture
def kernel(backend, device):
    kernels = backends.kernels(backend) if backend != "reference" else None
    if not hasattr(kernels, "chunk_policy_out") or (backend, device) == ("native", "cpu"):
        pytest.skip("only the CUDA backend reads logits once")
    return kernels.chunk_policy_out


def options(**changes) -> tuple[PolicyOptions, tuple[list[float], list[int]]]:
    chosen = PolicyOptions(
        *("clip", None, None, None, None, None, "token", 0.0, "k3", None, None, False, 0.0, 20.0),
    )._replace(**changes)
    numbers, modes = check_options(chosen, chosen.beta != 0)
    return chosen, (list(numbers), [modes.surrogate, modes.kl_estimator, modes.kl_gradient, modes.kl_bias_correction])


def batch(n, vocab, dtype, device, peak=3.0):
    generator = torch.Generator().manual_seed(vocab)
    logits = (peak * torch.randn(n, vocab, generator=generator)).to(dtype)
    ids = torch.randint(vocab, (n,), generator=generator)
    own = torch.float64 if dtype == f64 else torch.float32
    logps = reference.logps_from_logits(logits.double(), ids).logps
    near = [logps + 0.4 * torch.randn(n, generator=generator, dtype=f64) for _ in range(2)]
    advantages = torch.randn(n, generator=generator, dtype=f64)
    weights = torch.rand(n, generator=generator, dtype=f64)
    mask = torch.rand(n, generator=generator) < 0.7
    tokens = (x.to(own).to(device) for x in (*near, advantages, weights))
    return logits.to(device), ids.to(device), *tokens, mask.to(device)


def expected(logits, ids, old, ref, advantages, weights, mask, scale, temperature, softcap, chosen):
    """(logps, entropy) and the gradient, by autograd of the spec in float64."""
    z = logits.double().requires_grad_()
    capped = z if softcap == 0 else softcap * torch.tanh(z / softcap)
    logps, entropy, *_ = reference.logps_from_logits(capped, ids, mask, temperature=temperature)
    constants = {"weights": weights, "ref_logps": ref if chosen.beta else None}
    if chosen.entropy_coef:
        constants["entropy"] = entropy
    loss = reference.policy_loss(
        logps,
        None if old is None else old.double(),
        advantages.double(),
        mask,
        **{k: None if x is None else (x if k == "entropy" else x.double()) for k, x in constants.items()},
        **chosen.by_name(),
        reduction="none",
        cu_seqlens=torch.tensor([0, len(ids)]),
    ).loss
    (loss * torch.where(mask, scale, 0.0)).sum().backward()
    return logps.detach(), entropy.detach(), z.grad


def poisoned(mask, *tensors):
    return [torch.where(mask.view(-1, *[1] * (x.dim() - 1)), x, torch.nan) for x in tensors]


def assert_close(actual, wanted, dtype):
    """Of one number at most a few roundings of its dtype, beside what is lost in logits of float32."""
    rtol = {f64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    wanted = wanted.detach()
    top = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else 1.0
    torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=rtol * 0.05 * float(top) + 1e-12)


def run(kernel, dlogits, logits, ids, old, ref, advantages, weights, mask, scale, temperature, softcap, chosen):
    chosen, (numbers, modes) = chosen
    each = temperature if isinstance(temperature, torch.Tensor) else None
    scalar = 1.0 if each is not None else temperature
    own = torch.float64 if logits.dtype == f64 else torch.float32
    head = ids, mask, scalar, None if each is None else each.to(own), softcap
    policy = old, advantages, weights, ref if chosen.beta else None, scale
    return kernel(dlogits, logits, *head, *policy, *numbers, *modes)


LOSSES = {
    "clip": {},
    "dual clip": {"dual_clip": 1.5},
    "reinforce": {"surrogate": "reinforce"},
    "cispo": {"surrogate": "cispo"},
    "sapo": {"surrogate": "sapo"},
    "kl": {"beta": 0.2},
    "kl k2 corrected": {"beta": 0.2, "kl_estimator": "k2", "kl_bias_correction": True},
    "kl of another gradient": {"beta": 0.2, "kl_estimator": "k3", "kl_gradient": "k2", "kl_clamp": 0.05},
    "entropy": {"entropy_coef": 0.3},
    "all": {"beta": 0.1, "entropy_coef": 0.2, "kl_estimator": "k1", "log_ratio_clamp": 0.3},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_every_loss(kernel, device, loss, dtype):
    logits, ids, old, ref, advantages, weights, mask = batch(9, 60, dtype, device)
    chosen = options(**LOSSES[loss])
    scale = torch.rand(9, dtype=f64).to(device)
    wanted = expected(logits, ids, old, ref, advantages, weights, mask, scale, 0.8, 0.0, chosen[0])
    dlogits = torch.full_like(logits, torch.nan)
    tokens = poisoned(mask, old, ref, advantages, weights)
    ids = torch.where(mask, ids, -100)
    results = run(kernel, dlogits, *poisoned(mask, logits), ids, *tokens, mask, scale, 0.8, 0.0, chosen)
    for actual, want in zip((*results[:2], dlogits), wanted, strict=True):
        assert_close(actual, want, dtype)
    assert not dlogits[~mask].any()


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    "storage", ["float32", "float32 to bfloat16", "float32 to float16", "bfloat16", "float16", "float64"]
)
def test_every_size_and_storage(kernel, device, vocab, storage):
    dtype, _, out = storage.partition(" to ")
    dtype, out = getattr(torch, dtype), getattr(torch, out or dtype)
    logits, ids, old, ref, advantages, weights, mask = batch(3, vocab, dtype, device)
    chosen, scale = options(entropy_coef=0.1), torch.tensor([0.25], dtype=f64, device=device)
    wanted = expected(logits, ids, old, ref, advantages, weights, mask, scale, 1.0, 0.0, chosen[0])
    dlogits = logits.clone() if out == dtype else logits.new_empty(logits.shape, dtype=out)
    source = dlogits if out == dtype else logits  # in place where it can be
    results = run(kernel, dlogits, source, ids, old, ref, advantages, weights, mask, scale, 1.0, 0.0, chosen)
    own = f64 if dtype == f64 else torch.float32
    assert_close(results[0], wanted[0], own)
    assert_close(results[1], wanted[1], own)
    assert_close(dlogits, wanted[2], out)
    lse = logits.double().logsumexp(1)
    assert_close((results[2].double() + results[3])[mask], lse[mask], f64 if dtype == f64 else torch.float32)


@pytest.mark.parametrize("vocab", [50, 33_001])
def test_rows_that_begin_anywhere_have_the_same_bits(kernel, device, vocab):
    logits, ids, old, ref, advantages, weights, mask = batch(4, vocab, torch.float32, device)
    scale, chosen = torch.ones(1, dtype=f64, device=device), options()
    first = None
    for gap in (0, 1, 4):
        wide = torch.full((4, vocab + gap), torch.nan, device=device)
        rows, out = wide.clone()[:, :vocab], wide.clone()
        rows.copy_(logits)
        results = run(kernel, out[:, :vocab], rows, ids, old, ref, advantages, weights, mask, scale, 1.0, 0.0, chosen)
        assert out[:, vocab:].isnan().all()
        if first is None:
            first = (*results, out[:, :vocab])
        assert all(torch.equal(a, b) for a, b in zip(first, (*results, out[:, :vocab]), strict=True))


def test_softcap_and_temperatures_of_tokens(kernel, device):
    logits, ids, old, ref, advantages, weights, mask = batch(6, 1000, torch.float32, device, peak=20.0)
    temperature = torch.linspace(0.5, 2.0, 6, device=device)
    capped = 15 * torch.tanh(logits.double() / 15)
    old = reference.logps_from_logits(capped, ids, temperature=temperature.double()).logps.float() + 0.1
    chosen, scale = options(), torch.ones(1, dtype=f64, device=device)
    wanted = expected(logits, ids, old, ref, advantages, weights, mask, scale, temperature.double(), 15.0, chosen[0])
    dlogits = torch.empty_like(logits)
    results = run(kernel, dlogits, logits, ids, old, ref, advantages, weights, mask, scale, temperature, 15.0, chosen)
    for actual, want in zip((*results[:2], dlogits), wanted, strict=True):
        assert_close(actual, want, torch.float32)


def test_on_policy_has_a_ratio_of_one(kernel, device):
    logits, ids, _, ref, advantages, weights, mask = batch(5, 300, torch.float32, device)
    chosen, scale = options(), torch.ones(1, dtype=f64, device=device)
    with_none, with_own = torch.empty_like(logits), torch.empty_like(logits)
    head = ref, advantages, weights, mask, scale, 1.0, 0.0, chosen
    results = run(kernel, with_none, logits, ids, None, *head)
    run(kernel, with_own, logits, ids, results[0], *head)
    assert torch.equal(with_none, with_own)


def test_what_is_not_finite(kernel, device):
    """A NaN is kept in its row, and no other sees it; a row of -inf has no log-probs; -inf is a probability of 0."""
    logits, ids, old, ref, advantages, weights, _ = batch(4, 500, torch.float32, device)
    logits[0, 7], logits[1], logits[2, 100:400] = math.nan, -math.inf, -math.inf
    ids[2] = 3
    mask, scale = torch.ones(4, dtype=torch.bool, device=device), torch.ones(1, dtype=f64, device=device)
    dlogits, chosen = torch.empty_like(logits), options()
    results = run(kernel, dlogits, logits, ids, old, ref, advantages, weights, mask, scale, 1.0, 0.0, chosen)
    assert results[0][:2].isnan().all()
    assert results[0][2:].isfinite().all()
    assert dlogits[:2].isnan().any(1).all()
    assert dlogits[2:].isfinite().all()
    assert not dlogits[2, 100:400].any()


def test_no_tokens(kernel, device):
    logits, ids, old, ref, advantages, weights, mask = (x[:0] for x in batch(1, 5, torch.float32, device))
    scale = torch.ones(1, dtype=f64, device=device)
    results = run(kernel, logits, logits, ids, old, ref, advantages, weights, mask, scale, 1.0, 0.0, options())
    assert [x.shape for x in results] == [(0,)] * 4


HEADS = {
    "plain": {},
    "a mean over sequences": {"reduction": "seq-mean-token-mean"},
    "kl and entropy": {"beta": 0.1, "entropy_coef": 0.1},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 0.5},
    "a divisor": {"num_items_in_batch": 7},
}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("how", HEADS)
def test_linear_policy_loss_reads_once_where_it_skips_no_rows(kernel, device, how, batch_invariant, monkeypatch):
    batch = make_batch(5, 9, vocab=50, hidden=8, device=device)
    options = HEADS[how] | ({"ref_logps": batch["ref_logps"]} if "beta" in HEADS[how] else {})
    chunks, once = [], Chunks.add_policy_gradient
    monkeypatch.setattr(Chunks, "add_policy_gradient", lambda *a: chunks.append(a) or once(*a))

    def loss(library, x):
        names = "hidden_states", "weight", "target_ids", "old_logps", "advantages", "completion_mask"
        return library.linear_policy_loss(*(x[name] for name in names), **options)

    of_seven_tokens = 7 * 50 * (4 + 4 * 4)
    for skip_rows in (True, False):
        execution = {"skip_rows": skip_rows, "chunk_bytes": of_seven_tokens, "batch_invariant": batch_invariant}
        ours = SimpleNamespace(linear_policy_loss=partial(rpp.linear_policy_loss, **execution))
        assert_close_to_reference(
            lambda f, x, ours=ours: loss(f if f is reference else ours, x), batch, ("hidden_states", "weight")
        )
        assert (len(chunks) > 1) != skip_rows
