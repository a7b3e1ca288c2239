"""Exports the weights of a run: as a SavedModel, or a Keras, TFLite or ONNX file."""

from robust_keras.commands import export

if __name__ == "__main__":
    export.command()
