//! Filter a stream of samples by an exported filter: float32 from stdin to stdout, as they come.
//!
//!     ./filter_rs < in.f32 > out.f32
//!
//! The exported library is C; `sizes.rs` holds the constants of its header, which Rust can't read.

use std::io::{self, Read, Write};

include!(concat!(env!("EXPORTED"), "/sizes.rs"));

/// The memory of one stream, which the library never allocates itself.
#[repr(C, align(64))]
struct Memory([u8; MEMORY_BYTES]);

extern "C" {
    fn filter_init(stream: *mut Memory) -> i32;
    fn filter_push(stream: *mut Memory, steps: usize, input: *const f32, output: *mut f32);
}

/// A stream of the exported filter: a state, and what it needs to go on from it.
pub struct Filter(Box<Memory>);

impl Filter {
    /// Return a stream in its initial state.
    pub fn new() -> Filter {
        let mut memory = Box::new(Memory([0; MEMORY_BYTES]));
        // SAFETY: the memory has the size and the alignment that the header asks for.
        let refused = unsafe { filter_init(&mut *memory) };
        assert_eq!(refused, 0, "a box of Memory is aligned");
        Filter(memory)
    }

    /// Filter samples, one step each, into a buffer of the same length.
    pub fn push(&mut self, input: &[f32], output: &mut [f32]) {
        assert_eq!(input.len() % INPUT_SIZE, 0, "a step takes {INPUT_SIZE} numbers");
        let steps = input.len() / INPUT_SIZE;
        assert_eq!(output.len(), steps * OUTPUT_SIZE, "a step gives {OUTPUT_SIZE} numbers");
        // SAFETY: both buffers are as long as the header says, and a borrow of each can't overlap the other.
        unsafe { filter_push(&mut *self.0, steps, input.as_ptr(), output.as_mut_ptr()) }
    }
}

fn main() -> io::Result<()> {
    let (mut filter, mut stdin, mut stdout) = (Filter::new(), io::stdin().lock(), io::stdout().lock());
    let (mut bytes, mut held) = ([0u8; 4096], 0);
    loop {
        let count = stdin.read(&mut bytes[held..])?;
        if count == 0 {
            return stdout.flush();
        }
        // A read may end in the middle of a number.
        let whole = (held + count) / 4 * 4;
        let input: Vec<f32> = bytes[..whole]
            .chunks_exact(4)
            .map(|number| f32::from_le_bytes(number.try_into().expect("four bytes")))
            .collect();
        let mut output = vec![0.0; input.len() / INPUT_SIZE * OUTPUT_SIZE];
        filter.push(&input, &mut output);
        for number in &output {
            stdout.write_all(&number.to_le_bytes())?;
        }
        bytes.copy_within(whole..held + count, 0);
        held = held + count - whole;
    }
}
