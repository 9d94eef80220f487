"""Which backend runs an op and with which instructions; the custom ops themselves; and torch.compile."""

import contextlib
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from calls import LENGTHS, MASK, ONE_OF_EACH, REDUCTIONS
from strategies import random_batch
from torch._dynamo.testing import CompileCounterWithBackend

import rpp_kernels as rpp
from rpp_kernels import backends
from rpp_kernels.backends import native, preference, triton
from rpp_kernels.backends.preference import TABLE, Preference
from rpp_kernels.testing import evaluate, make_batch

ROOT = Path(__file__).parents[2]

assert_close = torch.testing.assert_close
needs_native = pytest.mark.skipif(native.PROBLEM is not None, reason=str(native.PROBLEM))


def python(code, **environment):
    """Runs code in a process of its own, whose environment differs by these variables."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


def ops_that_run(function):
    """The names of our ops that `function` calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith("rpp_kernels")}


# ---------------------------------------------------------------- the choice


@needs_native
def test_the_best_backend_that_works_is_chosen():
    logits, ids = torch.zeros(2, 3), torch.zeros(2).long()
    assert backends.backend_of(logits) == "native"
    assert "rpp_kernels_C::logps_fwd" in ops_that_run(lambda: rpp.logps_from_logits(logits, ids))


def test_a_forced_reference_calls_none_of_our_ops():
    x = make_batch(2, 3, vocab=4)
    with rpp.use_backend("reference"):
        ran = ops_that_run(lambda: rpp.logps_from_logits(x["logits"], x["target_ids"], x["completion_mask"]))
    assert ran == set()


def test_the_choice_ends_with_its_block_and_blocks_nest_even_when_they_raise():
    x = torch.zeros(1)
    chosen = backends.backend_of(x)
    with rpp.use_backend("reference"):
        with rpp.use_backend(chosen):
            assert backends.backend_of(x) == chosen
        with contextlib.suppress(KeyError), rpp.use_backend(chosen):
            raise KeyError
        assert backends.backend_of(x) == "reference"
    assert backends.backend_of(x) == chosen


@needs_native
def test_backward_stays_with_the_backend_of_its_forward():
    x = make_batch(2, 3)
    logps = x["logps"].requires_grad_()
    kl = rpp.kl_penalty(logps, x["ref_logps"])
    with rpp.use_backend("reference"):
        ran = ops_that_run(kl.sum().backward)
    assert "rpp_kernels_C::kl_bwd" in ran


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"use_backend: unknown backend 'cudnn', want one of .*native.*reference"):
        rpp.use_backend("cudnn").__enter__()
    with pytest.raises(ValueError, match="unknown backend"), rpp.use_backend(""):
        pass


def test_a_forced_backend_that_cannot_run_raises_and_says_why(monkeypatch):
    monkeypatch.setattr(native, "PROBLEM", "the extension is not built")
    with rpp.use_backend("native"), pytest.raises(RuntimeError, match=r"'native' was asked for .* is not built"):
        rpp.returns(torch.zeros(1, 2))
    assert rpp.returns(torch.ones(1, 2)).tolist() == [[2, 1]]  # not forced: the reference steps in


def test_a_forced_backend_without_kernels_for_the_device_raises():
    x = torch.zeros(1, 2, device="meta")
    with rpp.use_backend("native"), pytest.raises(RuntimeError, match="no kernels for meta tensors"):
        rpp.returns(x)


def test_devices_without_kernels_have_the_reference():
    x = torch.zeros(2, 3, device="meta")
    assert backends.backend_of(x) == "reference"
    assert rpp.kl_penalty(x, x).shape == (2, 3)


def test_each_preference_names_backends_and_what_it_rests_on():
    for (op, where), line in TABLE.items():
        assert op is None or op == "linear" or hasattr(rpp, op), op
        assert where in ("cpu", "cuda", "xpu") or re.fullmatch(r"sm_\d+|gfx\w+", where), where
        assert set(line.order) <= {"native", "triton"}
        assert line.source


def test_the_most_particular_preference_counts(monkeypatch):
    lines = {(None, "cuda"): "any", (None, "sm_90"): "hopper", ("kl_penalty", "sm_90"): "kl", ("gae", "cuda"): "gae"}
    for key, source in lines.items():
        monkeypatch.setitem(TABLE, key, Preference(("native",), source))
    monkeypatch.setattr(preference, "architecture", lambda device: "sm_90")
    found = {op: preference.preferred(op, torch.device("cuda")).source for op in ("kl_penalty", "gae", "whiten", None)}
    assert found == {"kl_penalty": "kl", "gae": "hopper", "whiten": "hopper", None: "hopper"}
    monkeypatch.setattr(preference, "architecture", lambda device: "sm_80")
    assert preference.preferred("gae", torch.device("cuda")).source == "gae"
    assert preference.preferred("kl_penalty", torch.device("cuda")).source == "any"
    assert preference.preferred("gae", torch.device("meta")) is None


