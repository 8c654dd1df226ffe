"""What the split kernel costs on an Apple GPU: operations counted on the simulator, times published throughputs.

Throughputs in cycles per simdgroup instruction and scheduler, from philipturner/metal-benchmarks (M1, M2): FMA, add, AND,
select, add with a shift by 1 to 4: 1; shuffle with one mask for all lanes: 2.04. Other shifts, conversions and exp2 take one
cycle to issue and four of a unit of their own. A core has four schedulers of 32 lanes. Nothing here is measured.
"""

from dataclasses import dataclass

SHUFFLE, SLOW, LANES_PER_CYCLE = 2.04, 4.0, 128


@dataclass
class Counted:
    """Per token and KV head, summed over the lanes of a simdgroup; from the simulator."""

    fma: float
    exp2: float
    shuffles: float
    threadgroup_bytes: float


@dataclass
class Loop:
    """Operations of the split kernel's loop that the simulator does not count, by the source, for one lane and 32 tokens.

    Args are the kernel's: K and V dimensions, 3-bit keys, 2-bit values, R rows.
    """

    dim: int
    rows: int

    def __post_init__(self):
        units, words = self.dim // 32, self.dim // 16
        self.key_lanes, self.value_lanes = 2 * units, words * (2 if self.rows > 2 else 1)
        self.codes = 16 * words // self.value_lanes  # value codes of a lane
        self.groups = max(1, units * words // self.value_lanes)

    @property
    def integer(self) -> int:
        # A step over keys: two comparisons, eight table addresses, of which two cost five operations (the spare bits).
        keys = self.key_lanes * (2 + 6 + 2 * 6)
        reduction = self.rows * (self.key_lanes - 1) * 2  # two selects per shuffle
        scores = self.rows * 3
        values = self.value_lanes * (2 + self.codes)  # an AND per code
        return keys + reduction + scores + 12 + values

    @property
    def floating(self) -> int:
        """Additions, multiplications and comparisons that are no FMA."""
        return self.rows * (self.key_lanes - 1) + 3 * self.rows + self.value_lanes * self.groups * self.rows

    @property
    def shifts(self) -> int:
        return self.value_lanes * (1 if self.rows > 2 else 2)  # one per sixteen bits of codes


def core_cycles(counted: Counted, loop: Loop) -> float:
    """Core cycles per token and KV head."""
    slow = counted.exp2 + loop.shifts
    issued = counted.fma + loop.integer + loop.floating + slow + counted.shuffles * SHUFFLE + 1  # the vote on a new maximum
    return max(issued, slow * SLOW) / LANES_PER_CYCLE
