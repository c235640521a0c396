"""Parts of tools/rehearse.py."""
