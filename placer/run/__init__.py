"""What every stage runs on: files, processes, sessions, deadlines, progress."""
