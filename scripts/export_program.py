"""Leaves a run's training step and evaluation in a folder, from where they run with JAX and NumPy alone."""

from robust_keras.commands import export_program

if __name__ == "__main__":
    export_program.command()
