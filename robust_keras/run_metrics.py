"""What a run's metrics.csv has: its columns, for what writes it and for what reads it."""

VALIDATION = ("val_clean", "val_robust", "val_clean_averaged", "val_robust_averaged")
METRICS = ("step", "loss", "learning_rate", "examples_per_second", "labelled_fraction", *VALIDATION)
