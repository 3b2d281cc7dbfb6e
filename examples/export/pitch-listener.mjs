// An AudioWorklet processor that hears pitch: every 160 samples the spectrum of the last 640 is a step of the stream.
import { Stream, inputSize } from "./pitch.mjs";

const block = 160, length = 640, lowest = 80, stepsPerOctave = 24;
const hann = Float32Array.from({ length }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / (length - 1)));
const waves = Array.from({ length: inputSize }, (_, band) =>
  [Math.cos, Math.sin].map((wave) => Float32Array.from({ length }, (_, i) => hann[i] * wave((2 * Math.PI * band * i) / length))),
);

// Log magnitudes in bands 25 Hz apart, by the definition of the Fourier transform.
function spectrum(samples) {
  return Float32Array.from(waves, ([cosine, sine]) => {
    let real = 0, imaginary = 0;
    for (let i = 0; i < length; i++) {
      real += samples[i] * cosine[i];
      imaginary += samples[i] * sine[i];
    }
    return Math.log1p(Math.hypot(real, imaginary));
  });
}

// The pitch for some scores, in Hz: the mean of the best and its neighbours by their softmax.
function frequency(scores) {
  const best = scores.indexOf(Math.max(...scores));
  let weights = 0, sum = 0;
  for (let i = Math.max(best - 1, 0); i < Math.min(best + 2, scores.length); i++) {
    const weight = Math.exp(scores[i] - scores[best]);
    weights += weight;
    sum += weight * (i + 0.5);
  }
  return lowest * 2 ** (sum / weights / stepsPerOctave);
}

class Listener extends AudioWorkletProcessor {
  constructor({ processorOptions: { bytes } }) {
    super();
    this.stream = new Stream(bytes);
    this.samples = new Float32Array(length);
    this.filled = 0;
  }

  process([input], [output]) {
    for (let t = 0; t < output[0].length; t++) {
      const sample = input[0]?.[t] ?? 0;
      output[0][t] = 0.1 * sample;
      this.samples[length - block + this.filled++] = sample;
      if (this.filled === block) {
        this.filled = 0;
        this.port.postMessage(frequency(this.stream.step(spectrum(this.samples))));
        this.samples.copyWithin(0, block);
      }
    }
    return true;
  }
}

registerProcessor("pitch-listener", Listener);
