"""Exports a run for Hugging Face: `python scripts/export_hf.py <run folder> <target folder>`.

The target then loads with `transformers.AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
"""

import sys

from llmmed.consoles import answered_help
from llmmed.export import main

if __name__ == "__main__":
    sys.exit(0 if answered_help(__doc__) else main(sys.argv[1:]))
