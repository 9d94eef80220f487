"""The feature matrix says of the installed peers what their signatures say, and of us what ours do."""

import importlib
import importlib.util
import inspect
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import features
import gpu_peers
import peers
import report

FUNCTIONS = {
    "TRL, ChunkedLogProbFunction": ("trl.kernels", "ChunkedLogProbFunction.forward"),
    "verl, Triton linear_cross_entropy": ("verl.utils.kernel.linear_cross_entropy", "LinearCrossEntropy.forward"),
    "verl, FusedLinearForPPO": ("verl.utils.experimental.torch_functional", "FusedLinearForPPO.forward"),
    "Liger, LigerFusedLinearGRPOLoss": ("liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOFunction.forward"),
    "Liger, scaled cross entropy": ("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction.apply"),
    "Apple, linear_cross_entropy": ("cut_cross_entropy", "linear_cross_entropy"),
    "QuACK, chunked_linear_cross_entropy": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}
# Of an argument's name, the column that it is evidence of.
EVIDENCE = {
    "temperature": "temperature",
    "softcap": "softcap",
    "final_logit_softcapping": "softcap",
    "bias": "bias",
    "dist_process_group": "sharded vocabulary",
}


@pytest.mark.parametrize("name", features.PEERS)
def test_an_argument_is_there_where_the_matrix_says_yes_and_not_where_it_says_no(name):
    peer, (module, path) = features.PEERS[name], FUNCTIONS[name]
    try:
        if version(peer.distribution) != peer.version:
            pytest.fail(f"the matrix was read in {peer.distribution} {peer.version}, and another version is installed")
    except PackageNotFoundError:
        pytest.skip(f"{peer.distribution} is not installed")
    import hosts

    function = hosts.module(module)
    for part in path.split("."):
        function = getattr(function, part)
    found = {name for name in inspect.signature(function).parameters if name in EVIDENCE}
    assert found == set(peer.arguments)
    facts = dict(zip(features.COLUMNS, peer.facts, strict=True))
    said = {column for column in ("temperature", "softcap", "bias") if facts[column] != features.NO}
    assert said == {EVIDENCE[argument] for argument in found} - {"sharded vocabulary"}


@pytest.mark.parametrize("name", features.PEERS)
def test_the_source_that_was_read_is_there(name):
    peer = features.PEERS[name]
    package = peer.source.partition("/")[0]
    if (spec := importlib.util.find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    assert (Path(spec.origin).parents[1] / peer.source).exists()


def test_ours_has_all_that_signatures_and_tests_say():
    assert dict(zip(features.COLUMNS, features.ours(), strict=True)) == {
        column: "per token" if column in ("advantages or weights", "temperature") else "yes"
        for column in features.COLUMNS
    }


def test_times_are_found_by_names_that_are_timed():
    timed = {**peers.LINEAR_POLICY_LOSS, **gpu_peers.LINEAR_POLICY_LOSS}
    assert {peer.competitor for peer in features.PEERS.values() if peer.competitor} <= set(timed)


def test_without_a_gpu_the_table_says_so_and_with_one_it_has_the_numbers():
    assert report.NOT_YET in report.features(None)
    row = {"case": report.HEAD, "phase": "both", "note": "", "median_ms": 46.0, "peak_extra_mib": 5000.0, "error": 1e-3}
    rows = [row | {"competitor": "rpp-kernels, CUDA, one read"}]
    rows.append(row | {"competitor": "Liger, LigerFusedLinearGRPOLoss", "note": "out of memory"})
    table = report.features({"rows": rows})
    assert "| rpp-kernels, linear_policy_loss | 46, 5000, 1e-03 |" in table
    assert "| Liger, LigerFusedLinearGRPOLoss (0.8.5) | out of memory |" in table
