"""Pseudo-labelled sets out of a pool of unlabelled images."""
