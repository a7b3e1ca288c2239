"""Runs rows of the paper's tables, and writes the paper's numbers next to the measured ones."""

from robust_keras.commands import reproduce

if __name__ == "__main__":
    reproduce.command()
