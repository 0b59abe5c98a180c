"""Measuring a model of random weights: `easel bench --shape`, and `python -m engine.measure` without a server.

`roofline` counts, `cards` and `ceilings` say what chips can do, `rig` works an engine's parts by hand, `figures` is
what is measured, `run` in which order. Knows no HTTP. Invariant: importing this package imports no torch.
"""
