"""Triton's interpreter as the tests want it: fast enough, and scans in the order of a GPU.

It serves `python -m pytest` on a machine without a GPU and nothing else. The private parts of Triton that this replaces
are the same in 3.6, 3.7 and 3.9.
"""

from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def prepare() -> None:
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    interpreter.ScanOps.generic_scan = _scan_as_a_tree
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # tensors of a CPU were written where they lie


def _patched_once(patch_lang):
    """The language is patched when a kernel starts, rather than anew for each function that it calls: three times as
    fast."""
    running = []

    def patch(function):
        if running:
            return None  # what a function called from a kernel does not look at
        scope = patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        restore = scope.restore

        def end():
            running.clear()
            restore()

        scope.restore = end
        running.append(scope)
        return scope

    return patch


def _scan_as_a_tree(self, inputs):
    """Whole blocks are combined, log2(n) times, as on a GPU. One element after another would take 60 us for each, and
    would not notice that a combination is not associative."""
    states = [x.handle.data for x in inputs]
    dtypes = [x.dtype for x in inputs]
    shape, reach = states[0].shape, 1
    place = np.arange(shape[self.axis]).reshape([-1 if axis == self.axis else 1 for axis in range(len(shape))])
    while reach < shape[self.axis]:
        earlier = [np.roll(x, reach, self.axis) for x in states]
        both = [self.to_tensor(x, dtype) for x, dtype in zip(earlier + states, dtypes + dtypes, strict=True)]
        combined = self.combine_fn.fn(*both)
        combined = combined if isinstance(combined, tuple) else (combined,)
        states = [np.where(place < reach, x, y.handle.data) for x, y in zip(states, combined, strict=True)]
        reach *= 2
    return [self.to_tensor(x, dtype) for x, dtype in zip(states, dtypes, strict=True)]
