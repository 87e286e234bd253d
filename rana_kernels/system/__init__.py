"""The machine: its processor, its memory pages, and files that are written whole."""
