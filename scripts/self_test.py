"""Tries out, in about a minute, whether training and evaluation work on the hardware at hand."""

from robust_keras.commands import self_test

if __name__ == "__main__":
    self_test.command()
