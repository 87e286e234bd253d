"""Rotations of a dense model that change no prediction, but after which masks lose less.

run        `rotate`: both rotations, from some text
heads      within each value head, between v and o
stream     of the residual stream, between the linears that write it and those that read it
learning   finds the rotation of the stream that makes the loss of masks least

The rotated weights take the place of the original ones. Nothing is added at run time.
"""
