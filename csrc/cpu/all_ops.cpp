// All ops as one unit, the only one that is compiled: they share their loops, which take most of the compiler's time.
#include "linear.cpp"
#include "masked_linear.cpp"
#include "masked_lowrank_linear.cpp"
#include "masked_mlp.cpp"
#include "run_blocks.h"
