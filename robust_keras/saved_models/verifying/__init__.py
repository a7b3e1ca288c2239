"""What `verify` is made of: it needs TensorFlow and NumPy alone, and is joined to one file beside an export."""
