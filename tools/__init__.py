"""The commands of `mplug2`: one file each, a thin `main(argv) -> int | None`; main.py dispatches."""
