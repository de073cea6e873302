"""Programs that a model wrote, run where they can do no harm: `slime.sandbox.sandbox.Sandbox`.

The side that is told to run them is `sandbox.py`, with `programs.py` for what goes in and comes out.
All other files run in a process without slime's environment: `server.py` forks one process for each
program from a template with all modules in memory, `lockdown.py` takes its rights away, `runner.py`
runs it. They import the standard library alone.
"""
