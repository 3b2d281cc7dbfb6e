"""Machine code in stream files: the bits of code that is compiled, and no way to anything but the code itself."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.host_features import host_machine
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.object_image import image_of_object
from fusecell.compiler.runtime.mapped_code import MappedCode
from fusecell.errors import CompilerError, StreamFileError
from fusecell.streaming import machine_code
from fusecell.streaming.file import digest
from fusecell.streaming.machine_code import _MappedKernel, compile_code
from tests.paths import ROOT

HAS_AVX2 = llvm.host().features.issuperset(instruction_set("x86_64").features_of("x86-64-v3"))
pytestmark = pytest.mark.skipif(
    host_machine() != "linux-x86_64" or not HAS_AVX2, reason="machine code in files is for Linux on x86-64 with AVX2"
)


def layers():
    torch.manual_seed(0)
    yield "gru", fc.GRU(5, 9, 2)
    yield "mixed", fc.Sequential(fc.GRU(3, 7), fc.Recurrent(fc.cells.LayerNormGRUCell(7, 11)), nn.Linear(11, 2))
    yield "float64", fc.LSTM(7, 13).double()
    yield "heads", fc.Recurrent(fc.cells.MLSTMCell(6, 12))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "it"
    stream = fc.Stream(dict(layers())["mixed"])
    stream.save(path, code_for=["host"])
    return path


@pytest.mark.parametrize("name", ["gru", "mixed", "float64", "heads"])
def test_code_of_a_file_gives_the_bits_of_code_compiled_here(tmp_path, name):
    stream = fc.Stream(dict(layers())[name], 3)
    stream.save(tmp_path / "it", code_for=["x86-64-v3", "host"])
    loaded = fc.load_stream(tmp_path / "it", 3, trusted=True)
    assert all(isinstance(part.kernel, _MappedKernel) for part in loaded.parts)
    x = np.random.default_rng(1).standard_normal((71, 3, stream.input_size)).astype(stream.dtype)
    assert np.array_equal(loaded.push(x), stream.push(x))
    some = np.array([True, False, True])
    for step in x[:7]:
        assert np.array_equal(loaded.step(step), stream.step(step))
        assert np.array_equal(loaded.step(step, rows=some), stream.step(step, rows=some))
    for mine, other in zip(loaded.state, stream.state, strict=True):
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8", "int8-dynamic"])
def test_code_for_small_weights(tmp_path, weights):
    stream = fc.Stream(fc.GRU(17, 33), weights=weights)
    stream.save(tmp_path / "it", code_for=["host"])
    x = np.random.default_rng(1).standard_normal((9, 17)).astype(np.float32)
    assert np.array_equal(fc.load_stream(tmp_path / "it", trusted=True).push(x), stream.push(x))


@pytest.mark.parametrize(("level", "feature"), [("x86-64-v4-vnni", "avx512vnni"), ("x86-64-v3-vnni", "avxvnni")])
def test_code_that_multiplies_bytes(tmp_path, level, feature):
    """Its sums are float32's, so a CPU without the instruction has the same bits, by the code beside it."""
    stream = fc.Stream(fc.GRU(17, 33), weights="int8-dynamic")
    stream.save(tmp_path / "it", code_for=["x86-64-v3", level])
    with safe_open(tmp_path / "it", framework="np") as file:
        codes = json.loads(file.metadata()["code"])
    assert [code["target"] for code in codes] == ["x86-64-v3", level]
    assert feature in codes[1]["features"]
    assert feature not in codes[0]["features"]
    x = np.random.default_rng(1).standard_normal((9, 17)).astype(np.float32)
    assert np.array_equal(fc.load_stream(tmp_path / "it", trusted=True).push(x), stream.push(x))


