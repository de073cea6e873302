"""A fake: see the README beside this package."""
