import pytest

from fusecell.compiler.backend import llvm, target
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.target import host_target

LEVELS = instruction_set("x86_64-unknown-linux-gnu").levels
NEHALEM = frozenset(LEVELS["x86-64-v2"])
HASWELL = NEHALEM | set(LEVELS["x86-64-v3"])
SKYLAKE = HASWELL | set(LEVELS["x86-64-v4"])


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that makes llvm.host() report another CPU."""

    def believe(cpu, features, triple="x86_64-unknown-linux-gnu", choice=""):
        text = ",".join(f"+{feature}" for feature in sorted(features))
        monkeypatch.setattr(llvm, "host", lambda: llvm.Host(cpu, frozenset(features), text, triple))
        monkeypatch.setenv("FUSECELL_TARGET", choice)
        target._target_named.cache_clear()
        return host_target

    yield believe
    target._target_named.cache_clear()


@pytest.mark.parametrize(
    ("cpu", "features", "triple", "expected"),
    [
        ("nehalem", NEHALEM, "x86_64-unknown-linux-gnu", (128, False, 16)),
        ("haswell", HASWELL, "x86_64-unknown-linux-gnu", (256, True, 16)),
        ("skylake-avx512", SKYLAKE, "x86_64-unknown-linux-gnu", (512, True, 32)),
        ("knl", HASWELL | {"avx512f"}, "x86_64-unknown-linux-gnu", (256, True, 16)),
        ("apple-m1", {"neon"}, "arm64-apple-darwin23", (128, True, 32)),
        ("neoverse-n1", {"neon"}, "aarch64-unknown-linux-gnu", (128, True, 32)),
    ],
)
def test_native_describes_the_cpu(pretend, cpu, features, triple, expected):
    target = pretend(cpu, features, triple)()
    assert (target.vector_bits, target.fma, target.registers) == expected
    assert (target.cpu, target.triple, target.name) == (cpu, triple, f"host {cpu}")
    assert target.features.count("+") == len(features)


@pytest.mark.parametrize(
    ("level", "expected"),
    [("x86-64-v2", (128, False, 16)), ("x86-64-v3", (256, True, 16)), ("x86-64-v4", (512, True, 32))],
)
def test_levels(pretend, level, expected):
    target = pretend("znver5", SKYLAKE | {"avx512bf16"}, choice=level)()
    assert (target.vector_bits, target.fma, target.registers) == expected
    assert target.cpu == target.name == level
    assert "bf16" not in target.features


def test_the_variable_is_read_at_every_call(pretend, monkeypatch):
    ask = pretend("znver5", SKYLAKE, choice="x86-64-v3")
    assert ask().vector_bits == 256
    assert ask() is ask()
    monkeypatch.setenv("FUSECELL_TARGET", "x86-64-v4")
    assert ask().vector_bits == 512
    monkeypatch.delenv("FUSECELL_TARGET")
    assert ask().name == "host znver5"


def test_an_unknown_target_names_the_choices(pretend):
    ask = pretend("znver5", SKYLAKE, choice="avx512")
    with pytest.raises(
        ValueError, match=r"'avx512', but .* has no such level; expected one of native, x86-64-v2, x86-64-v3, x86-64-v4"
    ):
        ask()


def test_a_level_above_the_cpu_says_what_is_missing(pretend):
    ask = pretend("haswell", HASWELL, choice="x86-64-v4")
    with pytest.raises(ValueError, match=r"lacks avx512f, .*; here it can be native or x86-64-v2 or x86-64-v3"):
        ask()


def test_an_x86_level_on_arm_is_an_error(pretend):
    ask = pretend("apple-m1", {"neon"}, "arm64-apple-darwin23", choice="x86-64-v3")
    with pytest.raises(ValueError, match=r"apple-m1, arm64.* has no such level; expected one of native\."):
        ask()


def test_this_machine_has_a_target(monkeypatch):
    monkeypatch.delenv("FUSECELL_TARGET", raising=False)
    target = host_target()
    assert target.cpu
    assert target.vector_bits in (128, 256, 512)
