"""The networks whose published tensors are read: see `kinds`."""
