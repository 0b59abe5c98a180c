"""The DiffusionGemma stack."""
