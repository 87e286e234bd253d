"""Any shape, dtype, density and option: integer inputs give the float64 result, rounded once."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import ACTIVATIONS, DTYPES, Case, exact_result, make_inputs

size = st.integers(0, 80)
common = {
    "R": size,
    "N": size,
    "lead": st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 17]), max_size=3).map(tuple),
    "density": st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.75, 1.0]),
    "bias": st.booleans(),
    "per_row": st.booleans(),
}
linears = st.builds(Case, op=st.just("masked_linear"), norms=st.booleans(), **common)
lowranks = st.builds(Case, op=st.just("masked_lowrank_linear"), K=size, **common)
gates = st.one_of(st.none(), st.just("joint"), size)
mlps = st.builds(
    Case,
    op=st.just("masked_mlp"),
    K=size,
    I=size,
    gate=gates,
    activation=st.sampled_from(list(ACTIVATIONS)),
    **common,
)
denses = st.builds(
    Case, op=st.just("linear"), R=st.just(0), N=size, K=size, lead=common["lead"], bias=common["bias"]
)


@settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=st.one_of(linears, lowranks, mlps, denses), dtype=st.sampled_from(DTYPES))
def test_any_problem_is_exact(implementation, case, dtype):
    args = make_inputs(case, dtype, integers=True, device=implementation.device)
    y = implementation(case.op, args)
    assert y.shape == (*case.lead, case.N) and y.dtype == dtype
    torch.testing.assert_close(y, exact_result(case.op, args, dtype), rtol=0, atol=0)
