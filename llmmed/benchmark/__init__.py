"""Benchmarks: every op against its rivals, and whole training steps against other people's.

`cli` is the command, `settings` its keys, `ops` and `step` the two benchmarks, `results` what they leave on disk,
`page` the document made of it, `manual` the functions for a Python prompt.
"""
