"""Trains a model: `python scripts/train.py kernels=auto model=small`, or a sweep with `-m`. `--help` lists the keys."""

from llmmed.cli import main

if __name__ == "__main__":
    main()
