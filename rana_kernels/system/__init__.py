"""Access to the machine: the processor, huge pages, files that are written whole, and progress."""
