"""From ids on disk to batches: packing, order, and where in it one is."""
