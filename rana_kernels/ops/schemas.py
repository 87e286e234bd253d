"""The schemas of `torch.ops.rana`. They are written here and nowhere else.

The build parses `SCHEMAS` out of this file for programs without Python, so the dict holds only literals.
"""

SCHEMAS = {
    "masked_linear": "(Tensor h, Tensor rows, Tensor threshold, Tensor? norms=None,"
    " Tensor? bias=None, Tensor? rows_scale=None) -> Tensor",
    "masked_lowrank_linear": "(Tensor x, Tensor B, Tensor rows, Tensor threshold,"
    " Tensor? bias=None, Tensor? B_scale=None, Tensor? rows_scale=None) -> Tensor",
    "masked_mlp": "(Tensor x, Tensor? B, Tensor up_rows, Tensor? gate_rows, Tensor threshold, Tensor? norms,"
    " Tensor? up_bias, Tensor? gate_bias, Tensor down_rows, Tensor down_norms, Tensor down_threshold,"
    " Tensor? down_bias, str activation, Tensor? B_scale=None, Tensor? up_scale=None,"
    " Tensor? gate_scale=None, Tensor? down_scale=None) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? weight_scale=None) -> Tensor",
}
