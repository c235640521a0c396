"""Folders that `transformers` loads, made from runs; see `folder`."""
