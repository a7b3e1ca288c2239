"""Checks a SavedModel against what is claimed of it."""

from robust_keras.commands import verify

if __name__ == "__main__":
    verify.command()
