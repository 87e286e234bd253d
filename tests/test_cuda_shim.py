"""The CUDA kernels run on the CPU: right under every schedule and the sanitizers, and mutants are found out.

Their own source is compiled by the host's compiler against `cuda_shim`. A process that the sanitizers or the
shim ended counts as a failure, so all of this happens in children.
"""

import faulthandler
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cases import Case, assert_close, exact_result, make_inputs
from tests.cuda_shim import build
from tests.cuda_shim.build import OPS
from tests.subprocesses import pytest_passes

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None or sys.platform != "linux", reason="no C++ compiler"
)
SCHEDULES = ("forward", "reverse", "random:1", "mixed:2")


def run_ops(library: Path, select: str, marks: str, **environment: str) -> str:
    """tests/test_ops.py in a child that the shim serves."""
    command = ["-p", "tests.cuda_shim.plugin", "-k", select, "-m", marks, "tests/test_ops.py"]
    return pytest_passes(*command, RANA_SHIM_LIBRARY=str(library), **environment)


def passed(output: str) -> int:
    return int(re.search(r"(\d+) passed", output)[1])


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all processes of this run of the tests use."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cuda_shim"


@pytest.fixture(scope="session")
def sanitized(shared) -> dict[str, str]:
    """The environment of a child with the instrumented library, and the library."""
    library = build.once(
        shared / "all" / "shim.so", lambda target: build.build(target.parent, shared, sanitize=True)
    )
    options = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=100000000"
    return {"library": library, "LD_PRELOAD": build.preload(), "ASAN_OPTIONS": options}


def test_ops_are_exact_and_close(sanitized):
    """A part of the shared cases, of NaN, equal scores and the like, under several schedules."""
    marks = "(isa or tiled or packets) and not long"
    output = run_ops(select="registered and not range and not number", marks=marks, **sanitized)
    ran = {schedule: int(count) for schedule, count in re.findall(r"under (\S+): (\d+) ran", output)}
    assert set(ran) == set(SCHEDULES) and min(ran.values()) > 220


MEMORY = "strides or expanded or left_alone or row_does_not_depend or infinity or argument"


def test_memory_errors_and_other_tokens(sanitized):
    """Unaligned and strided views, bad arguments, and tokens that do not see one another.

    Of quantised weights, some forms that mix all widths.
    """
    aligned = "offset and (lowrank-bfloat16 or lowrank_mixed-bfloat16)"
    select = f"registered and not bare and (({MEMORY}) and not float16 or {aligned})"
    select += " and not _int8 and not _int4 and not (row_does_not_depend and _mixed)"
    assert passed(run_ops(select=select, marks="not slow", **sanitized)) > 80


