"""Samples text from a run: `python scripts/generate.py <run folder> prompt="The heart" temperature=0.8 top_p=0.95`.

Further: max_tokens=80, seed=0. Temperature 0 takes the likeliest token every time.
"""

import sys

from llmmed.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
