"""Reports: what is in a file that placer reads or writes, told and drawn."""
