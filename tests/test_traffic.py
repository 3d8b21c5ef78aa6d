"""Bytes that a compiled program moves, from its HLO text."""

import jax
import jax.numpy as jnp
import pytest

from instaflow_jax.infra import traffic

HEAD = """HloModule program, is_scheduled=true

FileNames
1 "/site-packages/jax/_src/lax.py"
2 "/home/instaflow_jax/kernels/attention.py"
3 "/home/instaflow_jax/models/unet.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=1 parent_frame_id=2}

"""
COMPUTATIONS = """%sliced (p0: f32[100,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[100,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %row = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,256}
}

%updated (p0: f32[100,256], p1: f32[1,256], p2: s32[]) -> f32[100,256] {
  %p0 = f32[100,256]{1,0} parameter(0)
  %p1 = f32[1,256]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %new = f32[100,256]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%body (state: (s32[], f32[256])) -> (s32[], f32[256]) {
  %state = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[256]{0} get-tuple-element(%state), index=1
  %next = f32[256]{0} negate(%x)
  ROOT %out = (s32[], f32[256]{0}) tuple(%i, %next)
}

%condition (state: (s32[], f32[256])) -> pred[] {
  %state = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] LIMIT
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%small (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  ROOT %same = f32[256]{0} copy(%p)
}

%large (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %half = f32[256]{0} copy(%p)
  ROOT %whole = f32[256]{0} copy(%half)
}
"""


def program(*lines, limit="constant(5)"):
    """An entry computation of these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}{COMPUTATIONS.replace('LIMIT', limit)}\nENTRY %main (x: f32[256]) -> f32[256] {{\n{body}\n}}\n"


X = "%x = f32[256]{0} parameter(0)"
TABLE = "%table = f32[100,256]{1,0} parameter(0)"


@pytest.mark.parametrize(
    "size, lines",
    [
        (2048, [X, "ROOT %y = f32[256]{0} negate(%x)"]),
        (0, [X, "ROOT %y = f32[256]{0} bitcast(%x)"]),
        (1024, [X, "ROOT %y = f32[256]{0:T(256)S(1)} negate(%x)"]),  # the result stays on the chip
        (3 * 1024, [X, "ROOT %y = f32[256]{0} add(%x, /*index=1*/%x), metadata={op_name=\"f(x)\"}"]),
        # Tiles fill 40 columns up to 128, and 5 rows up to 8.
        (2 * 8 * 128 * 2, ["%x = bf16[5,40]{1,0:T(8,128)(2,1)} parameter(0)",
                           "ROOT %y = bf16[5,40]{1,0:T(8,128)(2,1)} negate(%x)"]),
        # One row of the table is read and written, or written in its place.
        (2048 + 4, [TABLE, "%i = s32[] parameter(1)",
                    "ROOT %y = f32[1,256]{1,0} fusion(%table, %i), kind=kLoop, calls=%sliced"]),
        (2048 + 4, [TABLE, "%row = f32[1,256]{1,0} parameter(1)", "%i = s32[] parameter(2)",
                    "ROOT %y = f32[100,256]{1,0} fusion(%table, %row, %i), kind=kLoop, calls=%updated"]),
        (2 * 1024, [TABLE, "%i = s32[] parameter(1)", "ROOT %y = f32[1,256]{1,0} dynamic-slice(%table, %i, %i)"]),
        (2048, [X, "%begun = (f32[256]{0}, f32[256]{0}, u32[]) copy-start(%x)",
                "ROOT %y = f32[256]{0} copy-done(%begun)"]),
        # Of a library's call its workspace is not counted.
        (2048, [X, "ROOT %y = (f32[256]{0}, s8[4096]{0}) custom-call(%x), custom_call_target=\"gemm\""]),
        (2 * 2048, [X, "%c = s32[] parameter(1)",
                    "ROOT %y = f32[256]{0} conditional(%c, %x, %x), branch_computations={%small, %large}"]),
    ],
)  # fmt: skip
def test_an_instruction_moves_what_it_reads_and_writes(size, lines):
    assert traffic.read(program(*lines)).total() == pytest.approx(size, abs=4)


LOOP = [
    "%s = (s32[], f32[256]{0}) parameter(0)",
    "ROOT %y = (s32[], f32[256]{0}) while(%s), condition=%condition, body=%body",
]


def test_a_loop_counts_as_often_as_it_runs():
    assert traffic.read(program(*LOOP)).total() == 5 * 2048
    known = LOOP[1] + ', backend_config={"known_trip_count":{"n":"7"}}'
    assert traffic.read(program(LOOP[0], known)).total() == 7 * 2048
    with pytest.raises(ValueError, match="unknown trip count"):
        traffic.read(program(*LOOP, limit="parameter(1)"))


@pytest.mark.parametrize("frame, part", [(1, "models/unet"), (2, "kernels/attention"), (3, "kernels/attention")])
def test_bytes_belong_to_the_innermost_file_of_the_package(frame, part):
    line = f"ROOT %y = f32[256]{{0}} negate(%x), metadata={{stack_frame_id={frame}}}"
    assert traffic.read(program(X, line)) == {part: 2048}
    assert traffic.read(program(X, line), compiled_in="models/unet") == {part.replace("models/unet", "other"): 2048}
    assert traffic.read(program(X, line.split(", metadata")[0])) == {traffic.OTHER: 2048}


def test_a_compiled_scan_is_read():
    def scanned(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x) @ x, None), x, length=10)[0]

    size = 64 * 64 * 4
    text = jax.jit(scanned).trace(jnp.ones((64, 64))).lower().compile().as_text()
    assert 10 * 5 * size <= traffic.read(text).total() < 10 * 9 * size  # sin: 2, the product: 3, and copies
