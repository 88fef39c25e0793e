"""Samples text from a run: `python scripts/generate.py <run folder> prompt="Pneumonia." temperature=0.8 top_p=0.95`.

The prompt begins a document, as those of the training begin: with `data=biomed` a term and a full stop. Further:
max_tokens=80, seed=0. Temperature 0 takes the likeliest token every time.
"""

import sys

from llmmed.consoles import answered_help
from llmmed.generate import main

if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
