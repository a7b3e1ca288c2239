"""What classes are called, of data sets that the package knows."""

BY_DATASET = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
