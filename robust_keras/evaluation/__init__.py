"""What a classifier withstands: attacks in sequence, verified images, results and reports."""
