"""Attacks the checkpoints of a training run while it goes on, each in a folder of its own."""

from robust_keras.commands import evaluate_checkpoints

if __name__ == "__main__":
    evaluate_checkpoints.command()
