"""benchmarks/gpu_peers.py without a GPU: what is said of who is missing, the signatures of who is not, and the values
of those that run in Triton's interpreter or have a path for a CPU."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_peers
from linear_cases import eager_policy_loss
from timing import differentiated

TABLES = [
    gpu_peers.LOGPS,
    gpu_peers.LOGPS_ENTROPY,
    gpu_peers.LINEAR_LOGPS,
    gpu_peers.LINEAR_POLICY_LOSS,
    gpu_peers.LINEAR_CROSS_ENTROPY,
]
LOADERS = [pytest.param(loader, id=name) for table in TABLES for name, loader in table.items()]


@pytest.fixture
def cuda_said(monkeypatch):
    """The loaders' own question, answered yes."""
    monkeypatch.setattr(gpu_peers.torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_says_why_it_has_nothing(loader):
    if torch.cuda.is_available():
        pytest.skip("who is missing is said beside the timings")
    with pytest.raises(ImportError, match="there is no"):
        loader()


def test_a_package_that_breaks_when_it_is_imported_is_an_import_error(cuda_said):
    def build():
        raise RuntimeError("no such instruction")

    load = gpu_peers.peer("TRL, of a test", build)["TRL, of a test"]
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    with pytest.raises(ImportError, match="trl cannot be imported, RuntimeError: no such instruction"):
        load()


def tensors(batch=2, length=5, vocab=40, hidden=128):
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(batch, 1, generator=generator) + 0.5
    inputs = {
        "hidden_states": torch.randn(batch, length, hidden, generator=generator),
        "weight": torch.randn(vocab, hidden, generator=generator) / hidden**0.5,
        "target_ids": torch.randint(vocab, (batch, length), generator=generator),
    }
    logps = eager_logps(**inputs)[0].detach()
    policy = {"old_logps": logps + 0.02 * torch.randn(logps.shape, generator=generator)}
    return inputs, policy | {"advantages": advantages.expand(batch, length).contiguous()}


def eager_logps(hidden_states, weight, target_ids):
    logits = hidden_states @ weight.T
    return (torch.log_softmax(logits, -1).gather(-1, target_ids[..., None]).squeeze(-1),)


def eager_cross_entropy(**inputs):
    return (-eager_logps(**inputs)[0].mean(),)


def same(function, expected, inputs, wrt):
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in expected(**inputs)]
    got, want = (differentiated(f, inputs, wrt, grads) for f in (function, expected))
    outputs, wanted = got.forward(), want.forward()
    torch.testing.assert_close(tuple(outputs), tuple(wanted), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.backward(outputs), want.backward(wanted), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- values, where a kernel runs without a GPU


def logps_entropy(logits, target_ids):
    logps = torch.log_softmax(logits, -1)
    return logps.gather(-1, target_ids[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def loaded(table, name):
    package = gpu_peers.PACKAGES[name.partition(",")[0]]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    try:
        return table[name]()
    except ImportError as error:
        if package in str(getattr(error.__cause__, "name", package)):  # its own, not what it needs
            raise
        pytest.skip(str(error))


def test_values_of_trl_from_logits(cuda_said):
    function = loaded(gpu_peers.LOGPS_ENTROPY, "TRL, Triton selective_log_softmax_and_entropy")
    inputs = {"logits": torch.randn(6, 1500), "target_ids": torch.randint(1500, (6,))}
    same(function, logps_entropy, inputs, ("logits",))


def test_values_of_log_probs(cuda_said, monkeypatch):
    function = loaded(gpu_peers.LINEAR_LOGPS, "Liger, CuTe scaled cross entropy")
    monkeypatch.undo()  # Liger asks again and takes its path for other devices
    same(function, eager_logps, tensors()[0], ("hidden_states", "weight"))


@pytest.mark.parametrize("name", ["Liger, LigerFusedLinearGRPOLoss", "Liger, logits, then triton_grpo_loss"])
def test_values_of_the_policy_loss(name, cuda_said, monkeypatch):
    function = loaded(gpu_peers.LINEAR_POLICY_LOSS, name)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs, policy = tensors()
    same(function, eager_policy_loss, inputs | policy, ("hidden_states", "weight"))


def test_values_of_the_cross_entropy(cuda_said, monkeypatch):
    function = loaded(gpu_peers.LINEAR_CROSS_ENTROPY, "Liger, fused_linear_cross_entropy")
    monkeypatch.undo()
    same(function, eager_cross_entropy, tensors()[0], ("hidden_states", "weight"))


# ---------------------------------------------------------------- signatures, where none does


class Bound(Exception):
    pass


CALLED = {  # (module, function) -> (table, name)
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"): (
        "LINEAR_LOGPS",
        "verl, Triton linear_cross_entropy",
    ),
    ("cut_cross_entropy", "linear_cross_entropy"): ("LINEAR_LOGPS", "Apple, linear_cross_entropy"),
    ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"): (
        "LINEAR_CROSS_ENTROPY",
        "QuACK, chunked_linear_cross_entropy",
    ),
    ("quack.cross_entropy", "cross_entropy"): ("LOGPS", "QuACK, cross_entropy"),
    ("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss"): ("LOGPS", "flash-attn, Triton cross_entropy_loss"),
}


@pytest.mark.parametrize(("module", "path"), CALLED)
def test_signatures_of_what_is_installed(module, path, cuda_said, monkeypatch):
    table, name = CALLED[module, path]
    loaded(getattr(gpu_peers, table), name)
    home = importlib.import_module(module)
    function = getattr(home, path)
    owner = getattr(function, "__self__", None)
    signature = inspect.signature(owner.forward if owner else function)  # of an autograd function, behind its ctx

    def bind(*args, **kwargs):
        signature.bind(*([None] if owner else []), *args, **kwargs)
        raise Bound

    monkeypatch.setattr(home, path, bind)
    rebuilt = getattr(gpu_peers, table)[name]()
    inputs = tensors()[0] if table != "LOGPS" else {"logits": torch.randn(3, 8), "target_ids": torch.zeros(3).long()}
    with pytest.raises(Bound):
        rebuilt(**inputs)
