"""Times kernels or whole training steps: `python scripts/benchmark.py ops=rms_norm,rotary sizes=small,base`.

`benchmark=step` compares training steps; `report=<folder>` draws a finished benchmark again. `--help` lists the keys.
"""

from llmmed.benchmark.cli import main

if __name__ == "__main__":
    main()
