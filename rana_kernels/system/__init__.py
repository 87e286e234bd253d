"""Access to the machine: facts about the processor, huge pages, and files that are written whole."""
