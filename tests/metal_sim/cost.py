"""What the attention kernels cost on an Apple GPU: operations counted on the simulator, and a compiler's code, times published
throughputs.

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


# --- what a compiler makes of the kernels ------------------------------------------------------------------------------


@dataclass
class Figures:
    """KernelFigures of metal/dispatch_plan.h: instructions of simdgroups that are no product of matrices; see there."""

    registers: int
    tile: int
    staged: int
    exact: int
    exact_staged: int
    around: int
    row: int
    traffic: int


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _exact(score, softmax, add, dim: int, rows: int) -> int:
    """Instructions of attend_exact() for 32 tokens: loops over parts, rows, and dimensions; see the kernel's source."""
    tokens = score.loops[0]  # four at a time
    (a_row,) = tokens.loops
    values = max(loop.instructions for loop in add.innermost())  # four tokens, 32 dimensions
    return 8 * (tokens.instructions + rows * a_row.instructions) + rows * softmax.all() + 8 * dim // 32 * values


def split_figures(compiled, dim: int, rows: int) -> Figures:
    """Of the split kernel for 3-bit Lloyd-Max values, `Compiled` with keys and values of `dim` dimensions."""
    loops = compiled.code.loops
    main = max(loops, key=lambda loop: loop.all())
    (values,) = main.loops
    passes = power_of_two(dim // 32) * (4 if rows > 2 else 2) // 2  # two steps each
    # A threadgroup with coded tokens does not run what attends to exact ones, up to the last barrier before the queries' loop.
    queries = loops[loops.index(main) - 1]
    exact = max(n for n in compiled.code.barriers if n <= queries.before) - loops[0].before
    return Figures(
        registers=compiled.registers,
        tile=main.instructions + passes * values.instructions,
        staged=0,
        exact=_exact(*loops[:3], dim, rows),
        exact_staged=0,
        around=compiled.code.instructions - exact,
        row=queries.all(),
        traffic=main.threadgroup_bytes + passes * values.threadgroup_bytes,
    )


def matrix_figures(compiled, dim: int) -> Figures:
    """Of the matrix kernel: words of keys, of values, of parameters and norms are staged by a loop each."""
    loops = compiled.code.loops
    (main,) = (loop for loop in loops if loop.products)
    keys, values, parameters, norms = main.loops[:4]
    words = dim * 3 // 32
    return Figures(
        registers=compiled.registers,
        tile=main.instructions - main.products,
        staged=words * (keys.instructions + values.instructions) + parameters.instructions + norms.instructions,
        exact=_exact(*loops[0].loops[:3], dim, 8),
        exact_staged=0,
        around=compiled.code.instructions,
        row=loops[loops.index(main) - 1].all(),
        traffic=main.threadgroup_bytes,
    )


def prompt_figures(compiled, dim: int, block_rows: int, staged: int) -> Figures:
    """Of the prompt kernel.

    Args:
        staged: instructions of all simdgroups that decode a tile; they are in the loop. See `prompt_staged`.
    """
    loops = compiled.code.loops
    coded, exact = (loop for loop in loops if loop.products)
    split = 2 if dim > 128 else 1
    simdgroups, tiles = block_rows // 8 * split, split  # tiles of 32 // split tokens
    passes = 32 * dim // (4 * 32 * simdgroups)  # four elements a thread, keys and values
    keys, values = exact.loops[1:3]
    return Figures(
        registers=compiled.registers,
        tile=tiles * (coded.instructions - coded.products) - staged // simdgroups,
        staged=staged,
        exact=tiles * (exact.instructions - exact.products),
        exact_staged=simdgroups * passes * (keys.instructions + values.instructions),
        around=compiled.code.instructions,
        row=sum(loop.all() for loop in loops if not loop.products and loop.all() > 100),
        traffic=tiles * coded.threadgroup_bytes,
    )


def prompt_staged(rows32, rows64) -> int:
    """Instructions that decode a tile of the prompt kernel: four simdgroups have twice the share that eight have."""
    few, many = (next(loop for loop in x.code.loops if loop.products) for x in (rows32, rows64))
    return 8 * (few.instructions - many.instructions)


# --- the plan's model --------------------------------------------------------------------------------------------------

PRODUCT, SCHEDULERS = 17, 4  # cycles of a scheduler for a product of 8x8 matrices; schedulers of a core
# With more registers a core holds 12 simdgroups, one threadgroup of eight; an FMA then takes 1.6 cycles of a scheduler
# instead of 1 (metal-benchmarks, eight simdgroups, four independent operations).
FULL_OCCUPANCY_REGISTERS, FEW_SIMDGROUPS = 104, 1.6
THREADGROUP_BYTES = 128  # a cycle
LAUNCH = 6500  # cycles: 5 us


@dataclass
class Work:
    """What a KV head's share of a call is: rows, tokens, and the threadgroups that share them."""

    n_rows: int
    dims: int  # of a key and a value together
    n_coded: int
    n_exact: int
    threadgroups: int  # over coded tokens; in the prompt kernel over all, for a block of rows
    exact_threadgroups: int  # of their own
    parts: int  # that are joined; 0: one threadgroup writes the result
    n_cores: int  # for one KV head

    def time(self, cycles: float, threadgroups: int) -> float:
        """Cycles for a call: of core cycles shared out to threadgroups, and of joining the parts."""
        joined = LAUNCH + self.n_rows * (288 + 51 * self.parts) / SCHEDULERS / self.n_cores if self.parts else 0.0
        return cycles / min(self.n_cores, max(1, threadgroups)) + joined


def occupied(registers: int) -> float:
    """Cycles of a scheduler for an instruction of a kernel that needs so many registers."""
    return FEW_SIMDGROUPS if registers > FULL_OCCUPANCY_REGISTERS else 1.0


def _turns(simdgroups: int) -> float:
    """Simdgroups of a threadgroup that one scheduler runs, when two threadgroups share a core."""
    return -(-2 * simdgroups // SCHEDULERS) / 2


def split_cycles(f: Figures, rows: int, work: Work) -> float:
    """Cycles of the split kernel for `rows` rows."""
    slower = occupied(f.registers) / SCHEDULERS
    tile = max(slower * f.tile, 32 * f.traffic / THREADGROUP_BYTES)
    start = 8 * f.around + rows * f.row
    cycles = tile * work.n_coded / 32 + slower * (f.exact * work.n_exact / 32 + start * max(work.threadgroups, not work.parts))
    return work.time(cycles, work.threadgroups + work.exact_threadgroups)


def matrix_cycles(f: Figures, row_blocks: int, groups: int, work: Work) -> float:
    """Cycles of the matrix kernel: `groups` of `row_blocks` simdgroups that share a tile."""
    slower, blocks = occupied(f.registers), -(-work.n_rows // (8 * row_blocks))
    # A tile of 32 tokens: dims / 8 * 32 / 8 products for 8 rows.
    tile = work.dims * 4 / 8 * PRODUCT + slower * (f.tile + f.staged / row_blocks)
    tile = max(tile * _turns(row_blocks * groups) / groups, row_blocks * 32 * f.traffic / THREADGROUP_BYTES)
    start = slower / SCHEDULERS * row_blocks * (groups * f.around + 8 * f.row) * work.threadgroups
    exact = slower / SCHEDULERS * f.exact * -(-work.n_rows // 8) * work.n_exact / 32
    cycles = blocks * (tile * work.n_coded / 32 + start) + exact
    return work.time(cycles, blocks * (work.threadgroups + work.exact_threadgroups))


def prompt_cycles(f: Figures, block_rows: int, split: int, work: Work) -> float:
    """Cycles of the prompt kernel with blocks of `block_rows`; `split` simdgroups share 8 rows."""
    full, rest = divmod(work.n_rows, block_rows)
    slower, cycles = occupied(f.registers), 0.0
    for n in [block_rows // 8 * split] * full + [-(-rest // 8) * split] * (rest > 0):
        products = work.dims * 4 / 8 / split * PRODUCT
        coded = _turns(n) * (products + slower * f.tile) + slower * f.staged / SCHEDULERS
        exact = _turns(n) * (products + slower * f.exact) + slower * f.exact_staged / SCHEDULERS
        cycles += max(coded, n * 32 * f.traffic / THREADGROUP_BYTES) * work.n_coded / 32 + exact * work.n_exact / 32
        cycles += work.threadgroups * _turns(block_rows // 8 * split) * slower * (f.around + 8 * f.row)
    return work.time(cycles, -(-work.n_rows // block_rows) * work.threadgroups)
