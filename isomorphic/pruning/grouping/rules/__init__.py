"""Rules of operations: how the axes of a result follow from those of the arguments. See `table.py`."""