# what every mutant is held against: sizes at which each barrier and each branch matters, in whole packets
WIDE = Case("masked_lowrank_linear", R=300, N=304, K=600)  # (R, N, K): several tiles, splits and warps a row
LONG = Case("masked_lowrank_linear", R=1500, N=40, K=40)  # several rounds and tables, if there is one block
CHECKED = {
    "masked_lowrank_linear": [
        (WIDE, "4"),
        (replace(WIDE, lead=(3,)), "4"),
        (replace(WIDE, lead=(13,)), "2"),
        (LONG, "1"),
        (replace(LONG, lead=(7,)), "1"),
        (replace(WIDE, density=0.25, lead=(16,), N=264), "2"),
    ],
    "masked_linear": [
        (Case("masked_linear", R=5000, N=40), "3"),  # two looks at z
        (Case("masked_linear", R=13000, N=24, density=1.0), "1"),  # two lists
        (Case("masked_linear", R=300, N=704), "3"),
        (Case("masked_linear", R=301, N=72, lead=(6,)), "2"),
        (Case("masked_linear", R=300, N=304, lead=(13,)), "2"),
    ],
    "masked_mlp": [
        (Case("masked_mlp", R=48, N=304, K=40, I=600, gate=20), "3"),
        (Case("masked_mlp", R=48, N=72, K=40, I=304, gate="joint", lead=(5,)), "2"),
        (Case("masked_mlp", R=None, N=72, K=600, I=304, gate="joint", lead=(3,)), "2"),
    ],
    "linear": [
        (Case("linear", N=1500, K=40), "1"),
        (Case("linear", N=300, K=600, lead=(13,)), "2"),
    ],
}
# the same for weights of which some are quantised: in whole packets, and in rows read column by column
QUANTIZED = {
    "masked_lowrank_linear": [
        (Case("masked_lowrank_linear", R=75, N=160, K=1088, bits=(4, 8), lead=(11,)), "2"),
        (Case("masked_lowrank_linear", R=75, N=160, K=1088, bits=(8, 16, 4), group=64), "3"),
    ],
    "masked_linear": [
        (Case("masked_linear", R=601, N=320, bits=(4,)), "3"),
        (Case("masked_linear", R=601, N=320, bits=(8,), group=64), "1"),
        (Case("masked_linear", R=1201, N=96, bits=(4,), group=64, lead=(3,)), "1"),
        (Case("masked_linear", R=601, N=176, bits=(8,), density=0.25, lead=(13,)), "2"),
        (Case("masked_linear", R=70, N=70, bits=(4,), lead=(2,)), "2"),
    ],
    "masked_mlp": [
        (Case("masked_mlp", R=48, N=96, K=64, I=544, gate=20, bits=(4, 4, 8, 16)), "3"),
        (Case("masked_mlp", R=None, N=96, K=96, I=320, gate="joint", bits=(8, 4), lead=(5,)), "2"),
    ],
    "linear": [
        (Case("linear", N=70, K=71, bits=(4,), lead=(2,)), "2"),  # whole blocks of nibbles and a part of one
        (Case("linear", N=70, K=1088, bits=(8,)), "1"),
        (Case("linear", N=70, K=1088, bits=(4,), group=64), "2"),
        (Case("linear", N=70, K=1088, bits=(8,), group=128, lead=(13,)), "1"),
        (Case("linear", N=70, K=1088, bits=(4,), lead=(5,)), "2"),
    ],
}


def verdict(op: str, dtype: torch.dtype, cases: dict) -> None:
    """Raise if the library loaded in this process does not do what `op` promises in this dtype."""
    function = getattr(torch.ops.rana, op).default
    for case, processors in cases[op]:
        os.environ["RANA_SHIM_PROCESSORS"] = processors
        check(function, case, dtype)


def check(function: Callable, case: Case, dtype: torch.dtype) -> None:
    """Raise unless results are exact, the same under every schedule, and independent of other tokens."""
    exact = make_inputs(case, dtype, integers=True)
    wanted = exact_result(case.op, exact, dtype)
    gaussian, bits = make_inputs(case, dtype), None
    for schedule in SCHEDULES:
        os.environ["RANA_SHIM_SCHEDULE"] = schedule
        assert torch.equal(function(*exact.values()), wanted), f"{case.id} under {schedule}"
        y = function(*gaussian.values())
        assert bits is None or torch.equal(y, bits), f"other bits for {case.id} under {schedule}"
        bits = y
    assert_close(bits, case.op, gaussian, dtype)
    x = next(iter(gaussian))
    others = torch.randn_like(gaussian[x])
    others[0] = gaussian[x][0]
    y = function(*{**gaussian, x: others}.values())
    assert torch.equal(y[0], bits[0]), f"a token of {case.id} sees the others"
    others[0, 0] = float("nan")
    assert function(*{**gaussian, x: others}.values())[0].isnan().all(), f"{case.id} loses a NaN"


