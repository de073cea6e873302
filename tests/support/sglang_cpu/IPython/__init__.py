"""Stand-in for IPython: SGLang imports `IPython.display`, to show things in notebooks."""
