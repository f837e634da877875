"""The zoo: one file per module, each with its Config, class and sizes."""
