"""A stream for web pages: a WebAssembly module, an ES module around it, and an AudioWorklet processor.

All of it is written here; no tool of the web is needed, neither to build nor to run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fusecell.exporting.header import Field, Interface
from fusecell.exporting.interface import interface_of, macs_of, sibling
from fusecell.exporting.object_file import read_object
from fusecell.exporting.program import FUNCTIONS, build_program
from fusecell.exporting.reference import reference_numbers
from fusecell.exporting.report import ExportReport
from fusecell.exporting.targets import ExportTarget
from fusecell.exporting.verify import NotRunnable, run_wasm
from fusecell.exporting.wasm_module import wasm_module
from fusecell.streaming.stream import Stream

__all__ = ["export_web"]


def export_web(stream: Stream, stem: Path, prefix: str, target: ExportTarget, *, verify: bool) -> ExportReport:
    """Write ``.wasm``, ``.mjs`` and ``-processor.mjs``.

    Raises:
        CompilerError: if the step needs a function of the C library.
        ExportError: if Node.js is there to run the module, and a bit differs.
        OSError: if a file can't be written.
    """
    program = build_program(stream.parts, prefix, target)
    external = read_object(program.code).undefined
    numbers_of = target.numbers
    if external:
        numbers_of += f" The browser's own {', '.join(external)} may differ in a last bit."
    interface = interface_of(stream, prefix, program.memory.bytes, numbers_of)
    names = [f"{prefix}_{name}" for name in FUNCTIONS]
    module = wasm_module(program.code, names, program.memory.bytes)
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [sibling(stem, ".wasm"), sibling(stem, ".mjs"), sibling(stem, "-processor.mjs")]
    files[0].write_bytes(module)
    files[1].write_text(_es_module(interface, files[0].name))
    files[2].write_text(_processor(interface, stem.name))
    verified = "not asked for"
    if verify:
        numbers = reference_numbers(stream.parts, stream.batch_size, fused=False)
        try:
            if numbers is None:
                raise NotRunnable("this machine always fuses multiply-adds, and so hasn't the module's numbers")
            if external:
                raise NotRunnable(f"the JavaScript engine's {', '.join(external)} may differ in a last bit")
            verified = f"the stream's bits without fused multiply-adds, run by {run_wasm(module, interface, numbers)}"
        except NotRunnable as reason:
            verified = f"not run: {reason}"
    return ExportReport(
        files=tuple(files),
        target=target.name,
        format="web",
        prefix=prefix,
        about=interface.about,
        code_bytes=read_object(program.code).loaded - program.memory.weights,
        weight_bytes=program.memory.weights,
        state_bytes=program.memory.state,
        scratch_bytes=program.memory.scratch,
        macs=macs_of(stream.parts, stream.batch_size),
        numbers=numbers_of,
        external=external,
        verified=verified,
    )


def _spans(fields: Sequence[Field]) -> str:
    """Write where each input or output is in a row, by name."""
    return json.dumps({field.name: field.span for field in fields})


def _es_module(interface: Interface, wasm: str) -> str:
    p = interface.prefix
    single = interface.scalar == "float"
    array = "Float32Array" if single else "Float64Array"
    return f"""\
// {interface.about}.
// {interface.numbers}

export const rows = {interface.rows};
export const inputSize = {interface.input_size};
export const outputSize = {interface.output_size};
// The first number of each in a row, and the one behind its last.
export const inputs = {_spans(interface.inputs)};
export const outputs = {_spans(interface.outputs)};
export const stateSize = {interface.state_size};

const memoryBytes = {interface.memory_bytes}, itemBytes = {4 if single else 8}, page = 65536;
const aligned = (address) => (address + 63) & -64;

/** Read and compile the module: from its address, a Response, or bytes. */
export async function compile(source = new URL("./{wasm}", import.meta.url)) {{
  if (source instanceof WebAssembly.Module) return source;
  if (source instanceof ArrayBuffer || ArrayBuffer.isView(source)) return WebAssembly.compile(source);
  const response = source instanceof Response ? source : await fetch(source);
  if (!response.ok) throw new Error(`${{response.url}}: ${{response.status}} ${{response.statusText}}`);
  return WebAssembly.compile(await response.arrayBuffer());
}}

/** A stream with its own state. Arrays are [rows][size], those of push [steps][rows][size]. */
export class Stream {{
  #exports; #memory; #stream; #input; #output; #state; #capacity;

  /** Compile the module, and make a stream of it. */
  static async create(source) {{
    return new Stream(await compile(source));
  }}

  /** Make a stream of a WebAssembly.Module, or of its bytes where compiling may take its time, as in a worklet. */
  constructor(module) {{
    const compiled = module instanceof WebAssembly.Module ? module : new WebAssembly.Module(module);
    this.#exports = new WebAssembly.Instance(compiled, {{ env: Math }}).exports;
    this.#memory = this.#exports.memory;
    this.#stream = aligned(this.#exports.heap_base.value);
    this.#reserve(1);
    this.#exports.{p}_init(this.#stream);
  }}

