"""Attacks a saved classifier and writes what was measured about it."""

from robust_keras.commands import evaluate

if __name__ == "__main__":
    evaluate.command()
