"""The kinds of published networks that can be read; see `kinds`."""