def survives(
    folder: Path,
    shared: Path,
    op: str,
    dtype: torch.dtype,
    cases: dict,
    weights: dict[str, str],
    mutation: build.Mutation | None = None,
) -> bool:
    """Whether the kernels of a dtype and one kind of weights (`build.FLOATS`, `build.ANY_WIDTH`) still pass.

    In a child, which may crash or hang.
    """
    library = build.build(folder, shared, [op], changes=build.ONE_DTYPE[dtype] | weights, mutation=mutation)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # crashes are what is wanted of a mutant
        os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT), 2)
        status = 1
        try:
            build.load(library)
            verdict(op, dtype, cases)
            status = 0
        except BaseException as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


LINEAR, LOWRANK, MLP, DENSE = OPS
PROJECT, PROJECT_MMA, EXPAND = "project.cuh", "project_by_mma.cuh", "expand.cuh"
THREADS, MMA, SLICES = "expand_by_threads.cuh", "expand_by_mma.cuh", "expand_by_slices.cuh"
NUMBERS, ANY, PACKETS = "quantized.cuh", "any_width.cuh", "project_by_packets.cuh"
SYNC, GRID_SYNC = "__syncthreads();", "cooperative_groups::this_grid().sync();"
DOWN, TABLE = "\n  for_tiles(op.down", "\n}\n\n// sums += this thread's share of the rows of a t"
# what is done wrong: in which op it shows, and the file, the text and what takes its place
MUTANTS = {
    "project_before_sums": (LOWRANK, PROJECT, f"    {SYNC}\n    for", "    for"),
    "project_after_sums": (LOWRANK, PROJECT, f"    {SYNC}\n  }}\n", "  }\n"),
    "project_last_row": (LOWRANK, PROJECT, "ceil_div(rows - row, teams)", "(rows - row) / teams"),
    "project_last_warp": (LOWRANK, PROJECT, "w < warps_a_row; w++", "w + 1 < warps_a_row; w++"),
    "project_one_batch": (LOWRANK, PROJECT, "partials + row, rows_from", "partials, rows_from"),
    "project_own_slice": (LOWRANK, PROJECT, "begin = share * Batch::kColumns", "begin = 0"),
    "project_half_the_rows": (LOWRANK, PROJECT_MMA, "&high = weights[s][1]", "&high = weights[s][0]"),
    "project_eight_tokens": (LOWRANK, PROJECT_MMA, "at + 8 * eight * int64_t(x.size)", "at"),
    "project_no_barrier": (LOWRANK, f"{LOWRANK}.cu", GRID_SYNC, ""),
    "nan_dropped": (LOWRANK, "mask.cuh", "? 0.0f : h", "|| h != h ? 0.0f : h"),
    "parts_in_one_place": (LOWRANK, "mask.cuh", "halves[4 * part]", "halves[0]"),
    "parts_of_one_row": (LOWRANK, "mask.cuh", "* 2 + row % 2;", "* 2;"),
    "list_counts": (LOWRANK, THREADS, f"{SYNC}  // the counts", "// the counts"),
    "list_entries": (LOWRANK, THREADS, f"{SYNC}\n  return listed", "return listed"),
    "list_order": (LOWRANK, THREADS, "+ up_to - kept;", "+ up_to;"),
    "list_first_rows": (LINEAR, THREADS, "list_rows(list, e.z, first, ", "list_rows(list, e.z, 0, "),
    "table_too_early": (LOWRANK, THREADS, f"{SYNC}  // all reads of the rows", "// all reads of the rows"),
    "table_half_full": (LOWRANK, THREADS, f"{SYNC}{TABLE}", TABLE),
    "next_tokens": (LOWRANK, THREADS, "done_with(token + m, n", "done_with(m, n"),
    "slots_too_early": (LOWRANK, THREADS, f"{SYNC}  // all reads of what was there, a", "// a"),
    "slots_too_late": (LOWRANK, THREADS, f"{SYNC}\n    float sum = 0", "float sum = 0"),
    "slots_between": (
        LOWRANK,
        THREADS,
        f"{SYNC}\n    totals[threadIdx.x] = sum",
        "totals[threadIdx.x] = sum",
    ),
    "slots_at_the_end": (LOWRANK, THREADS, f"{SYNC}\n    if (part > 0", "if (part > 0"),
    "warps_too_early": (LOWRANK, MMA, f"{SYNC}  // all reads of what was there are over\n", "\n"),
    "warps_too_late": (LOWRANK, MMA, f"{SYNC}\n  static_assert", "static_assert"),
    "rows_of_some_tokens": (LOWRANK, MMA, "int offset = 4; offset", "int offset = 8; offset"),
    "rows_of_before": (LOWRANK, MMA, "read(pass, wanted, first + kStep)", "read(pass, wanted, first)"),
    "columns_swapped": (LOWRANK, MMA, "i % 2 ? 0x7632 : 0x5410", "i % 2 ? 0x5410 : 0x7632"),
    "tiles_of_one_block": (LOWRANK, EXPAND, "tile += gridDim.x", "tile += gridDim.x + 1"),
    "down_too_early": (MLP, f"{MLP}.cu", f"{GRID_SYNC}{DOWN}", DOWN),
    "neurons_too_early": (MLP, f"{MLP}.cu", f"{SYNC}\n  for (int i", "for (int i"),
    "gate_for_up": (MLP, f"{MLP}.cu", "sums.of[kGate][m][c]))", "sums.of[kUp][m][c]))"),
    "inputs_of_one_token": (MLP, f"{MLP}.cu", "x.data[m * int64_t(x.size) + r]", "x.data[r]"),
    "inputs_of_one_block": (MLP, f"{MLP}.cu", "r = blockIdx.x * kThreads + ", "r = "),
    "other_bias": (DENSE, EXPAND, "float(bias[n])", "float(bias[m])"),
}
QUANTIZED_MUTANTS = {
    "nibbles_swapped": (DENSE, NUMBERS, "high ? byte >> 4", "!high ? byte >> 4"),
    "nibbles_not_negative": (DENSE, NUMBERS, "^ 8) - 8", "^ 8) - 7"),
    "last_nibbles_as_others": (DENSE, NUMBERS, "i >= kHalf : i % 2", "i >= kHalf : i >= kHalf"),
    "column_of_the_first_scale": (DENSE, ANY, "column >> row.group_bits", "0"),
    "row_of_the_first_scale": (LINEAR, ANY, "row.scale += times * stride.scale, ", ""),
    "numbers_of_one_half": (DENSE, NUMBERS, "word : word >> 16", "word : word"),
    "numbers_not_negative": (DENSE, NUMBERS, "(1u << exponent) + (1u", "(1u << exponent) - (1u"),
    "blocks_in_plain_order": (LINEAR, NUMBERS, "column % 4 * 2 + column / kHalf", "column % 8"),
    "packet_of_the_first_scale": (DENSE, NUMBERS, "(row.column >> row.group_bits)", "0"),
    "packet_of_another_row": (LINEAR, NUMBERS, "row.scale += wide_product_of(times, stride.scale);", ""),
    "sums_without_a_scale": (LINEAR, NUMBERS, "factor = z * scale()", "factor = z"),
    "products_without_a_scale": (DENSE, NUMBERS, "sum += scale() * (", "sum += ("),
    "pairs_of_one_word": (DENSE, NUMBERS, "words[2 * i % kColumns / 4]", "words[0]"),
    "pairs_of_one_half": (DENSE, NUMBERS, "bytes >> 2 * i / kColumns * 4", "bytes"),
    "pairs_not_negative": (DENSE, NUMBERS, ", (kLarge | kSign) ^", ", kLarge ^"),
    "inputs_of_a_packet": (DENSE, PACKETS, "of_pair + c)", "of_pair)"),
    "inputs_of_every_packet": (DENSE, PACKETS, "group() % 4 == member() && ", ""),
    "scales_of_one_packet": (DENSE, PACKETS, "member() % 2 * 2 + i;", "i;"),
    "scales_of_one_row": (DENSE, PACKETS, "scales.of[i / 2][i % 2]", "scales.of[0][i % 2]"),
    "half_of_a_sum": (DENSE, PACKETS, " + __shfl_xor_sync(kAllLanes, sums[pair][i], 1)", ""),
    "a_part_of_the_packet": (DENSE, PACKETS, "pair<Operand>(i / 2)", "pair<Operand>(i / 2 % 4)"),
    "no_second_pair": (DENSE, PACKETS, "pair > 0 && 2 * pair >= x.count", "pair > 0"),
    "gate_in_tiles_of_its_own": (MLP, f"{MLP}.cu", "of_gate.width = of_up.width", "of_gate.width = 1"),
    "slices_begin_too_early": (LINEAR, SLICES, f"{SYNC}  // all reads of what was in", "// in"),
    "slices_summed_too_early": (LINEAR, SLICES, f"{SYNC}  // all reads of what was there", "// there"),
    "slices_summed_too_late": (LINEAR, SLICES, f"{SYNC}\n      static_assert", "static_assert"),
    "slices_of_some_tokens": (
        LINEAR,
        SLICES,
        "__reduce_or_sync(kAllLanes, wanted << 2 * member())",
        "(wanted << 2 * member())",
    ),
    "slices_of_before": (LINEAR, SLICES, "z, ahead + S::kAhead * kSliceStep", "z, ahead"),
    "slices_of_one_eight": (LINEAR, SLICES, "m = 8 * eight + group()", "m = group()"),
    "slices_of_one_scale": (LINEAR, SLICES, "scales[row_of(i)]", "scales[row_of(0)]"),
    "slices_of_one_part": (LINEAR, SLICES, "part < 2", "part < 1"),
    "slices_of_one_packet": (LINEAR, SLICES, "numbers[2 * pair + lane()", "numbers[lane()"),
    "lines_swapped": (LINEAR, SLICES, "numbers(words[i / 2], 2 * s + i % 2)", "numbers(words[i / 2], 2 * s)"),
    "lines_in_plain_order": (LINEAR, SLICES, "2 * group() + set + line", "2 * group() + 1 - set + line"),
    "rows_of_a_pair_swapped": (LINEAR, SLICES, "<8>(word, i), whole", "<8>(word, i + 2), whole"),
}


