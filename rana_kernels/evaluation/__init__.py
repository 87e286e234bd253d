"""What a compressed model is worth, measured from outside its modules: loss, live rows, where it fails."""
