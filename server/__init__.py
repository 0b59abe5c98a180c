"""HTTP, text and JSON. Knows the engine only as `from engine import ...`."""
