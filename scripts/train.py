"""Trains a model: `python scripts/train.py kernels=auto model=small`, or a sweep with `-m`. `--help` lists the keys."""

import signal

if __name__ == "__main__":
    answer = signal.getsignal(signal.SIGINT)
    if answer is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are loaded, Ctrl-C ends it without a traceback
    from llmmed.cli import main

    signal.signal(signal.SIGINT, answer)
    main()
