"""Where text comes from: documents out of files, datasets and Python's own library, each on one side of a split."""
