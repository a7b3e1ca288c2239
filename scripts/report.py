"""Prints the results of evaluations as one table, and how they differ from a baseline on the same images."""

from robust_keras.commands import report

if __name__ == "__main__":
    report.command()
