"""Trains a classifier from a recipe, or continues a run that was interrupted."""

from robust_keras.commands import train

if __name__ == "__main__":
    train.command()
