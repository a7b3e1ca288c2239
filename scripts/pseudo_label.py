"""Makes pseudo-labelled sets out of a pool of unlabelled images, or goes on where it was interrupted."""

from robust_keras.commands import pseudo_label

if __name__ == "__main__":
    pseudo_label.command()
