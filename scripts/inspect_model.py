"""Says what is in a model, without loading it."""

from robust_keras.commands import inspect_model

if __name__ == "__main__":
    inspect_model.command()
