"""Plugins that come with slime: found by dotted path, never imported by name."""
