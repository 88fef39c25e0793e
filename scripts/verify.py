"""Verifies kernels: `python scripts/verify.py`, or `op=rms_norm impl=triton dtype=bfloat16 seeds=3` for some of them,
and with `random=100` at so many random shapes and strides, too.

What a kernel author runs first. Prints each implementation's verdict with its error; the exit code is 0 if none is
wrong. Several values are separated by commas. Triton kernels run on a CPU too, in float32: TRITON_INTERPRET=1.
"""

import sys

from llmmed.consoles import answered_help
from llmmed.reporting.verdicts import main

if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
