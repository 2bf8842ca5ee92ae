"""Reports: the contents of a file that placer reads or writes, as text and charts."""
