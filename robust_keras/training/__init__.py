"""Adversarial training: objectives, the compiled step, and the run around it."""
