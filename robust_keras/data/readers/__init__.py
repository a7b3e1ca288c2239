"""Sets of images in files, a format a file."""
