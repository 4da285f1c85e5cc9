"""What stands on the operating system: processes, files, locks, signal masks, text."""
