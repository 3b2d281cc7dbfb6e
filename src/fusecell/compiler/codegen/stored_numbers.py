"""Numbers of other formats than a kernel's own: how weights are stored, and the dot products of bytes and of pairs."""

from __future__ import annotations

from fusecell.compiler.backend.isa import ByteDot
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value, typed
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.storage import Storage

__all__ = [
    "as_numbers",
    "as_pairs",
    "dot_bytes",
    "dot_pairs",
    "first_of_dots",
    "half_word",
    "load_bytes",
    "load_stored",
    "load_words",
    "narrow",
    "store_byte",
    "store_half_word",
    "store_narrow",
    "store_pairs",
    "store_stored",
]


def load_stored(f: Function, pointer: Value, stored: Storage, name: str) -> Value:
    """Load 16 weights that are stored in another format, as float32 numbers."""
    kind = "half" if stored is Storage.F16 else "i8"
    align = LANES * stored.itemsize
    loaded = f.let(f"{name}.stored", f"load <{LANES} x {kind}>, ptr {pointer}, align {align}", f"<{LANES} x {kind}>")
    if stored is Storage.F16:
        return f.let(name, f"fpext <{LANES} x half> {loaded} to {f.module.vector}", f.module.vector)
    whole = f.let(f"{name}.whole", f"sext <{LANES} x i8> {loaded} to <{LANES} x i32>")
    return f.let(name, f"sitofp <{LANES} x i32> {whole} to {f.module.vector}", f.module.vector)


def store_stored(f: Function, value: Value, pointer: Value, stored: Storage) -> None:
    """Store 16 numbers in a format that has them exactly; pairs of bfloat16 are `store_half_word`'s."""
    kind = "half" if stored is Storage.F16 else "i8"
    opcode = "fptrunc" if stored is Storage.F16 else "fptosi"
    packed = f.let("stored", f"{opcode} {typed(value)} to <{LANES} x {kind}>", f"<{LANES} x {kind}>")
    f.store(packed, pointer, LANES * stored.itemsize)


def load_words(f: Function, pointer: Value, name: str) -> Value:
    """Load 16 words of 32 bits."""
    return f.let(name, f"load <{LANES} x i32>, ptr {pointer}, align {LANES * 4}", f"<{LANES} x i32>")


def half_word(f: Function, words: Value, half: int, name: str) -> Value:
    """Return the bfloat16 numbers in the lower or in the upper halves of words, as float32 numbers."""
    kind = words.type
    move = f"and {kind} {words}, splat (i32 -65536)" if half else f"shl {kind} {words}, splat (i32 16)"
    bits = f.let(f"{name}.bits", move, kind)
    return f.let(name, f"bitcast {kind} {bits} to {f.module.vector}", f.module.vector)


def store_half_word(f: Function, value: Value, pointer: Value, half: Integer) -> None:
    """Store 16 numbers that bfloat16 has exactly in the halves of words: 0 the lower, which clears the upper."""
    kind = f"<{LANES} x i32>"
    bits = f.let("bits", f"bitcast {typed(value)} to {kind}", kind)
    low = f.let("low", f"lshr {kind} {bits}, splat (i32 16)", kind)
    there = load_words(f, pointer, "there")
    both = f.let("both", f"or {kind} {there}, {bits}", kind)
    is_upper = f.ne(half, 0, "is_upper")
    words = f.let("words", f"select i1 {is_upper}, {kind} {both}, {kind} {low}", kind)
    f.store(words, pointer, LANES * 4)


def store_byte(f: Function, value: Value, pointer: Value, place: Integer, first: Value) -> None:
    """Store 16 whole numbers as bytes of words; place 0, the lowest, clears the others.

    What `dot_bytes` multiplies has 128 added to it, where its instruction takes unsigned bytes. So 128 times each
    number is taken off the words at ``first``, which a sum begins with.
    """
    kind = f"<{LANES} x i32>"
    whole = f.let("whole", f"fptosi {typed(value)} to {kind}", kind)
    too_much = f.let("too_much", f"shl {kind} {whole}, splat (i32 7)", kind)
    before = load_words(f, first, "before")
    f.store(f.let("start", f"sub {kind} {before}, {too_much}", kind), first, LANES * 4)
    byte = f.let("byte", f"and {kind} {whole}, splat (i32 255)", kind)
    bits = f.let("bits", f"trunc i64 {f.mul(place, 8)} to i32", "i32")
    shifted = f.let("shifted", f"shl {kind} {byte}, {f.splat(bits, 'bits')}", kind)
    there = load_words(f, pointer, "there")
    both = f.let("both", f"or {kind} {there}, {shifted}", kind)
    is_first = f.eq(place, 0, "is_first")
    words = f.let("words", f"select i1 {is_first}, {kind} {shifted}, {kind} {both}", kind)
    f.store(words, pointer, LANES * 4)


