"""Rotations of a dense model that change no prediction, but after which masks lose less.

run        `rotate`: both rotations, from some text
heads      within each value head, between v and o
stream     of the residual stream, between the linears that write it and those that read it
learning   of the rotation of the stream, from the identity, for the least loss of masks

The rotated weights take the place of the original ones. Nothing is added at run time.
"""
