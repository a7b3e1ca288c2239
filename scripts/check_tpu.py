"""Says whether a recipe is ready for TPU cores, and what it takes there. Needs neither a TPU nor the paper's data."""

from robust_keras.commands import check_tpu

if __name__ == "__main__":
    check_tpu.command()