def load_bytes(f: Function, pointer: Value, name: str) -> Value:
    """Load four whole numbers from -127 to 127; return them as the bytes of a word, in all 16 lanes.

    Where the instruction of `dot_bytes` takes unsigned bytes, 128 is added to each.
    """
    numbers = f.load(pointer, f"{name}.numbers", f.module.itemsize, 4)
    whole = f.let(f"{name}.whole", f"fptosi {typed(numbers)} to <4 x i32>", "<4 x i32>")
    # What lies behind a row may be no such number: any four bytes do, as its weights are zero.
    defined = f.let(f"{name}.defined", f"freeze <4 x i32> {whole}", "<4 x i32>")
    bytes_ = f.let(f"{name}.bytes", f"trunc <4 x i32> {defined} to <4 x i8>", "<4 x i8>")
    if not _byte_dot(f).signed:
        bytes_ = f.let(f"{name}.unsigned", f"xor <4 x i8> {bytes_}, splat (i8 -128)", "<4 x i8>")
    word = f.let(f"{name}.word", f"bitcast <4 x i8> {bytes_} to i32", "i32")
    return f.splat(word, name)


def first_of_dots(f: Function, corrections: Value) -> Value:
    """Return what sums of `dot_bytes` begin with, given the words that `store_byte` has at ``first``."""
    return Value("zeroinitializer", corrections.type) if _byte_dot(f).signed else corrections


def dot_bytes(f: Function, sums: Value, numbers: Value, weights: Value, name: str) -> Value:
    """Add to each sum of 32 bits the products of the four bytes of a lane of two vectors, by one instruction."""
    dot = _byte_dot(f)
    lanes = dot.bits // 32
    parts = []
    for start in range(0, LANES, lanes):
        part = range(start, start + lanes)
        operands = [
            each if lanes == LANES else f.shuffle(each, None, part, f"{name}.part") for each in (sums, numbers, weights)
        ]
        if not dot.takes_words:
            operands[1:] = [_as(f, each, dot.bytes, f"{name}.bytes") for each in operands[1:]]
        parts.append(f.let(name, f.intrinsic(dot.intrinsic, *operands, result=dot.sums), dot.sums))
    while len(parts) > 1:
        lanes *= 2
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [f.shuffle(one, other, range(lanes), name) for one, other in pairs]
    return parts[0]


def _byte_dot(f: Function) -> ByteDot:
    dot = f.module.target.byte_dot
    assert dot is not None, "panels of bytes are for targets that multiply them"
    return dot


def _as(f: Function, value: Value, kind: str, name: str) -> Value:
    return f.let(name, f"bitcast {typed(value)} to {kind}", kind)


def as_numbers(f: Function, integers: Value, name: str) -> Value:
    """Convert 16 integers of 32 bits."""
    return f.let(name, f"sitofp {typed(integers)} to {f.module.vector}", f.module.vector)


def narrow(f: Function, value: Value, name: str) -> Value:
    """Round 16 numbers to bfloat16, to the nearest, and to even between two."""
    return f.let(name, f"fptrunc {typed(value)} to <{LANES} x bfloat>", f"<{LANES} x bfloat>")


def as_pairs(f: Function, value: Value, name: str) -> Value:
    """Round 32 numbers to bfloat16; return them two by two, as a vector of words that are no float32 numbers."""
    kind = f"<{2 * LANES} x bfloat>"
    return _as(f, f.let("narrow", f"fptrunc {typed(value)} to {kind}", kind), f.module.vector, name)


def store_narrow(f: Function, number: Value, pointer: Value) -> None:
    """Store one number, rounded to bfloat16."""
    f.store(f.let("narrow", f"fptrunc {typed(number)} to bfloat", "bfloat"), pointer, 2)


def store_pairs(f: Function, lower: Value, upper: Value, pointer: Value, lanes: int = LANES) -> None:
    """Store the first numbers of two vectors in the lower and in the upper halves of words, rounded to bfloat16."""
    kind, halves = f"<{LANES} x i32>", []
    for value in (lower, upper):
        bits = _as(f, narrow(f, value, "narrow"), f"<{LANES} x i16>", "bits")
        halves.append(f.let("half", f"zext {typed(bits)} to {kind}", kind))
    upper = f.let("upper", f"shl {kind} {halves[1]}, splat (i32 16)", kind)
    words = f.let("words", f"or {kind} {halves[0]}, {upper}", kind)
    f.store(words if lanes == LANES else f.shuffle(words, None, range(lanes), "words"), pointer, lanes * 4)


def dot_pairs(f: Function, numbers: Value, weights: Value, sums: Value, name: str) -> Value:
    """Add to each sum the products of the two bfloat16 numbers in a lane of two vectors, by one instruction."""
    dot = f.module.target.pair_dot
    assert dot is not None, "panels of pairs are for targets that multiply them"
    assert dot.sums == f.module.vector
    pairs = [_as(f, each, dot.operand, f"{name}.pairs") for each in (numbers, weights)]
    return f.let(name, f.intrinsic(dot.intrinsic, sums, *pairs, result=dot.sums), dot.sums)
