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

    Args are the kernel's: K and V dimensions, 3-bit keys, R rows; values in 2-bit groups or 3-bit Lloyd-Max levels.
    """

    dim: int
    rows: int
    lloyd: bool = False
    means: bool = False

    def __post_init__(self):
        units, words = self.dim // 32, self.dim // 16
        self.units, self.key_lanes = units, 2 * units
        if self.lloyd:
            self.value_lanes = units * (4 if self.rows > 2 else 2)
        else:
            self.value_lanes = words * (2 if self.rows > 2 else 1)
        self.codes = 16 * words // self.value_lanes  # value codes of a lane, groups
        self.groups = max(1, units * words // self.value_lanes)

    @property
    def integer(self) -> int:
        # A byte of each of a unit's three words is four table addresses, of which one costs six operations (the spare bits).
        byte = 3 + 6
        keys = self.key_lanes * (2 + 2 * byte)  # a step: two comparisons
        reduction = self.rows * (self.key_lanes - 1) * 2  # two selects per shuffle
        scores = self.rows * 3
        if self.lloyd:
            values = self.value_lanes * (2 + 4 * self.units // self.value_lanes * byte)
        else:
            values = self.value_lanes * (2 + self.codes)  # an AND per code
        # Half of a block's: a comparison and two additions per number of the mean, two selects per shuffle of the rows.
        means = (3 * self.units + 2 * (self.rows - 1) + 4) / 2 if self.means else 0
        return keys + reduction + scores + 12 + values + means

    @property
    def floating(self) -> int:
        """Additions, multiplications and comparisons that are no FMA."""
        # Scales of the groups into the weights as values are read, norms as the weights are made.
        scaled = self.rows if self.lloyd else self.value_lanes * self.groups * self.rows
        means = (self.rows + 5) / 2 if self.means else 0
        return self.rows * (self.key_lanes - 1) + 3 * self.rows + scaled + means

    @property
    def shifts(self) -> int:
        if self.lloyd:
            return 0
        return self.value_lanes * (1 if self.rows > 2 else 2)  # one per sixteen bits of codes


def core_cycles(counted: Counted, loop: Loop) -> float:
    """Core cycles per token and KV head."""
    slow = counted.exp2 + loop.shifts
    issued = counted.fma + loop.integer + loop.floating + slow + counted.shuffles * SHUFFLE + 1  # the vote on a new maximum
    return max(issued, slow * SLOW) / LANES_PER_CYCLE
