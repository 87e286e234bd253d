"""The model: where its linears are, the plan of its adapters, and the replacement of linears by modules."""