def test_what_is_preferred_and_does_not_work_is_passed_over(monkeypatch):
    monkeypatch.setitem(TABLE, ("returns", "cpu"), Preference(("triton", "native"), "a test"))
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(native, "PROBLEM", None)
    assert backends.backend_of(torch.zeros(1), "returns") == "native"


@needs_native
def test_an_extension_without_cuda_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(native, "ARCHITECTURES", "")
    assert "RPP_KERNELS_BUILD=cuda" in native.why_not("cuda")
    monkeypatch.setattr(native, "ARCHITECTURES", "sm_90a")
    monkeypatch.setattr(torch.version, "hip", None)
    assert native.why_not("cuda") is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "triton" in native.why_not("cuda")


CHOSEN = "import torch, rpp_kernels; print(rpp_kernels.backends.backend_of(torch.zeros(1)))"


def test_the_environment_variable_forces_a_backend_for_the_process():
    assert python(CHOSEN, RPP_KERNELS_BACKEND="reference").stdout.strip() == "reference"


def test_an_unknown_backend_in_the_environment_is_refused_at_import():
    failed = python(CHOSEN, RPP_KERNELS_BACKEND="cudnn")
    assert failed.returncode != 0
    assert "ValueError: RPP_KERNELS_BACKEND: unknown backend 'cudnn', want one of" in failed.stderr


# ---------------------------------------------------------------- instruction sets


def cpu_has(isa):
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    needed = {"plain": [], "avx2": ["avx2", "fma", "f16c"]}
    needed["avx512"] = [*needed["avx2"], "avx512f", "avx512bw", "avx512dq", "avx512vl"]
    return set(needed[isa]) <= set(flags)


# Rows of every width and long ones, chunks, long sums, and tokens with holes among them, in every dtype.
PARITY = """
import sys, pytest, torch, rpp_kernels
print(torch.ops.rpp_kernels_C.cpu_capability(), flush=True)
files = [f"tests/ops/test_{name}.py" for name in ("logps", "chunks", "every_op", "exponential", "advantages")]
of_ops = "packed and gradient_are_those_of_the_spec or long_sequences or far_from_0 or mask_of_ones"
wanted = f"native and (width_of_row or left_out_have_no_column or two_ulp_at_the_edges or {of_ops})"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", "-k", wanted, *files]))
"""


@needs_native
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set_is_the_spec(isa):
    if not cpu_has(isa):
        pytest.skip(f"this processor has no {isa}")
    if isa == native.cpu_capability():
        pytest.skip(f"every other test runs with {isa}")
    done = python(PARITY, RPP_KERNELS_CPU_ISA=isa)
    assert done.stdout.startswith(isa), done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@needs_native
def test_an_unknown_instruction_set_raises():
    use = "import torch, rpp_kernels; rpp_kernels.kl_penalty(torch.ones(1, 2), torch.ones(1, 2))"
    failed = python(use, RPP_KERNELS_CPU_ISA="sse9")
    assert failed.returncode != 0
    assert "RPP_KERNELS_CPU_ISA=sse9 is not one of avx512, avx2, plain" in failed.stderr


# ---------------------------------------------------------------- the custom ops


def packed(dtype=torch.float32):
    x = make_batch(4, 6, vocab=5, packed=True, dtype=dtype)
    x["cu_seqlens"] = x["cu_seqlens"].long()
    return x


