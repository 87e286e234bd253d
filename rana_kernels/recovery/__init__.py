"""Recovery: a short LoRA training of a compressed model, its ranks, and new thresholds afterwards."""
