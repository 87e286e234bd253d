"""The schemas of `torch.ops.rana`: the only place where they are written.

The build reads `SCHEMAS` from this file as text, for programs without Python: it holds literals alone.
"""

SCHEMAS = {
    "masked_linear": "(Tensor h, Tensor rows, Tensor threshold, Tensor? norms=None,"
    " Tensor? bias=None) -> Tensor",
    "masked_lowrank_linear": "(Tensor x, Tensor B, Tensor rows, Tensor threshold,"
    " Tensor? bias=None) -> Tensor",
    "masked_mlp": "(Tensor x, Tensor B, Tensor up_rows, Tensor? gate_rows, Tensor threshold,"
    " Tensor? up_bias, Tensor? gate_bias, Tensor down_rows, Tensor down_norms, Tensor down_threshold,"
    " Tensor? down_bias, str activation) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
}