@pytest.mark.parametrize("dtype", build.ONE_DTYPE, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "cases, weights", [(CHECKED, build.FLOATS), (QUANTIZED, build.ANY_WIDTH)], ids=("floats", "few bits")
)
def test_the_kernels_pass_what_mutants_are_held_against(op, dtype, cases, weights, tmp_path, shared):
    assert survives(tmp_path, shared, op, dtype, cases, weights), (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found_out(name, tmp_path, shared):
    op, *mutation = MUTANTS[name]
    by_products = mutation[0] in (MMA, PROJECT_MMA) or name in ("parts_in_one_place", "parts_of_one_row")
    dtype = torch.bfloat16 if by_products else torch.float32  # whose kernels contain the mutation
    found = not survives(tmp_path, shared, op, dtype, CHECKED, build.FLOATS, tuple(mutation))
    assert found, f"{name} passes every check"


@pytest.mark.parametrize("name", QUANTIZED_MUTANTS)
def test_a_mutant_is_found_out_in_few_bits(name, tmp_path, shared):
    op, *mutation = QUANTIZED_MUTANTS[name]
    # threads multiply an x in float32, and only its errors show what the second part of z adds
    dtype = torch.float32 if name in ("products_without_a_scale", "slices_of_one_part") else torch.bfloat16
    found = not survives(tmp_path, shared, op, dtype, QUANTIZED, build.ANY_WIDTH, tuple(mutation))
    assert found, f"{name} passes every check"
