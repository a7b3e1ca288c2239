"""Exports the weights of a run as a SavedModel or a .keras file, also while the run goes on."""

from robust_keras.commands import export

if __name__ == "__main__":
    export.command()
