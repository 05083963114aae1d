/**
 * Noise from a seed: Philox4x32-10, Box-Muller in float64, rounded once to float32; the same on every device.
 *
 * Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3":
 *
 *     key     = (seed mod 2^32, seed div 2^32)                     0 <= seed < 2^64
 *     counter = (block, stream, image, 0)                          block b makes the values 4b ... 4b + 3 in C order
 *     u(w)    = (w + 0.5) * 2^-32
 *     z0, z1  = r cos t, r sin t   with r = sqrt(-2 ln u(w0)), t = 2 pi u(w1);   z2, z3 likewise from w2, w3
 *
 * Stream 0 is the initial noise, stream s + 1 the noise of the s-th noisy step.
 */

import { UsageError } from "./errors.js";
import type { Tensor, Tensors } from "./tensors.js";
import { size } from "./tensors.js";

const WORD = 2 ** 32;
const ROUNDS = 10;

export type Seed = number | bigint;

/** The high 32 bits of a * b, both unsigned 32-bit, by halves of 16 bits: every partial sum fits a float64 exactly. */
function high(a: number, b: number): number {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  return (a1 * b1 + (middle >>> 16) + ((a0 * b1 + (middle & 0xffff)) >>> 16)) >>> 0;
}

/** Philox4x32-10; section 3.3. Counter (4) and key (2) in, four words out. */
export function philox4x32(counter: ArrayLike<number>, key: ArrayLike<number>, words: Uint32Array): void {
  let c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
  for (let round = 0; round < ROUNDS; round++) {
    const high0 = high(0xd2511f53, c0), low0 = Math.imul(0xd2511f53, c0);
    const high1 = high(0xcd9e8d57, c2), low1 = Math.imul(0xcd9e8d57, c2);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1 >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/** `count` unit normals of one image and stream. */
export function normal(seed: Seed, count: number, image = 0, stream = 0): Float32Array<ArrayBuffer> {
  const key = keyOf(seed);
  const counter = [0, whole("stream", stream), whole("image index", image), 0];
  const result = new Float32Array(count);
  const words = new Uint32Array(4);
  for (let at = 0; at < count; at += 4) {
    counter[0] = at / 4;
    philox4x32(counter, key, words);
    for (let pair = 0; pair < 4 && at + pair < count; pair += 2) {
      const r = Math.sqrt(-2 * Math.log((words[pair] + 0.5) * 2 ** -32));
      const t = 2 * Math.PI * ((words[pair + 1] + 0.5) * 2 ** -32);
      result[at + pair] = r * Math.cos(t);
      if (at + pair + 1 < count) result[at + pair + 1] = r * Math.sin(t);
    }
  }
  return result;
}

/** Unit normal (N, C, H, W) for the images `first` ... of a seed; `shape` is (C, H, W). */
export function normals(seed: Seed, shape: readonly number[], count: number, first = 0, stream = 0): Tensor {
  const inner = size(shape);
  const values = new Float32Array(whole("count", count) * inner);
  for (let row = 0; row < count; row++) values.set(normal(seed, inner, first + row, stream), row * inner);
  return { dtype: "float32", shape: [count, ...shape], values };
}

/** The noise that a sampler takes: `noise` (N, C, H, W) and, if there are noisy steps, `step_noise` (S, N, C, H, W). */
export function samplerNoise(
  seed: Seed, shape: readonly number[], noisySteps: number, count: number, first = 0,
): Tensors {
  const noise = normals(seed, shape, count, first);
  if (noisySteps === 0) return { noise };
  const values = new Float32Array(noisySteps * noise.values.length);
  for (let s = 0; s < noisySteps; s++) {
    values.set(normals(seed, shape, count, first, s + 1).values as Float32Array, s * noise.values.length);
  }
  return { noise, step_noise: { dtype: "float32", shape: [noisySteps, count, ...shape], values } };
}

/** The low and high 32 bits of a seed. */
function keyOf(seed: Seed): [number, number] {
  const fits = typeof seed === "bigint" ? seed >= 0n && seed < 2n ** 64n : Number.isSafeInteger(seed) && seed >= 0;
  if (!fits) throw new UsageError(`seed is ${seed}; give a whole number from 0 to 2^64 - 1, above 2^53 as a BigInt`);
  const wide = BigInt(seed);
  return [Number(wide & 0xffffffffn), Number(wide >> 32n)];
}

function whole(what: string, value: number): number {
  if (!Number.isInteger(value) || value < 0 || value >= WORD) {
    throw new UsageError(`${what} is ${value}; give a whole number from 0 to ${WORD - 1}`);
  }
  return value;
}
