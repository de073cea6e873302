"""Plugins as users of slime write them: documented names only, each file as it might lie in a project of theirs.

They are kept as they are. When one of them no longer runs, a promise of docs/compatibility.md is broken.
"""
