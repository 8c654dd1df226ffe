"""What the attention kernels cost on an Apple GPU: operations counted on the simulator, times published throughputs.

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


# With more registers a core holds 12 simdgroups, one threadgroup of eight; an FMA then takes 1.6 cycles of a scheduler
# instead of 1 (metal-benchmarks, eight simdgroups, four independent operations).
FULL_OCCUPANCY_REGISTERS, FEW_SIMDGROUPS = 104, 1.6


def occupied(registers: int) -> float:
    """Cycles of a scheduler for an instruction of a kernel that needs so many registers."""
    return FEW_SIMDGROUPS if registers > FULL_OCCUPANCY_REGISTERS else 1.0


def split_cycles(counted: Counted, loop: Loop, registers: int, memory: int, *, n_tokens: int, outside: int) -> float:
    """Core cycles per KV head of one threadgroup of the split kernel: its loop, loads and stores issued, what is around it.

    Args:
        counted: as for `core_cycles`. So is ``loop``.
        registers: that a lane needs.
        memory: loads and stores in the loop, which takes 32 tokens at a time.
        n_tokens: coded ones.
        outside: instructions that are not in the loop: rotation, exact tokens, joining. Each of eight simdgroups passes once.
    """
    per_token = core_cycles(counted, loop) + memory / LANES_PER_CYCLE
    return occupied(registers) * (per_token * n_tokens + outside * 8 / 4)


PRODUCT, SCHEDULERS = 17, 4  # cycles of a scheduler for a product of 8x8 matrices; schedulers of a core


def _turns(simdgroups: int) -> float:
    """Simdgroups of a threadgroup that one scheduler runs, when two threadgroups share a core."""
    return -(-2 * simdgroups // SCHEDULERS) / 2


def matrix_cycles(n_rows: int, dims: int, n_coded: int, n_exact: int, row_blocks: int, groups: int, slower: float = 1) -> float:
    """Core cycles per KV head of the matrix kernel.

    Args:
        n_rows: query rows of the KV head.
        dims: of a key and a value together.
        n_coded: coded tokens. ``n_exact``: exact ones.
        row_blocks: simdgroups that share a tile. ``groups``: of them in a threadgroup.
        slower: cycles of an instruction that is no product (`occupied`).
    """
    # A tile of 32 tokens: dims / 8 * 32 / 8 products for 8 rows, each with an operand to decode, and the softmax of its scores.
    tile = dims * 4 / 8 * (PRODUCT + 6.5 * slower) + 110 * slower
    blocks = -(-n_rows // (8 * row_blocks))
    return blocks * _turns(row_blocks * groups) / groups * tile * n_coded / 32 + slower * 27 / 256 * n_rows * dims * n_exact / 4


def prompt_cycles(n_rows: int, dims: int, split: int, n_coded: int, n_exact: int, block_rows: int) -> float:
    """Core cycles per KV head of the prompt kernel with blocks of `block_rows`; `split` simdgroups share 8 rows."""
    full, rest = divmod(n_rows, block_rows)
    simdgroups = [block_rows // 8 * split] * full + [-(-rest // 8) * split] * (rest > 0)
    multiplied = dims * 4 / 8 / split * (PRODUCT + 4) + 110
    staged = (2.5 * n_coded + 8 * n_exact) / 32 * dims / SCHEDULERS
    return sum(_turns(n) * multiplied * (n_coded + n_exact) / 32 + staged for n in simdgroups)
