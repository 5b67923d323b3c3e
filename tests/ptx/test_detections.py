"""What a GPU would do wrong in silence, each in a few lines of PTX, and found."""

import struct

import numpy as np
import pytest

from ptx.launch import Launch, argument_address
from ptx.machine import run
from ptx.program import PtxError

# %rd1 is the array of 256 bytes, %rd2 the map of a tensor of 20 rows of 16 bytes, in boxes of 8 rows; %r1 is shared
# memory, where an mbarrier of one arrival is at 1024. %p1 is true in one thread of a warpgroup.
_BEGIN = """
ld.param.b64 %rd1, [array]; mov.b64 %rd2, map; cvta.param.u64 %rd2, %rd2;
mov.b64 %rd3, __dynamic_shmem__0; cvt.u32.u64 %r1, %rd3; add.s32 %r2, %r1, 1024;
mov.u32 %r3, %tid.x; setp.eq.s32 %p1, %r3, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;
"""
_WAIT = (
    "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared.b64 p, [%r2], 0, 9; @p bra.uni DONE; bra.uni WAIT; DONE: }"
)
_LOAD = (
    "@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd9, [%r2], 128; @%p1 cp.async.bulk.tensor.2d.shared::cluster.global"
    ".mbarrier::complete_tx::bytes [%r1], [%rd2, {0, 16}], [%r2];"
)
# Descriptors of 8 rows of 32 bytes, in the swizzle of 32 bytes; accumulators, and A in registers.
_OPERANDS = """
bfe.u64 %rd4, %rd3, 4, 14; or.b64 %rd4, %rd4, -4611686018427387904;
mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
"""
_FENCE = "wgmma.fence.sync.aligned;"
_MMA = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
    "{%r10,%r11,%r12,%r13}, {%r20,%r21,%r22,%r23}, %rd4, 1, 1, 1, 0; wgmma.commit_group.sync.aligned;"
)
_DONE = "wgmma.wait_group.sync.aligned 0;"


def execute(body: str, *, threads: int = 128, seed: int = 0) -> np.ndarray:
    """The array after a block has run the body, with a kilobyte of shared memory and 168 registers a thread."""
    entry = f"""
.visible .entry kernel(
	.param .u64 .ptr .align 256 array,
	.param .align 64 .b8 map[128]
)
{{ .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<20>;
{_BEGIN} {body} ret; }}"""
    tensor = struct.pack("<Q2I5Q4Q5II", argument_address(1), 0, 2, 16, 20, 0, 0, 0, 16, 0, 0, 0, 16, 8, 0, 0, 0, 0)
    parameters = struct.pack("<Q", argument_address(0)) + tensor.ljust(128, b"\0")
    array, rows = np.zeros(256, np.uint8), np.arange(1, 321, dtype=np.uint16).astype(np.uint8)
    run(Launch(entry, 1, 1, threads, 1032, 168, parameters), [array, rows], seed=seed)
    return array


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.f16x9 %r4, [%rd1];", "type f16x9 is not emulated"),
        ("dp4a.s32.s32 %r4, %r1, %r1, %r1;", r"dp4a\.s32\.s32 \(\?\): not emulated"),
        ("add.s32 %r4, %r5, 1;", "%r5 is read before it is written"),
        ("@%p1 bra.uni $L1; $L1:", "threads of a warpgroup go different ways"),
        # Bounds and alignment.
        ("ld.global.b32 %r4, [%rd1+256];", "byte 259 of array 0, which has 256"),
        ("ld.global.v2.b32 {%r4,%r5}, [%rd1+4];", "global addresses of 8 bytes that it does not divide"),
        ("ld.global.b32 %r4, [%rd3];", "0x400 is in no array of the kernel"),
        ("st.shared.b32 [%r1+1032], %r3;", "shared bytes 2056 to 2059, where there are 1024 to 2055"),
        (
            "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 272;"
            "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;",
            "byte 271 of array 0, which has 256",
        ),
        # Barriers.
        (_WAIT, "deadlock: warpgroup 0 of block 0 waits for parity 0 of the mbarrier at 2048, whose phase 0 lacks 1"),
        (_LOAD.replace("128;", "144;") + _WAIT, "lacks 0 of 1 arrivals and 16 bytes"),
        ("mbarrier.arrive.shared::cta.b64 %rd9, [%r2];", "128 arrivals at an mbarrier where 1 of 1 are still to come"),
        ("@%p1 mbarrier.arrive.expect_tx.shared.b64 %rd9, [%r2], 2000000;", "transactions are 2000000 bytes"),
        ("@%p1 mbarrier.arrive.shared::cta.b64 %rd9, [%r1];", "no mbarrier at shared byte 1024"),
        ("bar.sync 1, 256;", "barrier 1 of 256 threads"),
        # Transfers.
        (_LOAD, "block 0 ends while a transfer to its shared memory is under way"),
        (_LOAD + "ld.shared.b32 %r4, [%r1];", "read by warpgroup 0 while a transfer writes it"),
        ("ld.shared.b32 %r4, [%r1];" + _LOAD + _WAIT, "accessed by threads without a fence.proxy.async"),
        (
            "st.shared.b32 [%r1], %r3; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 16;",
            "stored without a fence.proxy.async",
        ),
        (
            "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 16; st.shared.b32 [%r1], %r3;",
            "written by warpgroup 0 while it is read asynchronously",
        ),
        (
            "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 16;",
            "ends while stores read its block's shared memory",
        ),
        # Registers.
        ("setmaxnreg.inc.sync.aligned.u32 240;", "waits for 72 registers a thread more, of which the block has 0"),
        (_OPERANDS + _MMA, "%r10 was accessed after the last wgmma.fence"),
        (_OPERANDS + _FENCE + _MMA, "ends while wgmma is in flight"),
        (_OPERANDS + _FENCE + _MMA + "mov.b32 %r4, %r11;", "%r11 is read while wgmma accumulates into it"),
        (_OPERANDS + _FENCE + _MMA + "mov.b32 %r22, 1;", "%r22 is written while wgmma reads it"),
        (
            _OPERANDS + "add.s64 %rd4, %rd4, 8;" + _FENCE + _MMA,
            "a matrix at shared byte 1152, within a pattern of the swizzle, without a base offset",
        ),
        (_OPERANDS + _FENCE + _MMA + "st.shared.b32 [%r1], %r3;", "while it is read asynchronously"),
    ],
)
def test_detected(body, message):
    """In one order or another."""
    with pytest.raises(PtxError, match=message):
        for seed in range(8):
            execute(body, seed=seed)