def op_cases():
    """Arguments for each op in torch.ops.rpp_kernels, by its name."""
    x, h = packed(), make_batch(4, 6, vocab=5, hidden=3, packed=True)
    mask, cu = x["completion_mask"].clone(), x["cu_seqlens"]
    mask[2] = False
    T = mask.shape[0]
    rows = torch.rand(T)
    logits, ids = x["logits"], x["target_ids"]
    advantages, backend = x["advantages"], "native"
    # Of linear ops: the tensors, (temperature, lora_scaling, logit_scale, softcap), the plan, the group, the backend.
    head = h["hidden_states"], h["weight"]
    how = (0, 5 * 4 * 6, 1, 0), "", backend
    plain = (*head, None, None, None, ids, mask, None, (0.7, 1.0, 1.0, 0.0), *how)
    adapted = (
        *head,
        h["bias"],
        torch.randn(2, 3),
        torch.randn(5, 2),
        ids,
        None,
        rows + 0.5,
        (1.0, 0.5, 2.0, 5.0),
        *how,
    )
    nothing, frozen, every = (False,) * 4, (True, False, False, False), (True,) * 4
    with torch.no_grad():
        _, *forward, _ = torch.ops.rpp_kernels.logps_fwd(logits, ids, mask, 0.7, None, False, False, backend)
        linear = torch.ops.rpp_kernels.linear_logps_fwd(*plain, 8, False)[1:5]
        _, moments = torch.ops.rpp_kernels.whiten_fwd(advantages, mask, True, False, 1e-8, 0, "", backend)
    policy = x["logps"], x["old_logps"]
    lengths = torch.arange(12).double()
    group, others = (3, 0, 1, True, 1e-6, False), (0, 2, 3, True, 1e-6, True)
    ratio = 0.2, 0.2, math.inf, 0.0, 20.0, 0.0, math.inf, 0.0  # PolicyNumbers
    more = 0.4, 0.4, 0.0, 0.0, 20.0, 0.1, 1.0, 0.1
    modes = 0, 0, 3, 3, 0, 0, 0, 0  # PolicyModes
    sequence_modes, each_modes = (4, 1, 3, 2, 1, 0, 1, 0), (4, 1, 3, 2, 1, 1, 0, 1)
    extras = x["ref_logps"].exp(), x["ref_logps"]
    group_ids = torch.tensor([0, 1, 0, 2, 1, 1, 0, 3, 3, 0, 0, 0])
    scores = torch.randn(12)
    whitening = True, False, 1e-8, 0
    return {
        "logps_fwd": [
            (logits, ids, mask, 0.7, None, False, False, backend),
            (logits, ids, mask, 0.7, None, True, False, backend),
            (logits, ids, None, 1.0, rows + 0.5, False, False, backend),
        ],
        "logps_bwd": [
            (logits, ids, mask, 0.7, None, *forward, rows, None, None, backend),
            (logits, ids, mask, 0.7, rows + 0.5, *forward, rows, rows, rows, backend),
        ],
        "linear_logps_fwd": [(*plain, 0, False), (*adapted, 6, False), (*plain, 0, True)],
        "linear_logps_bwd": [
            (*plain, *linear, rows, None, rows, frozen),
            (*adapted, *linear, rows, rows, None, every),
        ],
        "linear_policy_loss_with_gradients": [
            (*plain, x["old_logps"], advantages, cu, None, None, None, 1.0, True, ratio, modes, every),
            (*adapted, None, advantages, cu, *extras, rows.sum().double(), 3.0, False, more, sequence_modes, nothing),
        ],
        "kl_fwd": [(*policy, mask, 3, 2, 20.0, 1.0, backend), (*policy, None, 1, 1, 20.0, math.inf, backend)],
        "kl_bwd": [(rows, *policy, mask, 3, 20.0, 1.0, backend)],
        "token_rewards_fwd": [(x["scores"], x["kl"], mask, cu, 0.1, backend)],
        "token_rewards_bwd": [(rows, mask, cu, 0.1, backend)],
        "returns_fwd": [(x["rewards"], m, cu, 0.9, gap, backend) for m, gap in ((mask, 0), (None, 1), (mask, 2))],
        "returns_bwd": [(rows, mask, cu, 0.9, 1, backend)],
        "gae_fwd": [(x["rewards"], x["values"], mask, cu, 0.9, 0.8, gap, backend) for gap in (0, 2)],
        "gae_bwd": [(rows, rows + 1, mask, cu, 0.9, 0.8, 2, backend)],
        "whiten_fwd": [
            (advantages, mask, *whitening, "", backend),
            (advantages, None, False, True, 1e-8, 2, "", backend),
        ],
        "whiten_bwd": [(rows, advantages, mask, moments, *whitening, backend)],
        "group_advantages_fwd": [
            (scores, None, None, *group, "", backend),
            (scores, group_ids, lengths, *others, "", backend),
        ],
        "group_advantages_bwd": [
            (torch.rand(12), scores, None, None, *group, backend),
            (torch.rand(12), scores, group_ids, lengths, *others, backend),
        ],
        "best_rows": [(scores, None, 3, ""), (scores, group_ids, 0, "")],
        "informative_rows": [(scores, None, 3, ""), (scores, group_ids, 0, "")],
        "rank_sums": [(lengths, "")],
        "reinforce_pp_fwd": [
            (x["scores"], x["old_logps"], ref, mask, cu, 0.1, 0.9, 3, math.inf, 1e-8, "", backend)
            for ref in (x["ref_logps"], None)
        ],
        "policy_loss_fwd": [
            (*policy, advantages, mask, cu, None, None, None, ratio, modes, backend),
            (*policy, x["scores"], mask, cu, *extras, x["kl"], more, each_modes, backend),
        ],
        "linear_logps_frozen_bwd": [(torch.randn(len(rows), 3), rows, torch.randn(len(rows), 3).bfloat16())],
        "slope_bwd": [(rows, rows + 1), (rows, torch.ones(()))],
        "policy_loss_bwd": [(rows, *policy, advantages, mask, cu, *extras, more, sequence_modes, backend)],
        "value_loss_fwd": [
            (x["values"], x["old_values"], x["returns"], mask, cu, 0.2, False, per_token, backend)
            for per_token in (False, True)
        ],
        "rollout_weights_fwd": [
            (x["old_logps"], x["ref_logps"], mask, cu, level, truncate, 0.5, 2.0, 20.0, backend)
            for level, truncate in ((0, False), (1, True), (2, False))
        ],
        "dpo_loss_fwd": [
            (*policy, mask, cu, 0, 0.1, 0.2, 0.3, False, False, backend),
            (x["logps"], None, None, cu, 1, 0.1, 0.0, 0.0, True, True, backend),
        ],
        "preference_loss_bwd": [
            (torch.rand(()), x["scores"], mask, cu, T, backend),
            (torch.rand(2), x["scores"], None, cu, T, backend),
        ],
        "copg_loss_fwd": [
            (*policy, x["scores"], mask, cu, 2, 0.1, False, backend),
            (*policy, x["scores"], None, cu, 4, 0.1, True, backend),
        ],
    }


