"""Allocation: each method turns statistics and a budget into a Plan, with parts that all methods share."""
