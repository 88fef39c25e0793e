"""Prints the table of kernels out of a plan: `python scripts/kernel_table.py outputs/<date>/<time>`.

Needs neither a GPU nor the machine that the plan was made on.
"""

import sys

from llmmed.consoles import answered_help
from llmmed.reporting.kernel_table import main

if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