def registered_ops():
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[1].split(".")[0] for name in names if name.startswith("rpp_kernels::")})


def differentiable(name, arguments):
    """The arguments with what a forward op is differentiated in requiring grad; constants are refused above the op."""
    constants = {
        "policy_loss_fwd": (1, 2, 5, 6),
        "value_loss_fwd": (1, 2),
        "rollout_weights_fwd": (0, 1),
        "dpo_loss_fwd": (1,),
        "copg_loss_fwd": (1, 2),
    }.get(name, ())
    temperature = {"logps_fwd": 4, "linear_logps_fwd": 7}.get(name)

    def prepare(i, x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not name.endswith("_fwd"):
            return x
        return x.detach().clone().requires_grad_(i not in constants and i != temperature)

    return tuple(prepare(i, x) for i, x in enumerate(arguments))


@needs_native
def test_every_op_has_a_case():
    assert registered_ops() == sorted(op_cases())


@needs_native
@pytest.mark.parametrize("name", registered_ops())
def test_opcheck(name):
    op = getattr(torch.ops.rpp_kernels, name).default
    for arguments in op_cases()[name]:
        arguments = differentiable(name, arguments)
        tests = ["test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(op, arguments, test_utils=tests)


@needs_native
@pytest.mark.parametrize("V", [4, 5])
def test_fake_kernels_know_the_strides_of_gradients_of_views(V):
    # What torch.compile plans with has to be what comes: opcheck with logits that are a slice.
    logits = torch.randn(2, 4, V)[:, :-1].requires_grad_()
    ids = torch.zeros(6).long()
    torch.library.opcheck(
        torch.ops.rpp_kernels.logps_fwd.default, (logits, ids, None, 1.0, None, True, False, "native")
    )


# ---------------------------------------------------------------- torch.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(x, mask, *, temperature=1.0, beta=0.1, gamma=0.9, epsilon=0.2):
    """A whole step of training, from hidden states to the loss."""
    out = rpp.linear_logps(x["hidden_states"], x["weight"], x["target_ids"], mask, temperature=temperature)
    old, ref = x["old_logps"], x["ref_logps"]
    a = rpp.reinforce_pp_advantages(x["scores"], old, ref, mask, beta=beta, gamma=gamma)
    b = rpp.gae(rpp.token_rewards(x["scores"], rpp.kl_penalty(old, ref, mask), mask, beta=beta), x["values"], mask)
    c = rpp.returns(rpp.whiten(b.advantages, mask), mask, gamma=gamma)
    loss = rpp.policy_loss(out.logps, old, a + c.detach(), mask, epsilon_low=epsilon, epsilon_high=epsilon).loss
    critic = rpp.value_loss(x["values"], x["old_values"], b.returns.detach(), mask, epsilon=epsilon).loss
    return loss + critic - 0.01 * out.entropy.sum() + rpp.kl_penalty(out.logps, ref, mask, estimator="k2").sum()


LEARNED = ("hidden_states", "weight", "values")


@needs_native
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_whole_step_compiles_into_one_graph_with_the_values_and_gradients_of_eager(compiler):
    x = make_batch(3, 7, vocab=11, hidden=4)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    got = evaluate(lambda x: compiled(x, x["completion_mask"]), x, LEARNED)
    assert_close(got, evaluate(lambda x: step(x, x["completion_mask"]), x, LEARNED))
    assert counter.frame_count == 1


NUMBERS = {
    "temperature": lambda x, v: rpp.logps_from_logits(x["logits"], x["target_ids"], temperature=v).logps,
    "beta": lambda x, v: rpp.reinforce_pp_advantages(x["scores"], x["logps"], x["ref_logps"], beta=v),
    "gamma": lambda x, v: rpp.returns(x["rewards"], gamma=v),
    "epsilon": lambda x, v: rpp.policy_loss(x["logps"], x["old_logps"], x["advantages"], epsilon_low=v).loss,
}


@needs_native
@pytest.mark.xfail(strict=True, reason="torch makes a constant of a float that a custom op takes, and guards on it")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_each_step_does_not_recompile_each_step(name):
    x = make_batch(3, 7, vocab=11)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(NUMBERS[name], fullgraph=True, backend=counter)
    for value in (0.5, 0.51, 0.52, 0.53):
        assert_close(compiled(x, value), NUMBERS[name](x, value))
    assert counter.frame_count <= 2  # the first number, and then any number


@needs_native
def test_a_temperature_in_a_tensor_does_not_recompile():
    x = make_batch(3, 7, vocab=11)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(NUMBERS["temperature"], fullgraph=True, backend=counter)
    for value in (0.5, 0.51, 0.52, 0.53):
        each = torch.full((3, 7), value)
        assert_close(compiled(x, each), NUMBERS["temperature"](x, value))
    assert counter.frame_count == 1


@needs_native
def test_lengths_that_change_each_step_do_not_recompile_each_step():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for B, S in ((3, 7), (4, 9), (5, 11), (6, 8), (9, 30)):
        x = make_batch(B, S, vocab=11, hidden=4)
        assert_close(compiled(x, x["completion_mask"]), step(x, x["completion_mask"]))
    assert counter.frame_count <= 3  # the first size, then any B or S, then any of both


@needs_native
def test_packed_lengths_and_group_sizes_do_not_recompile_each_step():
    counter = CompileCounterWithBackend("eager")

    def packed_step(x, group_size):
        mask, cu = x["completion_mask"], x["cu_seqlens"]
        scores = rpp.group_advantages(x["scores"], group_size=group_size, std="group")
        a = rpp.reinforce_pp_advantages(scores, x["old_logps"], x["ref_logps"], mask, cu_seqlens=cu)
        return rpp.policy_loss(x["logps"], x["old_logps"], a, mask, cu_seqlens=cu).loss

    compiled = torch.compile(packed_step, fullgraph=True, backend=counter)
    for B, S, size in ((4, 7, 2), (6, 9, 3), (8, 11, 4), (10, 8, 5), (12, 30, 6)):
        x = make_batch(B, S, packed=True)
        assert_close(compiled(x, size), packed_step(x, size))
    assert counter.frame_count <= 4


@needs_native
def test_a_change_of_backend_recompiles_and_is_obeyed():
    counter = CompileCounterWithBackend("eager")
    x = make_batch(2, 3)
    compiled = torch.compile(lambda x: rpp.kl_penalty(x["logps"], x["ref_logps"]), fullgraph=True, backend=counter)
    ours = compiled(x)
    assert "kl_fwd" in str(counter.graphs[-1].graph)
    with rpp.use_backend("reference"):
        assert_close(compiled(x), ours)
    assert counter.frame_count == 2
    assert "kl_fwd" not in str(counter.graphs[-1].graph)


@needs_native
@pytest.mark.parametrize("call", [ONE_OF_EACH["policy_loss token-mean"], ONE_OF_EACH["logps_from_logits"]])
def test_errors_of_options_are_raised_under_compile_as_well(call):
    batch = random_batch(MASK, LENGTHS)
    bad = partial(call.function, **({"reduction": "mean"} if "logps" in call.differentiable else {"temperature": -1.0}))
    compiled = torch.compile(lambda x: bad(rpp, x, batch.mask, None), backend="eager")
    with pytest.raises(ValueError, match="want"):
        compiled({k: v for k, v in batch.tensors.items() if k != "temperature"})


def test_reductions_of_this_table_are_those_of_the_library():
    from rpp_kernels.ops.policy_loss import REDUCTIONS as OURS

    assert set(REDUCTIONS) == set(OURS)
