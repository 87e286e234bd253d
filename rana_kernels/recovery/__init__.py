"""What recovery trains: adapters as plain linears, a budget of LoRA ranks, thresholds for the new weights."""