def test_the_host_needs_byte_products_for_bytes_alone():
    (graph,) = (part.graph for part in fc.Stream(fc.GRU(3, 4)).parts)
    (small,) = (part.graph for part in fc.Stream(fc.GRU(3, 4), weights="int8-dynamic").parts)
    plain, multiplying = (json.loads(compile_code([each], ["host"])[0])[0]["target"] for each in (graph, small))
    assert not plain.endswith("-vnni")
    has = llvm.host().features
    assert multiplying.endswith("-vnni") == ("avx512vnni" in has if plain == "x86-64-v4" else "avxvnni" in has)


def test_a_stream_with_code_of_a_file_is_saved_and_exported(saved, tmp_path):
    loaded = fc.load_stream(saved, trusted=True)
    loaded.save(tmp_path / "again", code_for=["host"])
    x = np.random.default_rng(1).standard_normal((9, 3)).astype(np.float32)
    assert np.array_equal(fc.load_stream(tmp_path / "again", trusted=True).push(x), loaded.push(x))
    fc.export(loaded, tmp_path / "it.o")


_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
for name in ("torch", "fusecell", "llvmlite", "safetensors"):
    sys.modules[name] = None  # an import of it is a ModuleNotFoundError
import numpy as np, fusecell_runtime as fc
x = np.load(sys.argv[3])
for arguments, expected in (({}, "trusted=True isn't given"), ({"trusted": True}, None)):
    try:
        y = fc.load_stream(sys.argv[2], **arguments).push(x)
    except ModuleNotFoundError as error:
        assert expected in str(error) and "pip install llvmlite" in str(error)
    else:
        assert expected is None
np.save(sys.argv[4], y)
try:
    fc.load_stream(sys.argv[2], trusted=True).save(sys.argv[4])
except ModuleNotFoundError as error:
    assert "pip install safetensors" in str(error)
else:
    raise AssertionError("a stream was saved without safetensors")
