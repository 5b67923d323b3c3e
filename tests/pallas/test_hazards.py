"""What would hang or be wrong on a GPU, though interpreter and compiler take it, read from the code for sm_90a."""

import re

import pytest
from test_aot import compile_fp8
from test_aot_swapped import compile_swapped

from fp8x.pallas import aot
from fp8x.pallas.sm90_grouped_fp8 import Tiling
from fp8x.pallas.swapped_tiling import Tiling as SwappedTiling

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
WGMMA = re.compile(r"[HQ]GMMA\.64x(\d+)x\S+ R(\d+), (R(\d+)|gdesc)")


@pytest.mark.sample
@needs_compiler
@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(lambda: compile_fp8(Tiling(128, 256, cluster=2), scales="blocks"), id="fp8"),
        pytest.param(lambda: compile_swapped("w8a16 blocks", SwappedTiling(64, 256)), id="w8a16 blocks"),
        pytest.param(lambda: compile_swapped("w8a16", SwappedTiling(8, 128)), id="w8a16"),
        pytest.param(lambda: compile_swapped("mx", SwappedTiling(192, 128)), id="mx", marks=pytest.mark.slow),
    ],
)
def test_code(compiled):
    report = compiled()
    # A warpgroup waits for ever for registers that its block was not launched with.
    memory, compute = (int(n, 16) for n in re.findall(r"USETMAXREG.*?(0x\w+)", report.sass))
    assert memory + 2 * compute <= 3 * report.registers
    assert touched_in_flight(report.sass) == []


def touched_in_flight(sass: str) -> list[str]:
    """Instructions that write what a wgmma may still read or add to, or read what it adds to.

    Nothing in the hardware keeps them from it: PTX leaves that to wgmma.wait_group. Every loop is gone through twice,
    so that the second time meets what the first has left in flight.
    """
    lines = [line.strip() for line in sass.splitlines() if re.match(r"\.L_x_\d+:|\s+/\*[0-9a-f]{4,}\*/", line)]
    places = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_x")}
    loops = [(places[to[1]], i + 1) for i, line in enumerate(lines) if (to := re.search(r"BRA `\((\.L_x_\d+)\)", line))]
    found = []
    for start, end in [(0, len(lines)), *(loop for loop in loops if loop[0] < loop[1])]:
        groups, group = [], []
        for line in 2 * lines[start:end]:
            if match := WGMMA.search(line):
                sums = range(int(match[2]), int(match[2]) + int(match[1]) // 2)
                group.append((set(sums), set(range(int(match[4]), int(match[4]) + 4)) if match[4] else set()))
                if "gsb0" in line:
                    groups, group = [*groups, group], []
            elif match := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", line):
                groups = groups[len(groups) - min(int(match[1]), len(groups)) :]
            elif groups or group:
                operands = re.findall(r"(?<!\w)R(\d+)", line)
                in_flight = [product for products in [*groups, group] for product in products]
                to = re.search(r"\*/\s+(?:@!?P\d\s+)?(\S+)\s+R(\d+)", line)
                width = 4 if to and ".128" in to[1] else 2 if to and re.search(r"\.(64|WIDE)", to[1]) else 1
                writes = set(range(int(to[2]), int(to[2]) + width)) if to else set()
                if any(writes & (sums | a) or {int(n) for n in operands} & sums for sums, a in in_flight):
                    found.append(line)
    return found


def test_what_touches_registers_in_flight_is_found():
    loop = """
.L_x_1:
        /*0010*/                   LDS.U16 R91, [R18+0x408] ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R56, R88, gdesc[UR8], R56, gsb0 ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   FADD R1, R56, R24 ;
"""
    assert touched_in_flight(loop) == [line.strip() for line in loop.splitlines() if "R91" in line]
    assert any("FADD" in line for line in touched_in_flight(loop.replace("gsb0, 0x0", "gsb0, 0x1")))
    assert touched_in_flight(loop.replace("R91", "R92")) == []
