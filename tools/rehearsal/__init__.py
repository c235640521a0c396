"""Modules of tools/rehearse.py."""