"""


@pytest.fixture
def site(tmp_path):
    """A folder with the package fusecell_runtime."""
    spec = importlib.util.spec_from_file_location("package_files", ROOT / "packaging" / "runtime" / "package_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(tmp_path / "site" / module.PACKAGE)
    return tmp_path / "site"


def test_numpy_alone_runs_code_of_a_file(saved, site, tmp_path):
    x = np.random.default_rng(1).standard_normal((9, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", _ALONE, site, saved, tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    assert np.array_equal(np.load(tmp_path / "y.npy"), fc.load_stream(saved).push(x))


def test_code_of_a_file_is_not_touched_unless_it_is_trusted(saved, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("code was mapped or read")

    monkeypatch.setattr(machine_code, "MappedCode", refuse)
    monkeypatch.setattr(machine_code, "read_code", refuse)
    stream = fc.load_stream(saved)
    assert not any(isinstance(part.kernel, _MappedKernel) for part in stream.parts)


def test_code_for_another_cpu_is_compiled_anew(saved, monkeypatch):
    monkeypatch.setattr(machine_code, "host_level_features", lambda wanted: wanted - {"fma"})
    stream = fc.load_stream(saved, trusted=True)
    assert not any(isinstance(part.kernel, _MappedKernel) for part in stream.parts)


def test_the_chosen_level_bounds_the_code(tmp_path, monkeypatch):
    fc.Stream(fc.GRU(3, 4)).save(tmp_path / "it", code_for=["x86-64-v4"])
    monkeypatch.setenv("FUSECELL_TARGET", "x86-64-v3")
    (part,) = fc.load_stream(tmp_path / "it", trusted=True).parts
    assert not isinstance(part.kernel, _MappedKernel)


@pytest.mark.parametrize(
    "about", [{"machine": "plan9-mips"}, {"convention": 99}, {"features": ["avx10.2"]}, {"machine": "linux-aarch64"}]
)
def test_code_that_this_version_does_not_know_is_compiled_anew(saved, tmp_path, about):
    path = crafted(saved, tmp_path / "it", lambda code, tensors: code[0].update(about, steps=[1, {}, None]))
    assert not any(isinstance(part.kernel, _MappedKernel) for part in fc.load_stream(path, trusted=True).parts)


def test_trust_is_a_bool(saved):
    with pytest.raises(TypeError, match="True or False"):
        fc.load_stream(saved, trusted="no")


@pytest.mark.parametrize("names", [["avx2"], "host", [""]])
def test_unknown_cpus_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="code_for takes"):
        fc.Stream(fc.GRU(3, 4)).save(tmp_path / "it", code_for=names)
    assert not (tmp_path / "it").exists()


# Damaged and crafted files


def crafted(saved, path, change):
    """A copy of a file with another description of its code, and the right checksum."""
    tensors = load_file(saved)
    with safe_open(saved, framework="np") as file:
        about = file.metadata()
    code = json.loads(about["code"])
    change(code, tensors)
    about["code"] = json.dumps(code)
    about["sha256"] = digest(about["parts"], tensors, about["code"])
    save_file(tensors, path, about)
    return path


def step(key, value):
    return lambda code, tensors: code[0]["steps"][0].update({key: value})


def entry(key, value):
    return lambda code, tensors: code[0].update({key: value})


def size(code, name, value):
    code[0]["steps"][0]["scratch"][name] = value


CHANGES = {
    "entry outside": step("entry", 1 << 30),
    "entry negative": step("entry", -1),
    "entry a bool": step("entry", True),
    "rebased outside": step("rebased", [1 << 40]),
    "rebased at the end": lambda code, tensors: step("rebased", [tensors["code.0.0"].size - 7])(code, tensors),
    "rebased twice": step("rebased", [64, 64]),
    "rebased overlapping": step("rebased", [64, 68]),
    "rebased code": step("rebased", [0]),
    "imported other": step("imported", {"system": 8}),
    "imported outside": step("imported", {"memcpy": 1 << 40}),
    "imported a list": step("imported", ["memcpy"]),
    "slots missing": lambda code, tensors: code[0]["steps"][0]["slots"].remove("packed"),
    "slots twice": lambda code, tensors: code[0]["steps"][0]["slots"].append("packed"),
    "slots unbound": lambda code, tensors: code[0]["steps"][0]["slots"].append("in.other.ptr"),
    "slots numbers": step("slots", [1, 2]),
    "scratch vast": lambda code, tensors: size(code, "fixed", 1 << 40),
    "scratch negative": lambda code, tensors: size(code, "per_row", -8),
    "scratch unknown": lambda code, tensors: size(code, "other", 8),
    "macs text": step("macs", "1"),
    "more in a step": step("more", 1),
    "steps too few": entry("steps", []),
    "features a text": entry("features", "fma"),
    "target empty": entry("target", ""),
    "more in an entry": entry("more", 1),
    "no entries": lambda code, tensors: code.clear(),
    "image missing": lambda code, tensors: tensors.pop("code.0.1"),
    "image too many": lambda code, tensors: tensors.update({"code.1.0": np.zeros(8, np.int8)}),
    "image floats": lambda code, tensors: tensors.update({"code.0.0": np.zeros(8, np.float32)}),
    "image of two axes": lambda code, tensors: tensors.update({"code.0.0": tensors["code.0.0"][None].copy()}),
    "image empty": lambda code, tensors: tensors.update({"code.0.0": np.zeros(0, np.int8)}),
}


@pytest.fixture
def never_run(monkeypatch):
    """Code isn't mapped: that of a crafted file does whatever it likes."""

    def refuse(*arguments):
        raise AssertionError("code of a crafted file was mapped")

    monkeypatch.setattr(machine_code, "MappedCode", refuse)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_crafted_descriptions_are_refused(saved, tmp_path, change, request, monkeypatch):
    if "scratch vast" not in request.node.name:  # whose memory is judged when the kernel is there
        request.getfixturevalue("never_run")
    with pytest.raises(StreamFileError):
        fc.load_stream(crafted(saved, tmp_path / "it", change), trusted=True)


