"""The studies that show what the log-alignment ratio is good for, and the command `jlar`."""
