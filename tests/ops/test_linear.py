"""linear_logps, linear_loss and linear_policy_loss: the spec, each other, and how much work they do.

What linear_logps has in common with logps_from_logits is in test_logps.py; chunks themselves are in test_chunks.py.
"""

import inspect
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rpp_kernels as rpp
from rpp_kernels import backends, reference
from rpp_kernels.ops import chunks
from rpp_kernels.reference import TokenLogps
from rpp_kernels.testing import assert_close_to_reference, evaluate, make_batch, named

pytestmark = pytest.mark.kernels

assert_close = torch.testing.assert_close
assert_identical = partial(assert_close, rtol=0, atol=0)
assert_close_in_double = partial(assert_close, rtol=1e-12, atol=1e-12)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LEARNED = ("hidden_states", "weight", "bias", "lora_A", "lora_B")
# Of the kernels alone: the spec does not say how it is carried out.
OURS = ("chunk_bytes", "keep_bytes", "skip_rows", "batch_invariant")

# Wider than a block of 16, and neither V nor H nor R is a number of tokens anywhere, by which products are told apart.
V, H, R = 40, 5, 3


def head(T=11, vocab=V, hidden=H, *, scale=1.0, only=None, dtype=torch.float32, device="cpu"):
    """The operands of a head with every option, or with `only` some of them, for T tokens with holes in their mask."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = {
        "hidden_states": normal(T, hidden),
        "weight": normal(vocab, hidden) * (scale * 2 / hidden**0.5),
        "bias": normal(vocab) * scale,
        "lora_A": normal(R, hidden),
        "lora_B": normal(vocab, R) * scale,
        "temperature": torch.rand(T, generator=generator, dtype=torch.float64) + 0.5,
    }
    x = {k: y.to(dtype).to(device) for k, y in x.items()}
    x["target_ids"] = torch.randint(vocab, (T,), generator=generator).to(device)
    x["completion_mask"] = (torch.arange(T) % 4 != 1).to(device)  # holes
    optional = ("bias", "lora_A", "lora_B", "temperature")
    return {k: y for k, y in x.items() if only is None or k not in optional or k in only}


def plain(*args, **kwargs):
    return head(*args, only=("bias",), **kwargs)


def learned(x):
    return [k for k in LEARNED if k in x]


def options_of(f, x, options):
    """The keyword arguments of a head: its tensors in x, and of the options those that `f` has."""
    given = {k: x[k] for k in ("bias", "lora_A", "lora_B", "temperature") if k in x} | options
    return given if f is rpp else {k: v for k, v in given.items() if k not in OURS}


def linear_logps(f, x, **options):
    return f.linear_logps(
        x["hidden_states"], x["weight"], x["target_ids"], x["completion_mask"], **options_of(f, x, options)
    )


def linear_loss(f, x, token_loss, **options):
    return f.linear_loss(
        x["hidden_states"], x["weight"], x["target_ids"], token_loss, x["completion_mask"], **options_of(f, x, options)
    )


POLICY = set(inspect.signature(reference.policy_loss).parameters)


def linear_policy_loss(f, x, **options):
    options = {"cu_seqlens": x.get("cu_seqlens")} | options
    return f.linear_policy_loss(
        x["hidden_states"], x["weight"], x["target_ids"], x.get("old_logps"), x["advantages"], x["completion_mask"],
        **options_of(f, x, options),
    )  # fmt: skip


def two_calls(f, x, **options):
    """What linear_policy_loss is: policy_loss of linear_logps."""
    options = {"cu_seqlens": x.get("cu_seqlens")} | options
    logps, entropy, *_ = linear_logps(f, x, **{k: v for k, v in options.items() if k not in POLICY})
    policy = {k: v for k, v in options.items() if k in POLICY}
    if policy.get("entropy_coef"):
        policy["entropy"] = entropy
    loss, stats = f.policy_loss(logps, x.get("old_logps"), x["advantages"], x["completion_mask"], **policy)
    return rpp.LinearPolicyLoss(loss, stats, logps.detach(), entropy.detach())


def batch(*, packed=False, dtype=torch.float64, device="cpu", old=True):
    """Four sequences of up to 13 tokens with holes; the last is wholly masked, and some advantages are 0."""
    x = make_batch(4, 13, vocab=V, hidden=H, packed=packed, dtype=dtype, device=device)
    shape = x["target_ids"].shape
    keep = torch.rand(shape).to(device) > 0.2
    if packed:
        last = torch.arange(shape[0], device=device) >= x["cu_seqlens"][-2]
    else:
        last = (torch.arange(4, device=device) == 3)[:, None]
    x["completion_mask"] = x["completion_mask"] & keep & ~last
    wide = {k: y.double() if y.is_floating_point() else y for k, y in x.items()}
    logps = linear_logps(reference, wide).logps
    # Ratios near 1, on either side of the clip range.
    x["old_logps"] = (logps + 0.3 * torch.randn(shape, dtype=torch.float64).to(device)).to(dtype) if old else None
    x["advantages"] = torch.where(torch.rand(shape).to(device) < 0.2, 0.0, x["advantages"])
    return {k: y for k, y in x.items() if y is not None}


def surrogate(x, entropy_weight=0.1):
    """A token loss of this batch that is differentiated in both of its arguments."""

    def token_loss(logps, entropy, rows):
        ratio = (logps - x["old_logps"][rows]).exp()
        return -(ratio * x["advantages"][rows] + entropy_weight * entropy) / 7

    return token_loss


def by_logps(f, x, token_loss, **options):
    """What linear_loss is: a loss of linear_logps."""
    logps, entropy, *_ = linear_logps(f, x, **options)
    rows = x["completion_mask"].nonzero(as_tuple=True)
    return rpp.LinearLoss(token_loss(logps[rows], entropy[rows], rows).sum(), logps.detach(), entropy.detach())


@pytest.fixture
def tokens_multiplied(monkeypatch):
    """How many tokens went through each of the three products with a head of V and H, as they are made."""
    seen = Counter()
    multiply = chunks.multiply

    def counted(a, b, out, **options):
        if b.shape == (H, V):
            seen["logits"] += a.shape[0]
        elif a.shape[0] == V:
            seen["weight"] += a.shape[1]
        elif b.shape == (V, H):
            seen["hidden_states"] += a.shape[0]
        else:
            raise AssertionError(f"{a.shape} @ {b.shape} is none of the three")
        return multiply(a, b, out, **options)

    monkeypatch.setattr(chunks, "multiply", counted)
    return seen


def chunks_of(tokens, dtype=torch.float64, backend="native"):
    """The memory of so many tokens: for their logits and, but on a CPU, for four times as many gradients."""
    return tokens * V * dtype.itemsize * (1 if backend == "native" else 5)


# ---------------------------------------------------------------- linear_logps is the spec

HEADS = {
    "plain": ((), {}),
    "bias": (("bias",), {}),
    "lora": (("lora_A", "lora_B"), {"lora_scaling": 0.5}),
    "softcap": ((), {"softcap": 3.0}),
    "logit_scale": (("bias",), {"logit_scale": -0.7}),
    "temperature": (("temperature",), {}),
    "all": (
        ("bias", "lora_A", "lora_B", "temperature"), {"lora_scaling": 0.5, "softcap": 3.0, "logit_scale": 0.7}
    ),
}  # fmt: skip
EVERYTHING = HEADS["all"][1]
HOW = {
    "by default": {},
    "small chunks": {"chunk_bytes": chunks_of(3)},
    "kept": {"keep_bytes": 1 << 20},
    "no skipping": {"skip_rows": False},
    "batch invariant": {"batch_invariant": True},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize(("only", "options"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logps_with_every_kind_of_head_is_the_spec(dtype, only, options, how, device):
    x = head(only=only, dtype=dtype, device=device)
    assert_close_to_reference(partial(linear_logps, **options, **how), x, learned(x))


@pytest.mark.parametrize(("only", "options"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_head_of_every_kind_is_the_spec(dtype, only, options, device):
    x = head(only=only, dtype=dtype, device=device)
    assert_close_to_reference(partial(linear_logps, **options), x, ["hidden_states"])


PARTS = [("logps",), ("entropy",), ("lse",), ("logps", "entropy"), ("logps", "lse"), ("entropy", "lse")]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_alone_and_together_are_those_of_the_spec(dtype, parts, frozen, device):
    def some(f, x):
        out = linear_logps(f, x, **EVERYTHING)
        return TokenLogps(*(y if name in parts else y.detach() for name, y in named(out).items()))

    x = head(dtype=dtype, device=device)
    # The gradient of the bias is a sum of tokens that nearly cancel, of which the spec is exact to half a ulp by luck.
    assert_close_to_reference(some, x, ["hidden_states"] if frozen else learned(x), ulps=4 if frozen else 8)


@pytest.mark.parametrize("inputs", [["hidden_states"], list(LEARNED), ["lora_A"], ["lora_B", "hidden_states"]])
@pytest.mark.parametrize("parts", [("logps",), ("entropy",), ("logps", "entropy")])
def test_gradcheck_with_every_option(parts, inputs, device):
    x = head(4, 6, 3, dtype=torch.float64, device=device)

    def f(*values):
        out = linear_logps(rpp, {**x, **dict(zip(inputs, values, strict=True))}, **EVERYTHING)
        return tuple(getattr(out, name) for name in parts)

    assert torch.autograd.gradcheck(f, [x[name].requires_grad_() for name in inputs])


# One token; fewer than a vector; a page of them; a Llama 2; then GPT-2, Qwen 3 padded for its tensor cores, Qwen 2.
VOCABULARIES = [1, 7, 1000, 32000, 50257, 129920, 151936]


@pytest.mark.parametrize("scale", [50, 0.01], ids=["peaked", "flat"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_size_of_vocabulary_peaked_and_flat_is_the_spec(vocab, dtype, scale, device):
    x = plain(3, vocab, 8, scale=scale, dtype=dtype, device=device)
    assert_close_to_reference(linear_logps, x, learned(x))


@pytest.mark.parametrize("scale", [50, 0.01], ids=["peaked", "flat"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logps_are_never_above_0_and_entropy_never_below(dtype, scale, device):
    x = plain(64, 1000, 8, scale=scale, dtype=dtype, device=device)
    best = (x["hidden_states"].double() @ x["weight"].double().T + x["bias"].double()).argmax(-1)
    for ids in (best, x["target_ids"]):
        out = linear_logps(rpp, x | {"target_ids": ids})
        assert (out.logps <= 0).all()
        assert (out.entropy >= 0).all()


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_the_only_token_of_a_vocabulary_is_certain_and_moves_nothing(how, device):
    got = evaluate(partial(linear_logps, rpp, **EVERYTHING, **how), head(5, 1, device=device), LEARNED)
    assert (got["logps"] == 0).all()
    assert (got["entropy"] == 0).all()
    loss = evaluate(lambda x: linear_logps(rpp, x, **how).logps, plain(5, 1, device=device), LEARNED[:3])
    assert all((loss[f"d{k}"] == 0).all() for k in LEARNED[:3])


# ---------------------------------------------------------------- how operands lie in memory


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("frozen", [False, True])
def test_strided_operands_give_what_contiguous_ones_give(frozen, how, device):
    x = head(dtype=torch.float64, device=device)

    def strided(y):
        wide = torch.full((*y.shape[:-1], 2 * y.shape[-1]), math.nan, dtype=y.dtype, device=device)
        wide[..., ::2] = y
        return wide[..., ::2]

    views = x | {k: strided(x[k]) for k in LEARNED}
    views["weight"] = x["weight"].T.contiguous().T
    names = ["hidden_states"] if frozen else LEARNED
    got, want = (evaluate(partial(linear_logps, rpp, **EVERYTHING, **how), y, names) for y in (views, x))
    assert_close_in_double(got, want)


def test_hidden_states_may_be_every_other_sequence_of_a_batch_first_tensor(device):
    x = batch(device=device)
    x["hidden_states"] = x["hidden_states"].transpose(0, 1).contiguous().transpose(0, 1)
    x["target_ids"] = x["target_ids"].T.contiguous().T
    x["completion_mask"] = x["completion_mask"].T.contiguous().T
    assert_close_to_reference(linear_policy_loss, x, learned(x))


@pytest.mark.parametrize("needed", [["weight"], ["bias"], ["lora_A"], ["lora_B"], ["hidden_states", "lora_B"]])
@pytest.mark.parametrize("function", ["logps", "loss", "policy"])
def test_only_some_inputs_require_grad(function, needed, device):
    x = batch(device=device) | {"lora_A": torch.randn(R, H).double(), "lora_B": torch.randn(V, R).double()}
    call = {
        "logps": linear_logps,
        "loss": lambda f, y: linear_loss(f, y, surrogate(y)),
        "policy": linear_policy_loss,
    }[function]
    assert_close_to_reference(call, x, needed)


@pytest.mark.parametrize(("vocab", "hidden"), [(16, 1024), (300, 64), (5000, 64), (32000, 1024), (1 << 20, 64)])
def test_a_chunk_of_tokens_is_no_larger_than_its_budget(vocab, hidden):
    plan = chunks.Plan(0, 0, True, False)
    tokens, _ = chunks.chunk_tokens(True, torch.float32, torch.float32, vocab, hidden, plan)
    assert tokens <= 384 or 4 * tokens * (vocab + 2 * hidden) <= 16 << 20
    assert 4 * tokens * vocab <= 256 << 20
    assert tokens == 384 or 4 * (tokens + 1) * (vocab + 2 * hidden) > 16 << 20


# ---------------------------------------------------------------- linear_loss


@pytest.mark.parametrize("how", [v for v in HOW.values() if "keep_bytes" not in v])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("names", [LEARNED[:3], LEARNED[:1]], ids=["all", "frozen head"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_loss_is_the_spec(dtype, names, packed, how, device):
    x = batch(packed=packed, dtype=dtype, device=device)
    assert_close_to_reference(lambda f, y: linear_loss(f, y, surrogate(y), **how), x, names)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", [v for v in HOW.values() if "keep_bytes" not in v])
def test_linear_loss_is_a_loss_of_linear_logps(packed, how, device):
    x = batch(packed=packed, device=device)
    one, two = (evaluate(lambda y: f(rpp, y, surrogate(y), **how), x, LEARNED[:3]) for f in (linear_loss, by_logps))  # noqa: B023
    assert_close_in_double(one, two)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_the_places_of_the_valid_tokens_each_once(packed, device):
    x = batch(packed=packed, device=device)
    seen = torch.zeros_like(x["target_ids"])

    def token_loss(logps, entropy, rows):
        seen[rows] += 1
        assert logps.shape == entropy.shape == rows[0].shape
        return logps

    out = linear_loss(rpp, x, token_loss, chunk_bytes=chunks_of(3))
    assert_identical(seen, x["completion_mask"].long())
    assert_close_in_double(out.loss, out.logps.sum())


def test_a_token_loss_may_use_one_argument_or_none(device):
    x = batch(device=device)
    for token_loss in (lambda p, e, _: p, lambda p, e, _: e, lambda p, e, _: 2 * p.detach(), lambda p, e, _: p * 0):
        call = lambda f, y: linear_loss(f, y, token_loss).loss + 0 * y["hidden_states"].sum()  # noqa: E731, B023
        assert_close_to_reference(call, x, LEARNED[:1])


def gradients_of(function, x, upstream=1.0):
    inputs = {k: y.detach().clone().requires_grad_(k in LEARNED) for k, y in x.items()}
    (function(inputs).loss * upstream).backward()
    return {k: inputs[k].grad for k in learned(x)}


LOSSES = {"linear_loss": lambda x: linear_loss(rpp, x, surrogate(x)), "policy": partial(linear_policy_loss, rpp)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("upstream", [0.5, 0.0, -3.0])
def test_an_upstream_gradient_scales_every_gradient(upstream, loss, device):
    x = batch(device=device)
    once, scaled = gradients_of(loss, x), gradients_of(loss, x, upstream)
    assert_close_in_double(scaled, {k: upstream * y for k, y in once.items()})


@pytest.mark.parametrize("function", ["loss", "policy"])
def test_gradients_of_two_halves_add_to_that_of_the_whole(function, device):
    x = batch(device=device)
    leaves = {k: x[k].clone().requires_grad_() for k in LEARNED[:3]}
    for half in (slice(0, 2), slice(2, 4)):
        y = {k: leaves[k] if k in ("weight", "bias") else leaves.get(k, v)[half] for k, v in x.items()}
        if function == "loss":
            linear_loss(rpp, y, surrogate(y)).loss.backward()
        else:
            linear_policy_loss(rpp, y, num_items_in_batch=7).loss.backward()
    whole = LOSSES["linear_loss"] if function == "loss" else partial(linear_policy_loss, rpp, num_items_in_batch=7)
    assert_close_in_double({k: y.grad for k, y in leaves.items()}, gradients_of(whole, x))


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_retained_backward_gives_the_same_twice_and_a_third_time(loss, upstream, device):
    x = {k: y.requires_grad_(k in LEARNED) for k, y in batch(device=device).items()}
    out, inputs = loss(x).loss * upstream, [x[k] for k in learned(x)]
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    want = [y.clone() for y in first]
    for y in first:
        y.zero_()  # an optimizer may do so: nothing of ours may live there
    second = torch.autograd.grad(out, inputs, retain_graph=True)
    assert_identical(list(second), want)
    assert_identical(list(torch.autograd.grad(out, inputs)), want)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_second_backward_without_retaining_is_an_error_and_not_a_wrong_gradient(loss, device):
    x = {k: y.requires_grad_(k in LEARNED) for k, y in batch(device=device).items()}
    out = loss(x).loss * 0.5
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_two_losses_of_one_head_add_their_gradients(loss, device):
    x = {k: y.requires_grad_(k in LEARNED) for k, y in batch(device=device).items()}
    inputs = [x[k] for k in learned(x)]
    once = torch.autograd.grad(loss(x).loss, inputs)
    both = torch.autograd.grad(loss(x).loss + 2 * loss(x).loss, inputs)
    assert_close_in_double(list(both), [3 * y for y in once])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_nan_in_a_valid_hidden_state_is_not_lost(loss, device):
    x = batch(device=device)
    at = tuple((x["completion_mask"] & (x["advantages"] != 0)).nonzero()[0])
    x["hidden_states"][at] = math.nan
    got = evaluate(loss, x, LEARNED[:3])
    assert got["loss"].isnan()
    assert got["dhidden_states"][at].isnan().all()
    assert got["dhidden_states"].isnan().sum() == H
    assert got["dweight"].isnan().all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_inference_mode_gives_the_same_values(loss, device):
    x = batch(device=device)
    want = loss(x)
    with torch.inference_mode():
        assert_identical(loss(x), want)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_gradient_is_made_where_none_is_wanted(loss, tokens_multiplied, device):
    x = batch(device=device)
    valid = int(x["completion_mask"].sum())
    without = loss(x)
    assert not without.loss.requires_grad
    assert tokens_multiplied == {"logits": valid}
    tokens_multiplied.clear()
    for k in LEARNED[:3]:
        x[k].requires_grad_()
    with torch.no_grad():
        within = loss(x)
    assert not within.loss.requires_grad
    assert tokens_multiplied == {"logits": valid}
    assert_identical(within, without)


def test_linear_logps_under_no_grad_projects_once_and_keeps_nothing(tokens_multiplied, device):
    x = {k: y.requires_grad_(k in LEARNED) for k, y in plain(dtype=torch.float64, device=device).items()}
    with torch.no_grad():
        out = linear_logps(rpp, x, keep_bytes=1 << 20)
    assert not out.logps.requires_grad
    assert tokens_multiplied == {"logits": int(x["completion_mask"].sum())}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_logps_and_entropy_beside_a_loss_are_detached(loss, device):
    out = loss({k: y.requires_grad_(k in LEARNED) for k, y in batch(device=device).items()})
    assert out.loss.requires_grad
    assert not out.logps.requires_grad
    assert not out.entropy.requires_grad


@pytest.mark.parametrize("how", [linear_logps, partial(linear_policy_loss, importance_sampling_level="sequence")])
def test_a_second_derivative_of_a_frozen_head_is_refused_rather_than_wrong(how, device):
    x = batch(device=device)
    hidden_states = x["hidden_states"].requires_grad_()
    out = how(rpp, x)[0].exp().sum() + (hidden_states**2).sum()
    (first,) = torch.autograd.grad(out, hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="rpp_kernels has no second derivatives"):
        torch.autograd.grad((first**2).sum(), hidden_states)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_gradients_of_many_upstream_gradients_at_once(loss, dtype, device):
    x = {k: y.requires_grad_(k in LEARNED) for k, y in batch(dtype=dtype, device=device).items()}
    upstream, out, inputs = torch.tensor([1.0, -0.5]).to(device), loss(x).loss, [x[k] for k in learned(x)]
    together = torch.autograd.grad(out, inputs, upstream.to(out), is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, inputs, u.to(out), retain_graph=True) for u in upstream]
    assert_identical(list(together), [torch.stack(g) for g in zip(*one_by_one, strict=True)])


@pytest.mark.parametrize("loss", ["linear_loss", "linear_policy_loss"])
@pytest.mark.parametrize("items", [1e6, 1e9])
def test_a_loss_scale_brings_gradients_into_the_range_of_float16(loss, items, device):
    x = make_batch(4, 32, vocab=300, hidden=16, dtype=torch.float16, device=device)
    leaves = {k: x[k].requires_grad_() for k in ("hidden_states", "weight")}
    how = {"num_items_in_batch": items}

    def gradients(f, x, scale):
        def token_loss(logps, entropy, rows):
            return -(logps - x["old_logps"][rows]).exp() * x["advantages"][rows] / items

        out = linear_policy_loss(f, x, **how) if loss == "linear_policy_loss" else linear_loss(f, x, token_loss)
        return torch.autograd.grad(out.loss * scale, [x[k] for k in leaves])

    exact = gradients(reference, {k: y.double() if y.is_floating_point() else y for k, y in x.items()}, items)
    for got, same, want in zip(gradients(rpp, x, items), gradients(reference, x, items), exact, strict=True):
        assert got.dtype == torch.float16
        error, allowed = ((y.double() - want).abs().max() for y in (got, same))
        assert error <= 2 * allowed + 1e-6
        assert want.abs().max() > 0.01


LEAF = torch.zeros(1, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("token_loss", "words"),
    [
        (None, "token_loss: want a function"),
        (3.0, "token_loss: want a function"),
        (lambda p, e, rows: p.sum(), r"token_loss\(...\): want the shape .* of one loss for each token"),
        (lambda p, e, rows: p[:1], r"token_loss\(...\): want the shape"),
        (lambda p, e, rows: p[:, None], r"token_loss\(...\): want"),
        (lambda p, e, rows: p.long(), r"token_loss\(...\): want a float32"),
        (lambda p, e, rows: 0.0, r"token_loss\(...\): want a float32"),
    ],
)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_linear_loss_refuses(name, token_loss, words):
    with backends.use_backend(name), pytest.raises(ValueError, match=words):
        linear_loss(rpp, batch(), token_loss)


@pytest.mark.parametrize("other", [LEAF, LEAF * 2, (LEAF * 2).exp() + 1], ids=["leaf", "non-leaf", "far from its leaf"])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_token_loss_that_would_lose_the_gradient_of_another_tensor_is_refused(name, requires_grad, other):
    x = {k: y.requires_grad_(requires_grad and k in LEARNED) for k, y in batch().items()}
    with backends.use_backend(name):
        with pytest.raises(ValueError, match="token_loss: want logps and entropy as all that requires grad"):
            linear_loss(rpp, x, lambda p, e, rows: p * other)
        with torch.no_grad():  # nothing is lost
            linear_loss(rpp, x, lambda p, e, rows: p * other)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_token_loss_that_is_itself_learned_is_refused(name):
    x = batch()
    leaf = torch.zeros(int(x["completion_mask"].sum()), dtype=torch.float64, requires_grad=True)
    with backends.use_backend(name), pytest.raises(ValueError, match="token_loss: want logps and entropy as all that"):
        linear_loss(rpp, x, lambda p, e, rows: leaf)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_token_loss_that_uses_the_weight_is_refused(name):
    x = {k: y.requires_grad_(k in LEARNED) for k, y in batch().items()}
    with backends.use_backend(name), pytest.raises(ValueError, match="token_loss: want logps and entropy as all that"):
        linear_loss(rpp, x, lambda p, e, rows: p + x["weight"].square().mean())


# ---------------------------------------------------------------- nothing to do


def emptied(x, kind):
    if kind == "no valid token":
        return x | {"completion_mask": torch.zeros_like(x["completion_mask"])}
    tokens = ("hidden_states", "target_ids", "completion_mask", "old_logps", "advantages")
    return {k: y[:0] if k in tokens else y for k, y in x.items()}


@pytest.mark.parametrize("how", [v for v in HOW.values() if "keep_bytes" not in v])
@pytest.mark.parametrize("kind", ["no valid token", "no token"])
@pytest.mark.parametrize("function", ["logps", "loss", "policy", "sequence policy"])
def test_no_tokens_give_zeros_and_zero_gradients(function, kind, how, device):
    x = emptied(batch(device=device), kind)
    call = {
        "logps": linear_logps,
        "loss": lambda f, y, **o: linear_loss(f, y, surrogate(y), **o),
        "policy": linear_policy_loss,
        "sequence policy": partial(linear_policy_loss, importance_sampling_level="sequence"),
    }[function]
    got = evaluate(partial(call, rpp, **how), x, LEARNED[:3])
    assert got["dweight"].shape == x["weight"].shape
    assert got["dhidden_states"].shape == x["hidden_states"].shape
    assert all((y == 0).all() for y in got.values())


@pytest.mark.parametrize("kind", ["no valid token", "no token"])
def test_no_tokens_with_a_frozen_head_give_zeros(kind, device):
    got = evaluate(partial(linear_logps, rpp), emptied(batch(device=device), kind), ["hidden_states"])
    assert all((y == 0).all() for y in got.values())


# ---------------------------------------------------------------- linear_policy_loss is policy_loss of linear_logps

REDUCTIONS = {
    "token-mean": {},
    "seq-mean-token-mean": {},
    "seq-mean-token-sum": {},
    "seq-mean-token-sum-norm": {"max_completion_length": 13},
}
# Three tokens to a chunk: sequences of 7 to 13 tokens are longer, and chunks end within them; 16 tokens: one or two
# whole sequences, and chunks still end within one where the ratio is of tokens.
POLICIES = {
    "by default": {},
    "asymmetric": {"epsilon_low": 0.1, "epsilon_high": 0.3},
    "dual clip": {"dual_clip": 1.1},
    "a clamp that bites": {"log_ratio_clamp": 0.1},
    "number": {"num_items_in_batch": 17},
    "tensor": {"num_items_in_batch": torch.tensor(17)},
    "chunks of 1": {"chunk_bytes": 1},
    "chunks of 3": {"chunk_bytes": chunks_of(3), "dual_clip": 1.1},
    "chunks of 16": {"chunk_bytes": chunks_of(16)},
    "chunks of 3, no skipping": {"chunk_bytes": chunks_of(3), "skip_rows": False},
    "no skipping": {"skip_rows": False},
    "chunks of 3, batch invariant": {"chunk_bytes": chunks_of(3), "batch_invariant": True},
    "batch invariant, no skipping": {"batch_invariant": True, "skip_rows": False},
}


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_policy_loss_is_the_spec(reduction, level, packed, options, device):
    options = {"reduction": reduction, "importance_sampling_level": level} | REDUCTIONS[reduction] | options
    x = batch(packed=packed, device=device)
    assert_close_to_reference(partial(linear_policy_loss, **options), x, LEARNED[:3])
    assert_close_to_reference(partial(linear_policy_loss, **options), x, LEARNED[:1])  # a frozen head


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_policy_loss_is_the_spec_in_every_dtype(dtype, reduction, level, packed, device):
    options = {"reduction": reduction, "importance_sampling_level": level} | REDUCTIONS[reduction]
    x = batch(packed=packed, dtype=dtype, device=device)
    assert_close_to_reference(partial(linear_policy_loss, chunk_bytes=chunks_of(16), **options), x, LEARNED[:3])


@pytest.mark.parametrize("how", [{}, {"chunk_bytes": chunks_of(3)}, {"skip_rows": False}])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("packed", "shape"), [(False, (4,)), (False, (4, 1)), (True, (4, 1))], ids=["(B,)", "(B, 1)", "packed (B, 1)"]
)
def test_advantages_may_be_one_for_each_sequence(packed, shape, level, how, device):
    x = batch(packed=packed, device=device)
    x["advantages"] = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64, device=device).view(shape)
    call = partial(linear_policy_loss, importance_sampling_level=level, **how)
    assert_close_to_reference(call, x, LEARNED[:3])


# Sequences of no token at the start, between others, twice in a row, and at the end; one of one token.
@pytest.mark.parametrize("tokens", [1, 3, 5, 64])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_sequences_may_be_empty_or_wholly_masked(reduction, level, skip, tokens, device):
    options = {"reduction": reduction, "importance_sampling_level": level} | REDUCTIONS[reduction]
    x = plain(20, dtype=torch.float64, device=device)
    x["cu_seqlens"] = torch.tensor([0, 0, 4, 4, 4, 5, 9, 18, 20, 20], device=device)
    x["completion_mask"][5:9] = False
    x["advantages"] = torch.randn(20, dtype=torch.float64).to(device)
    x["old_logps"] = linear_logps(reference, x).logps + 0.2 * torch.randn(20, dtype=torch.float64).to(device)
    call = partial(linear_policy_loss, chunk_bytes=chunks_of(tokens), skip_rows=skip, **options)
    assert_close_to_reference(call, x, LEARNED[:3])


@pytest.mark.parametrize("how", [{}, {"chunk_bytes": chunks_of(3)}, {"skip_rows": False}, {"batch_invariant": True}])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_logps_the_step_is_exactly_on_policy(level, reduction, how, device):
    x = batch(old=False, device=device)
    options = {"importance_sampling_level": level, "reduction": reduction} | REDUCTIONS[reduction]
    assert_close_to_reference(partial(linear_policy_loss, **options, **how), x, LEARNED[:3])
    stats = linear_policy_loss(rpp, x, **options, **how).stats
    assert stats.ratio == stats.num_tokens == x["completion_mask"].sum()
    assert stats.approx_kl == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_stats_are_bitwise_those_of_two_calls_where_products_have_one_shape(
    dtype, reduction, level, packed, device
):
    options = {"reduction": reduction, "importance_sampling_level": level} | REDUCTIONS[reduction]
    x = batch(packed=packed, dtype=dtype, device=device)
    one, two = (
        f(rpp, x, batch_invariant=True, chunk_bytes=chunks_of(16), dual_clip=1.1, **options)
        for f in (linear_policy_loss, two_calls)
    )
    assert_identical(one, two)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_stats_without_a_promise_of_bits_count_the_same_tokens(level, device):
    x = batch(dtype=torch.float32, device=device)
    options = {"importance_sampling_level": level, "chunk_bytes": chunks_of(16, torch.float32), "dual_clip": 1.1}
    one, two = (f(rpp, x, **options).stats for f in (linear_policy_loss, two_calls))
    assert_identical(one[:5], two[:5])
    assert_close(one[5:], two[5:], rtol=1e-6, atol=1e-5)
    assert one.clipped_low + one.clipped_high + one.dual_clipped > 0 or level == "sequence"


def test_the_reduction_none_is_refused_and_names_the_way_out(device):
    with pytest.raises(ValueError, match=r"reduction: want a sum or a mean .*linear_logps, then policy_loss"):
        linear_policy_loss(rpp, batch(device=device), reduction="none")


# ---------------------------------------------------------------- skipping is lossless


@pytest.mark.parametrize("how", [{}, {"chunk_bytes": chunks_of(3)}, {"batch_invariant": True}])
@pytest.mark.parametrize("call", ["logps", "loss", "policy", "sequence policy"])
def test_skipping_changes_nothing(call, how, device):
    function = {
        "logps": linear_logps,
        "loss": lambda f, y, **o: linear_loss(f, y, surrogate(y), **o),
        "policy": linear_policy_loss,
        "sequence policy": partial(linear_policy_loss, importance_sampling_level="sequence"),
    }[call]
    x = batch(device=device)
    skipped, whole = (evaluate(partial(function, rpp, skip_rows=s, **how), x, LEARNED[:3]) for s in (True, False))
    assert_close_in_double(skipped, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logps_are_bitwise_the_same_under_any_mask_where_products_have_one_shape(dtype, device):
    x = plain(37, 300, 64, dtype=dtype, device=device)
    whole = linear_logps(rpp, x | {"completion_mask": None}, batch_invariant=True)
    for skip in (True, False):
        masked = linear_logps(rpp, x, batch_invariant=True, skip_rows=skip)
        for y, z in zip(masked[:3], whole[:3], strict=True):
            assert_identical(y, torch.where(x["completion_mask"], z, 0.0))


@pytest.mark.parametrize("fill", [math.nan, math.inf])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("call", ["logps", "loss", "policy", "sequence policy"])
def test_what_lies_under_the_mask_reaches_nothing(call, packed, skip, fill, device):
    function = {
        "logps": linear_logps,
        "loss": lambda f, y, **o: linear_loss(f, y, surrogate(y), **o),
        "policy": linear_policy_loss,
        "sequence policy": partial(linear_policy_loss, importance_sampling_level="sequence"),
    }[call]
    x = batch(packed=packed, device=device)
    x["temperature"] = torch.rand_like(x["old_logps"]) + 0.5
    x |= {"lora_A": torch.randn(R, H).double(), "lora_B": torch.randn(V, R).double()}
    mask = x["completion_mask"]
    poisoned = x | {k: torch.where(mask, x[k], fill) for k in ("old_logps", "advantages", "temperature")}
    poisoned["hidden_states"] = torch.where(mask[..., None], x["hidden_states"], fill)
    poisoned["target_ids"] = torch.where(mask, x["target_ids"], -100)
    for how in ({}, {"chunk_bytes": chunks_of(3)}):
        got, want = (evaluate(partial(function, rpp, skip_rows=skip, **how), y, LEARNED) for y in (poisoned, x))
        assert_identical(got, want)
        assert (got["dhidden_states"][~mask] == 0).all()
        assert (got["logps"][~mask] == 0).all()


def test_masked_tokens_are_never_projected(tokens_multiplied, device):
    x = batch(device=device)
    evaluate(lambda y: linear_logps(rpp, y).logps, x, LEARNED[:3])
    valid = int(x["completion_mask"].sum())
    # Forward; again for the gradient, which every valid token has.
    assert tokens_multiplied == {"logits": 2 * valid, "weight": valid, "hidden_states": valid}


@pytest.mark.parametrize("how", [{}, {"chunk_bytes": chunks_of(3)}])
def test_tokens_without_advantage_are_not_multiplied_backward(how, tokens_multiplied, device):
    x = batch(old=False, device=device)
    mask = x["completion_mask"]
    got = evaluate(partial(linear_policy_loss, rpp, **how), x, LEARNED[:3])
    active = mask & (x["advantages"] != 0)
    assert 0 < active.sum() < mask.sum()
    n = int(active.sum())
    assert tokens_multiplied == {"logits": int(mask.sum()), "weight": n, "hidden_states": n}
    assert (got["dhidden_states"][~active] == 0).all()
    assert (got["dhidden_states"][active] != 0).any(-1).all()


def test_clipped_tokens_are_not_multiplied_backward(tokens_multiplied, device):
    x = batch(device=device)
    got = evaluate(partial(linear_policy_loss, rpp), x, LEARNED[:3])
    mask = x["completion_mask"]
    stats = linear_policy_loss(rpp, x).stats
    clipped = int(stats.clipped_low + stats.clipped_high)
    assert clipped > 0
    assert tokens_multiplied["weight"] == int((mask & (x["advantages"] != 0)).sum()) - clipped
    assert (got["dhidden_states"] != 0).any(-1).sum() == tokens_multiplied["weight"]


def test_tokens_without_an_upstream_gradient_are_not_projected_again(tokens_multiplied, device):
    x = batch(device=device)
    first = torch.zeros_like(x["old_logps"])
    first[0] = 1
    x["hidden_states"].requires_grad_()
    x["weight"].requires_grad_()
    (linear_logps(rpp, x).logps * first).sum().backward()
    valid, active = int(x["completion_mask"].sum()), int(x["completion_mask"][0].sum())
    assert tokens_multiplied == {"logits": valid + active, "weight": active, "hidden_states": active}
    assert (x["hidden_states"].grad[1:] == 0).all()


def test_nothing_is_skipped_where_skipping_is_off(tokens_multiplied, device):
    x = batch(device=device)
    tokens = x["target_ids"].numel()
    evaluate(partial(linear_policy_loss, rpp, skip_rows=False), x, LEARNED[:3])
    assert tokens_multiplied == {"logits": tokens, "weight": tokens, "hidden_states": tokens}


# ---------------------------------------------------------------- how much work: m + 2 a, m + 3 a, m + 3 a - f a, 2 m


def test_linear_loss_makes_no_logits_again(tokens_multiplied, device):
    x = batch(device=device)
    evaluate(lambda y: linear_loss(rpp, y, surrogate(y), chunk_bytes=chunks_of(3)), x, LEARNED[:3])
    n = int(x["completion_mask"].sum())
    assert tokens_multiplied == {"logits": n, "weight": n, "hidden_states": n}


def test_a_ratio_of_sequences_that_fit_into_chunks_makes_no_logits_again(tokens_multiplied, device, backend):
    x = batch(device=device)
    call = partial(linear_policy_loss, rpp, importance_sampling_level="sequence", epsilon_low=1.0, epsilon_high=9.0)
    evaluate(partial(call, chunk_bytes=chunks_of(13, backend=backend)), x, LEARNED[:3])
    n = int(x["completion_mask"].sum())
    assert tokens_multiplied["logits"] == n
    tokens_multiplied.clear()
    evaluate(partial(call, chunk_bytes=chunks_of(3, backend=backend)), x, LEARNED[:3])  # none fits
    # A token without advantage moves the ratio of those that have one.
    assert tokens_multiplied == {"logits": 2 * n, "weight": n, "hidden_states": n}


@pytest.mark.parametrize(("tokens", "times"), [(26, 1), (3, 2)])
def test_a_loss_of_groups_that_fit_into_chunks_makes_no_logits_again(tokens, times, tokens_multiplied, device, backend):
    x = batch(device=device)
    pair_loss = lambda logps, entropy, rows, cu, _: rpp.dpo_loss(logps, None, cu_seqlens=cu, num_pairs=2).loss  # noqa: E731
    chunk_bytes = chunks_of(tokens, backend=backend)
    evaluate(lambda y: linear_loss(rpp, y, pair_loss, group_size=2, chunk_bytes=chunk_bytes), x, LEARNED[:3])
    n = int(x["completion_mask"].sum())
    assert tokens_multiplied == {"logits": times * n, "weight": n, "hidden_states": n}


@pytest.mark.parametrize(("most", "times"), [(26, 1), (13, 2)])
def test_chunks_grow_to_the_longest_group_that_memory_has_room_for(
    most, times, tokens_multiplied, device, backend, monkeypatch
):
    if backend != "native":
        pytest.skip("chunks of a GPU are as large as memory allows")
    for name, value in {"_CPU_TOKENS": 3, "_CPU_LEAST_BYTES": 0, "_CPU_MOST_BYTES": chunks_of(most)}.items():
        monkeypatch.setattr(chunks, name, value)
    x = batch(device=device)
    x["completion_mask"] = torch.arange(4, device=device)[:, None].expand(4, 13) < 2  # a pair of 26 tokens
    pair_loss = lambda logps, *_: logps.sum().square()  # noqa: E731
    evaluate(lambda y: linear_loss(rpp, y, pair_loss, group_size=2), x, LEARNED[:3])
    assert tokens_multiplied == {"logits": times * 26, "weight": 26, "hidden_states": 26}


# Of 9 valid tokens among 12 in chunks of 3: memory for less than a chunk keeps none of them, for a chunk and a bit one.
@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (2, 0), (3, 3), (5, 3), (6, 6), (9, 9), (100, 9)])
def test_logits_that_are_kept_are_not_made_again_and_change_nothing(keep, kept, tokens_multiplied, device, backend):
    x = plain(12, dtype=torch.float64, device=device)
    chunk_bytes = chunks_of(3, backend=backend)
    want = evaluate(partial(linear_logps, rpp, chunk_bytes=chunk_bytes), x, LEARNED[:3])
    tokens_multiplied.clear()
    call = partial(linear_logps, rpp, chunk_bytes=chunk_bytes, keep_bytes=chunks_of(keep))
    assert_identical(evaluate(call, x, LEARNED[:3]), want)
    assert tokens_multiplied == {"logits": 18 - kept, "weight": 9, "hidden_states": 9}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [1, 4, 7, 100])
@pytest.mark.parametrize("more", [{}, {"batch_invariant": True}, {"skip_rows": False}])
def test_results_with_logits_kept_are_the_spec(more, keep, dtype, device):
    x = head(dtype=dtype, device=device)
    memory = {"chunk_bytes": chunks_of(3, torch.float32), "keep_bytes": chunks_of(keep, torch.float32)}
    assert_close_to_reference(partial(linear_logps, **EVERYTHING, **memory, **more), x, LEARNED)


# 11 tokens, 8 of them valid: the last chunk of 3 is filled up, and one of 64 is nothing but filled up.
@pytest.mark.parametrize("tokens", [3, 64])
def test_logits_of_a_batch_invariant_call_can_be_kept_whole(tokens, tokens_multiplied, device):
    x = plain(dtype=torch.float64, device=device)
    options = {"batch_invariant": True, "chunk_bytes": chunks_of(tokens)}
    with torch.no_grad():
        linear_logps(rpp, x, **options)
    forward = tokens_multiplied["logits"]
    tokens_multiplied.clear()
    evaluate(partial(linear_logps, rpp, keep_bytes=1 << 20, **options), x, LEARNED[:3])
    assert tokens_multiplied["logits"] == forward


def test_kept_logits_outlive_a_backward(device):
    x = {k: y.requires_grad_(k in LEARNED) for k, y in plain(device=device).items()}
    for keep in (5, 100):
        memory = {"chunk_bytes": chunks_of(3, torch.float32), "keep_bytes": chunks_of(keep, torch.float32)}
        out = linear_logps(rpp, x, **memory)
        loss, inputs = out.logps.sum() + out.entropy.sum(), [x[k] for k in learned(x)]
        first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
        assert_identical(first, second)


def test_a_frozen_head_costs_two_products_and_a_pointwise_backward(tokens_multiplied, device):
    x = plain(dtype=torch.float64, device=device)
    x["hidden_states"].requires_grad_()
    n = int(x["completion_mask"].sum())
    out = linear_logps(rpp, x)
    assert tokens_multiplied == {"logits": n, "hidden_states": n}
    tokens_multiplied.clear()
    out.logps.sum().backward()
    assert not tokens_multiplied


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_policy_loss_through_a_frozen_head_costs_no_more_than_two_products(level, tokens_multiplied, device):
    x = batch(device=device)
    evaluate(partial(linear_policy_loss, rpp, importance_sampling_level=level), x, ["hidden_states"])
    n = int(x["completion_mask"].sum())
    assert tokens_multiplied["logits"] == n
    assert tokens_multiplied["hidden_states"] <= n
    assert tokens_multiplied["weight"] == 0


@pytest.mark.parametrize("field", ["entropy", "lse"])
def test_entropy_through_a_frozen_head_makes_the_logits_again(field, tokens_multiplied, device):
    x = plain(dtype=torch.float64, device=device)
    n = int(x["completion_mask"].sum())
    evaluate(lambda y: getattr(linear_logps(rpp, y), field), x, ["hidden_states"])
    assert tokens_multiplied == {"logits": 2 * n, "hidden_states": 2 * n}


# ---------------------------------------------------------------- half operands


@pytest.mark.parametrize("vocab", [1000, 32000, 151936])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_log_probs_of_half_operands_are_a_hundred_times_closer_than_those_of_half_logits(vocab, scale, device):
    x = plain(64, vocab, 256, scale=scale, dtype=torch.bfloat16, device=device) | {"completion_mask": None}
    exact = linear_logps(reference, {k: y.double() if k in LEARNED else y for k, y in x.items()}).logps
    rounded = rpp.logps_from_logits(x["hidden_states"] @ x["weight"].T + x["bias"], x["target_ids"]).logps
    ours, theirs = ((y.double() - exact).abs().max() for y in (linear_logps(rpp, x).logps, rounded))
    assert 100 * ours < theirs, f"{ours:.1e} against {theirs:.1e}"


def test_a_bias_and_a_lora_may_be_float32_beside_half_operands(device):
    x = head(dtype=torch.bfloat16, device=device)
    x |= {k: x[k].float() + 1e-3 for k in ("bias", "lora_A", "lora_B")}
    assert_close_to_reference(linear_logps, x, LEARNED)


# ---------------------------------------------------------------- the same bits


# The hidden size of Qwen 2.5 0.5B. One token, which libraries give a product of its own; two; some; more than a chunk.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_any_batch_and_place(dtype, device):
    x = plain(300, 300, 896, dtype=dtype, device=device)
    whole = linear_logps(rpp, x | {"completion_mask": None}, batch_invariant=True)
    per_token = ("hidden_states", "target_ids", "completion_mask")
    for places in (slice(0, 1), slice(299, 300), slice(120, 122), slice(250, 287), torch.arange(299, -1, -1)):
        some = {k: y[places] if k in per_token else y for k, y in x.items()} | {"completion_mask": None}
        assert_identical(
            linear_logps(rpp, some, batch_invariant=True), TokenLogps(*(y[places] for y in named(whole).values()))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_ratio_of_a_policy_to_itself_is_exactly_1_however_batches_were_cut(level, dtype, device):
    x = make_batch(6, 50, vocab=300, hidden=896, dtype=dtype, device=device)
    how = {"batch_invariant": True, "chunk_bytes": 64 * 300 * 4, "softcap": 30.0, "logit_scale": 0.5}
    with torch.no_grad():
        parts = [
            linear_logps(rpp, {k: y if k in ("weight", "bias") else y[a:b] for k, y in x.items()}, **how).logps
            for a, b in ((0, 1), (1, 3), (3, 6))
        ]
    x["old_logps"] = torch.cat(parts)
    for skip in (True, False):
        stats = linear_policy_loss(rpp, x, importance_sampling_level=level, skip_rows=skip, **how).stats
        assert stats.ratio == stats.num_tokens
        assert stats.approx_kl == 0


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_gives_the_same_bits_twice(dtype, how, device):
    x = head(64, 300, 64, dtype=dtype, device=device)
    first, second = (evaluate(partial(linear_logps, rpp, **EVERYTHING, **how), x, LEARNED) for _ in range(2))
    assert_identical(first, second)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_gives_the_same_bits_twice(loss, device):
    x = batch(dtype=torch.float32, device=device)
    assert_identical(*(evaluate(loss, x, LEARNED[:3]) for _ in range(2)))


@pytest.mark.parametrize("names", [LEARNED, LEARNED[:1]], ids=["all", "frozen head"])
def test_linear_logps_backward_twice_gives_the_same_twice(names, device):
    x = {k: y.requires_grad_(k in names) for k, y in head(device=device).items()}
    out = linear_logps(rpp, x, **EVERYTHING)
    loss, inputs = out.logps.sum() + out.entropy.sum(), [x[k] for k in names]
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert_identical(first, second)


# ---------------------------------------------------------------- within PyTorch

CALLS = {
    "linear_logps": lambda x: sum(y.sum() for y in named(linear_logps(rpp, x)).values()),
    "linear_loss": lambda x: linear_loss(rpp, x, surrogate(x)).loss,
    "linear_policy_loss": lambda x: linear_policy_loss(rpp, x).loss,
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_activation_checkpointing_changes_nothing(call, reentrant, device):
    x = batch(device=device)

    def gradients(through):
        leaves = {k: x[k].clone().requires_grad_() for k in LEARNED[:3]}
        loss = through(lambda h, w, b: call(x | {"hidden_states": 2 * h, "weight": w, "bias": b}), *leaves.values())
        (0.5 * loss).backward()
        return [loss.detach(), *(y.grad for y in leaves.values())]

    checkpointed = gradients(partial(checkpoint, use_reentrant=reentrant))
    assert_identical(checkpointed, gradients(lambda block, *operands: block(*operands)))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_under_autocast_operands_are_cast_and_gradients_are_not(name, call):
    x = batch(dtype=torch.float32)

    def autocast(y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(y)

    def cast(y):
        return call(y | {k: y[k].bfloat16() for k in LEARNED[:3]})

    with backends.use_backend(name):
        got, want = (evaluate(f, x, LEARNED[:3]) for f in (autocast, cast))
    assert got["dweight"].dtype == got["dhidden_states"].dtype == torch.float32
    assert_identical(got, want)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tied_embeddings_get_the_sum_of_both_gradients(call, device):
    x = batch(device=device)

    def tied(y):
        hidden = torch.nn.functional.embedding(x["target_ids"].roll(1, -1), y["weight"]).tanh()
        return call(y | {"hidden_states": hidden})

    with backends.use_backend("reference"):
        want = evaluate(tied, x, ["weight", "bias"])
    assert_close_in_double(evaluate(tied, x, ["weight", "bias"]), want)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("names", [LEARNED[:3], LEARNED[:1], ()], ids=["all", "frozen head", "no gradient"])
def test_linear_policy_loss_compiles_without_a_graph_break(names, level, device):
    torch.compiler.reset()
    x = batch(device=device)
    call = partial(linear_policy_loss, rpp, importance_sampling_level=level)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close_in_double(evaluate(compiled, x, names), evaluate(call, x, names))


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("names", [LEARNED, LEARNED[:1]], ids=["all", "frozen head"])
def test_linear_logps_compiles_without_a_graph_break(names, how, device):
    torch.compiler.reset()
    x = head(dtype=torch.float64, device=device)
    call = partial(linear_logps, rpp, **EVERYTHING, **how)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close_in_double(evaluate(compiled, x, names), evaluate(call, x, names))


@pytest.mark.parametrize("call", [CALLS["linear_logps"], CALLS["linear_policy_loss"]], ids=["logps", "policy"])
def test_one_compiled_graph_serves_batches_of_every_size(call, device):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    x = batch(device=device)
    for B in (2, 3, 4):
        y = {k: v if k in ("weight", "bias") else v[:B] for k, v in x.items()}
        assert_close_in_double(evaluate(compiled, y, LEARNED[:3]), evaluate(call, y, LEARNED[:3]))


def test_a_compiled_loss_is_scaled_by_what_comes_after_it(device):
    torch.compiler.reset()
    x = batch(device=device)
    call = lambda y: 0.5 * linear_policy_loss(rpp, y).loss  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close_in_double(evaluate(compiled, x, LEARNED[:3]), evaluate(call, x, LEARNED[:3]))


def test_linear_loss_works_in_a_compiled_function(device):
    torch.compiler.reset()
    x = batch(device=device)
    call = lambda y: 0.5 * linear_loss(rpp, y | {"hidden_states": 2 * y["hidden_states"]}, surrogate(y)).loss  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager")
    assert_close_in_double(evaluate(compiled, x, LEARNED[:3]), evaluate(call, x, LEARNED[:3]))


# ---------------------------------------------------------------- logits and gradients in chunks of their own


# As on an accelerator: a chunk of gradients is several of logits, not always a whole number of them; or just one.
@pytest.mark.parametrize("sizes", [(3, 8), (1, 4), (4, 5), (16, 64)])
@pytest.mark.parametrize("call", ["logps", "kept", "frozen", "loss", "policy", "sequence policy"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_may_wait_for_several_chunks_of_logits(dtype, skip, call, sizes, device, monkeypatch):
    monkeypatch.setattr(chunks, "chunk_tokens", lambda *_: sizes)
    function = {
        "logps": linear_logps,
        "frozen": linear_logps,
        "kept": partial(linear_logps, keep_bytes=chunks_of(5)),
        "loss": lambda f, y, **o: linear_loss(f, y, surrogate(y), **o),
        "policy": linear_policy_loss,
        "sequence policy": partial(linear_policy_loss, importance_sampling_level="sequence"),
    }[call]
    x = batch(dtype=dtype, device=device)
    assert_close_to_reference(partial(function, skip_rows=skip), x, LEARNED[:1] if call == "frozen" else LEARNED[:3])


# ---------------------------------------------------------------- refusals

HIDDEN, WEIGHT, IDS = torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 3])
LORA = {"lora_A": torch.zeros(1, 2), "lora_B": torch.zeros(4, 1)}
REFUSALS = [
    ({"lora_A": LORA["lora_A"]}, "lora_B: want a tensor"),
    ({"lora_B": LORA["lora_B"]}, "lora_A: want a tensor"),
    (LORA | {"lora_A": torch.zeros(1, 3)}, r"lora_A: want \(rank, 2\)"),
    (LORA | {"lora_A": torch.zeros(2)}, r"lora_A: want \(rank, 2\)"),
    (LORA | {"lora_B": torch.zeros(4, 2)}, r"lora_B: want \(4, 1\)"),
    (LORA | {"lora_B": torch.zeros(3, 1)}, r"lora_B: want \(4, 1\)"),
    (LORA | {"lora_B": torch.zeros(4, 1).double()}, "lora_B: want the dtype of hidden_states, torch.float32"),
    ({"bias": torch.zeros(4).double()}, "bias: want the dtype of hidden_states, torch.float32"),
    ({"hidden_states": None}, "hidden_states: want a float32"),
    ({"hidden_states": [[0.0, 1.0]]}, "hidden_states: want a float32"),
    ({"weight": None}, "weight: want a float32"),
    ({"hidden_states": torch.zeros(3, 0), "weight": torch.zeros(4, 1)}, "hidden_states: want at least one feature"),
    ({"process_group": "tp", "vocab_start": 0}, "process_group: want a torch.distributed.ProcessGroup"),
    ({"temperature": torch.tensor([1.0, math.inf, 1.0])}, "temperature: want positive finite numbers"),
    ({"softcap": 1e31}, "softcap: want a number from 1e-30"),
    (LORA | {"lora_A": torch.zeros(1, 2).int()}, "lora_A: want a float32"),
    (LORA | {"lora_scaling": math.nan}, "lora_scaling: want a finite number"),
    (LORA | {"lora_scaling": math.inf}, "lora_scaling: want a finite number"),
    ({"lora_scaling": 2.0}, "lora_scaling: want 1 without lora_A and lora_B"),
    ({"bias": torch.zeros(3)}, r"bias: want the shape \(4,\)"),
    ({"bias": torch.zeros(4, 1)}, "bias: want .* of 1 dimension"),
    ({"bias": torch.empty(0)}, "bias: want the whole parameter"),
    ({"softcap": 0}, "softcap: want a number from 1e-30"),
    ({"softcap": -1.0}, "softcap: want a number from 1e-30"),
    ({"softcap": math.nan}, "softcap: want a number from 1e-30"),
    ({"softcap": math.inf}, "softcap: want a number from 1e-30"),
    ({"logit_scale": math.inf}, "logit_scale: want a finite number"),
    ({"logit_scale": math.nan}, "logit_scale: want a finite number"),
    ({"logit_scale": None}, "logit_scale: want a finite number"),
    ({"chunk_bytes": 0}, "chunk_bytes: want a positive integer"),
    ({"chunk_bytes": -1}, "chunk_bytes: want a positive integer"),
    ({"chunk_bytes": True}, "chunk_bytes: want a positive integer"),
    ({"chunk_bytes": 1e9}, "chunk_bytes: want a positive integer"),
    ({"skip_rows": 1}, "skip_rows: want True or False"),
    ({"batch_invariant": None}, "batch_invariant: want True or False"),
    ({"vocab_start": 0}, "vocab_start: want None without a process_group"),
    ({"weight": torch.empty(0)}, "weight: want the whole parameter: .*FSDP.*ZeRO-3"),
    ({"weight": torch.empty(0, 2)}, "weight: want the whole parameter: .*FSDP.*ZeRO-3"),
    ({"weight": WEIGHT.flatten()}, r"weight: want \(V, 2\)"),  # as FSDP 1 leaves it
    ({"weight": WEIGHT.T}, r"weight: want \(V, 2\)"),
    ({"weight": WEIGHT.double()}, "weight: want the dtype of hidden_states, torch.float32"),
    ({"weight": WEIGHT.bfloat16()}, "weight: want the dtype of hidden_states, torch.float32"),
    ({"weight": WEIGHT.to("meta")}, "weight: want a tensor on cpu"),
    ({"weight": None}, "weight: want a float32"),
    ({"hidden_states": HIDDEN[0]}, "hidden_states: want .* of 2 or 3 dimension"),
    ({"hidden_states": None}, "hidden_states: want a float32"),
    ({"target_ids": torch.tensor([0, 1, 4])}, r"target_ids: want ids in \[0, 4\).* got ids from 0 to 4"),
    ({"target_ids": torch.tensor([0, -1, 3])}, r"target_ids: want ids in \[0, 4\).* got ids from -1 to 3"),
    ({"target_ids": IDS.int()}, "target_ids: want an int64"),
    ({"target_ids": IDS[:2]}, r"target_ids: want the shape \(3,\)"),
    ({"target_ids": [0, 1, 3]}, "target_ids: want an int64"),
    ({"completion_mask": torch.ones(3)}, "completion_mask: want a bool tensor"),
    ({"temperature": 0.0}, "temperature: want a positive number"),
    ({"temperature": torch.ones(2)}, r"temperature: want the shape \(3,\)"),
]
THREE = {
    "linear_logps": rpp.linear_logps,
    "linear_loss": partial(rpp.linear_loss, token_loss=lambda logps, entropy, rows: logps),
    "linear_policy_loss": partial(
        rpp.linear_policy_loss,
        old_logps=torch.zeros(3),
        advantages=torch.zeros(3),
        cu_seqlens=torch.tensor([0, 3]),
    ),
}


@pytest.mark.parametrize("function", THREE.values(), ids=THREE)
@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_each_of_the_three_refuses(changes, words, function):
    with pytest.raises(ValueError, match=words):
        function(**{"hidden_states": HIDDEN, "weight": WEIGHT, "target_ids": IDS, **changes})


@pytest.mark.parametrize("keep_bytes", [-1, True, 1e9, None])
def test_linear_logps_refuses_keep_bytes(keep_bytes):
    with pytest.raises(ValueError, match="keep_bytes: want an integer from 0"):
        rpp.linear_logps(HIDDEN, WEIGHT, IDS, keep_bytes=keep_bytes)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize("function", THREE.values(), ids=THREE)
@pytest.mark.parametrize("name", ["weight", "hidden_states"])
def test_a_dtensor_is_refused_and_told_where_it_is_whole(name, function, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    plain_ones = {"hidden_states": HIDDEN, "weight": WEIGHT, "target_ids": IDS}
    sharded = distribute_tensor(plain_ones[name], init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match=rf"{name}: want a plain tensor: .*fully_shard.*full_tensor.* got a DTensor"):
        function(**plain_ones | {name: sharded})


@pytest.mark.parametrize("vocab_start", [None, -1, True, 0.0])
def test_a_shard_must_say_where_it_starts(vocab_start, one_process):
    with pytest.raises(ValueError, match="vocab_start: want the id of this shard's first row"):
        rpp.linear_logps(HIDDEN, WEIGHT, IDS, process_group=one_process, vocab_start=vocab_start)
