"""The experiments: one file per task, each with `tiny()` and the published sizes."""
