"""Classifiers on disk: loading any, exporting ours."""