  #reserve(steps) {{
    this.#capacity = steps;
    this.#input = aligned(this.#stream + memoryBytes);
    this.#output = aligned(this.#input + steps * rows * inputSize * itemBytes);
    this.#state = aligned(this.#output + steps * rows * outputSize * itemBytes);
    const missing = this.#state + stateSize * itemBytes - this.#memory.buffer.byteLength;
    if (missing > 0) this.#memory.grow(Math.ceil(missing / page));
  }}

  #view(address, count) {{
    return new {array}(this.#memory.buffer, address, count);
  }}

  #checked(name, values, count) {{
    if (values.length !== count) throw new RangeError(`${{name}} has ${{values.length}} numbers, expected ${{count}}`);
    return values;
  }}

  /** Set the initial state. */
  reset() {{
    this.#exports.{p}_reset(this.#stream);
  }}

  /** Run one step; write its output to `output` and return it. */
  step(input, output = new {array}(rows * outputSize)) {{
    this.#view(this.#input, rows * inputSize).set(this.#checked("input", input, rows * inputSize));
    this.#exports.{p}_step(this.#stream, this.#input, this.#output);
    output.set(this.#view(this.#output, rows * outputSize));
    return output;
  }}

  /** Run as many steps as the input has. */
  push(input) {{
    const steps = Math.floor(input.length / (rows * inputSize));
    this.#checked("input", input, steps * rows * inputSize);
    if (steps > this.#capacity) this.#reserve(steps);
    this.#view(this.#input, input.length).set(input);
    this.#exports.{p}_push(this.#stream, steps, this.#input, this.#output);
    return this.#view(this.#output, steps * rows * outputSize).slice();
  }}

  /** A copy of the states; can be assigned. */
  get state() {{
    this.#exports.{p}_get_state(this.#stream, this.#state);
    return this.#view(this.#state, stateSize).slice();
  }}

  set state(values) {{
    this.#view(this.#state, stateSize).set(this.#checked("state", values, stateSize));
    this.#exports.{p}_set_state(this.#stream, this.#state);
  }}
}}
"""


def _processor(interface: Interface, name: str) -> str:
    p, size, out = interface.prefix, interface.input_size, interface.output_size
    return f"""\
// An AudioWorklet processor, "{p}":
//
//   const bytes = await (await fetch("{name}.wasm")).arrayBuffer();
//   await context.audioWorklet.addModule("{name}-processor.mjs");
//   const processorOptions = {{ bytes, mode: "samples" }};
//   const node = new AudioWorkletNode(context, "{p}", {{ processorOptions }});
//
// mode "samples": every sample is a step, whose input and output are the channels: {size} in, {out} out.
// mode "frames": a step takes {size} samples of the first channel. If it gives as many, they are played, one frame
// late; else its output is posted to the node's port.
import {{ Stream, inputSize, outputSize, rows }} from "./{name}.mjs";

class Processor extends AudioWorkletProcessor {{
  constructor({{ processorOptions: {{ bytes, mode = inputSize === 1 ? "samples" : "frames" }} }}) {{
    super();
    if (rows !== 1) throw new Error("a processor takes streams of one row");
    if (mode !== "samples" && mode !== "frames") throw new Error(`mode is ${{mode}}, expected samples or frames`);
    this.stream = new Stream(bytes);
    this.input = new Float32Array(inputSize);
    this.output = new Float32Array(outputSize);
    this.filled = 0;
    this.process = mode === "samples" ? this.processSamples : this.processFrames;
    this.port.onmessage = ({{ data }}) => {{ if (data === "reset") this.stream.reset(); }};
  }}

  processSamples([input], [output]) {{
    for (let t = 0; t < output[0].length; t++) {{
      for (let channel = 0; channel < inputSize; channel++) this.input[channel] = input[channel]?.[t] ?? 0;
      this.stream.step(this.input, this.output);
      for (let channel = 0; channel < output.length; channel++) output[channel][t] = this.output[channel % outputSize];
    }}
    return true;
  }}

  processFrames([input], [output]) {{
    const length = output[0]?.length ?? 128, played = outputSize === inputSize;
    for (let t = 0; t < length; t++) {{
      if (played) for (const channel of output) channel[t] = this.output[this.filled];
      this.input[this.filled++] = input[0]?.[t] ?? 0;
      if (this.filled === inputSize) {{
        this.filled = 0;
        this.stream.step(this.input, this.output);
        if (!played) this.port.postMessage(this.output.slice());
      }}
    }}
    return true;
  }}
}}

registerProcessor("{p}", Processor);
"""
