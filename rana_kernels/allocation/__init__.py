"""The methods of allocation, and the pieces that they share: from error curves and a budget to a Plan."""
