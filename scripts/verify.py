"""Verifies kernels: `python scripts/verify.py`, or `op=rms_norm impl=triton dtype=bfloat16 seeds=3` for some of them,
and with `random=100` at so many random shapes and strides, too.

What a kernel author runs first. Prints each implementation's verdict with its error as soon as it and those above it
are found, and at the end how many there are of each. The exit code is 0 if none failed, 1 if any did, if one that
`impl=` names is unavailable or an argument is mistaken, and 130 if it was interrupted. Several values are separated by
commas. `workers=4` verifies in so many processes side by side; without it there is one for each core, at most 8. One
that takes longer than `seconds=` (600 a seed, and 20 for each random shape) is timed out. Ctrl-C ends all, and shows
what is known. Triton kernels run on a CPU too, in float32: TRITON_INTERPRET=1.
"""

import sys

from llmmed.consoles import answered_help
from llmmed.signals import INTERRUPTED, Interrupted


def run() -> int:
    try:
        from llmmed.reporting.verdicts import main  # PyTorch comes with it, and takes seconds

        return main(sys.argv[1:])
    except (KeyboardInterrupt, Interrupted):
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else run())
