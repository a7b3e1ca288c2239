"""Turns weights that others trained into a SavedModel."""

from robust_keras.commands import import_checkpoint

if __name__ == "__main__":
    import_checkpoint.command()
