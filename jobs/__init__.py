"""The entry points: one file a job, a typed config each; ``python -m jobs.NAME`` is ``facemae NAME`` is what a RayJob runs."""
