"""Trains a model: `python scripts/train.py kernels=auto model=small`, or a sweep with `-m`. `--help` lists the keys."""

import signal

if __name__ == "__main__":
    answers = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored
    if answers:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are loaded, Ctrl-C ends it without a traceback
    from llmmed.cli import main

    if answers:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
