"""Labelled image sets and what is done to their images before training."""
