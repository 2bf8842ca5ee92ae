"""What every stage runs on: files, processes, deadlines, progress."""
