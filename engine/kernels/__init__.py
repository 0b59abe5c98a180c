"""Ops, by implementation. `reference.py` is the specification; every other file must agree with it."""