def test_damage_is_found_by_the_checksum(saved, tmp_path, never_run):
    whole, choose = saved.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(len(whole))] ^= choose.randint(1, 255)
        if damaged == whole:
            continue
        (tmp_path / "it").write_bytes(damaged)
        with pytest.raises(StreamFileError):
            fc.load_stream(tmp_path / "it", trusted=True)


def mutated(value, choose):
    """A JSON value with something in it replaced."""
    if isinstance(value, dict | list) and value and choose.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = choose.choice(keys)
        value[key] = mutated(value[key], choose)
        return value
    return choose.choice([None, True, -1, 0, 3, 1.5, 1 << 47, 1 << 80, "", "packed", "\x00", [], {}, [[]], "x" * 300])


def test_mutated_descriptions_are_refused_or_read_without_running_any(saved, tmp_path, monkeypatch):
    class Mapped(Exception):
        """The description passed all checks, as where a number is another valid one."""

    def note(*arguments):
        raise Mapped

    monkeypatch.setattr(machine_code, "MappedCode", note)
    choose, outcomes = random.Random(0), set()
    for _ in range(150):

        def change(code, tensors):
            place = choose.randrange(len(code))
            code[place] = mutated(code[place], choose)

        path = crafted(saved, tmp_path / "it", change)
        try:
            fc.load_stream(path, trusted=True)
            outcomes.add("compiled")
        except (StreamFileError, Mapped) as error:
            outcomes.add(type(error).__name__)
    assert "StreamFileError" in outcomes


# The linker


def linked(text):
    return image_of_object(llvm.object_code(text, ["run"], "x86-64-v3", "", "x86_64-unknown-linux-gnu"), "run")


def test_an_image_calls_the_c_library_and_its_own_tables():
    text = """
    @table = internal constant [2 x ptr] [ptr @first, ptr @second]
    define internal i64 @first(i64 %x) noinline nounwind { %y = mul i64 %x, 3 ret i64 %y }
    define internal i64 @second(i64 %x) noinline nounwind { %y = add i64 %x, 5 ret i64 %y }
    declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
    define i64 @run(ptr %to, ptr %from, i64 %count) nounwind {
      call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 %count, i1 false)
      %which = and i64 %count, 1
      %at = getelementptr ptr, ptr @table, i64 %which
      %function = load ptr, ptr %at
      %y = call i64 %function(i64 %count)
      ret i64 %y
    }"""
    image = linked(text)
    assert set(image.imported) == {"memcpy"}
    assert len(image.rebased) == 2
    code = MappedCode(image.data, image.entry, image.rebased, image.imported)
    call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)(code.address)
    to = ctypes.create_string_buffer(8)
    assert [call(to, b"abcdefg", count) for count in (6, 7)] == [18, 12]
    assert to.raw == b"abcdefg\0"


def test_what_an_image_can_not_have_is_refused():
    with pytest.raises(CompilerError, match="calls 'sinf'"):
        linked(
            """declare float @sinf(float)
            define float @run(float %x) nounwind { %y = call float @sinf(float %x) ret float %y }"""
        )
    with pytest.raises(CompilerError, match="section of type"):  # unwind tables
        linked("define void @run() { ret void }")
    good = llvm.object_code(
        "define void @run() nounwind { ret void }", ["run"], "x86-64-v3", "", "x86_64-unknown-linux-gnu"
    )
    with pytest.raises(CompilerError, match="should define 'other'"):
        image_of_object(good, "other")
    with pytest.raises(CompilerError, match="only ELF"):
        image_of_object(b"\0" * 200, "run")
    for length in (0, 30, 70, len(good) // 2, len(good) - 1):
        with pytest.raises(CompilerError):
            image_of_object(good[:length], "run")


def test_the_code_is_the_same_every_time():
    graphs = [part.graph for part in fc.Stream(fc.GRU(3, 4)).parts]
    (one, images), (two, others) = compile_code(graphs, ["host"]), compile_code(graphs, ["host"])
    assert one == two
    assert np.array_equal(images["code.0.0"], others["code.0.0"])
