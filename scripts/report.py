"""Writes report.html into a run's or a sweep's folder: `python scripts/report.py outputs/<date>/<time>`.

Works for failed and unfinished runs, too. Of a sweep it also prints and writes the comparison of its jobs.
"""

import sys

from llmmed.consoles import answered_help
from llmmed.reporting.report import main

if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
