"""The report of a run: `slime report RUN` makes one HTML page out of what the run folder holds."""