def test_registers_of_three_warpgroups():
    """What Mosaic's kernels ask for: 168 a thread at launch, and 240 for two of three warpgroups afterwards."""
    take = """
mov.b32 %r9, {given}; setp.gt.u32 %p2, %r3, 127; @%p2 bra $TAKE; setmaxnreg.dec.sync.aligned.u32 {given}; ret;
$TAKE: setmaxnreg.inc.sync.aligned.u32 240;"""
    execute(take.format(given=24), threads=384)
    with pytest.raises(PtxError, match="waits for 72 registers a thread more, of which the block has 64"):
        execute(take.format(given=32), threads=384)


def test_two_warpgroups_that_store_the_same_bytes():
    execute("st.global.b8 [%rd1], 1;")
    with pytest.raises(PtxError, match="bytes 0 to 0 of array 0 are stored by two warpgroups"):
        execute("st.global.b8 [%rd1], 1;", threads=256)


def test_a_box_at_the_tensors_end():
    """Four rows, and zeros where there are no more."""
    copy = "ld.shared.b32 %r4, [%r1+60]; ld.shared.b32 %r5, [%r1+64]; st.global.v2.b32 [%rd1], {%r4,%r5};"
    array = execute(_LOAD + _WAIT + copy)
    assert array[:8].tolist() == [61, 62, 63, 64, 0, 0, 0, 0]


def test_a_product():
    """1 + 16 · 1 · 0.5, of a first row in registers and columns that threads have stored."""
    store = "shl.b32 %r4, %r3, 1; add.s32 %r4, %r4, %r1; st.shared.b16 [%r4], 0x3F00; fence.proxy.async.shared::cta;"
    a_and_d = "mov.b32 %r10, 0f3F800000; mov.b32 %r20, 0x3F803F80; mov.b32 %r22, 0x3F803F80;"
    array = execute(store + _OPERANDS + a_and_d + _FENCE + _MMA + _DONE + "@%p1 st.global.v2.b32 [%rd1], {%r10, %r12};")
    assert array[:8].view(np.float32).tolist() == [9, 0]
