"""Subjects of `scripts/benchmark.py`, one a module, and what they have in common.

A subject has a docstring, `define_flags(values)` and `measure(values, bench)`, which hands what is timed to
`bench.time`, a `timing.Bench`.
"""
