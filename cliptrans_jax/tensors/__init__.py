"""The kinds of networks whose published tensors can be read; see `kinds`."""
