/** The generator against its published words and the test vectors of the specification. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";

import { normal, philox4x32, samplerNoise, UsageError } from "../src/index.js";

const words = (text: string): number[] => text.trim().split(" ").map((word) => Number.parseInt(word, 16));

const KNOWN = [ // Random123, kat_vectors, philox4x32 10
  ["00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"],
  ["ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"],
  ["243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"],
];

const FIRST_VALUES: [bigint, number, number, string][] = [ // seed, stream, image, float32 bits
  [0n, 0, 0, "3f7dbb33 bf6cb6b0 bf1e1b9f bef6d1b2"],
  [0n, 0, 1, "3f88a6cb bed9c6b5 c0178cdf be6d0d85"],
  [0n, 1, 0, "3f91747c bf2d06ab 3f9ecbb6 3e65a217"],
  [1n, 0, 0, "3ec2c3e3 be97b1bc be7f370c bf807dbd"],
  [20261123n, 2, 1796, "bfe28a0d 3e78984e 3f0b6eee bf8037d0"],
  [4294967296n, 0, 0, "3e03389d bc8ebec8 3f833902 bfbbf305"],
  [18446744073709551615n, 1, 4294967295, "bed6f87e 3e4f6d07 bf310c43 bf884c17"],
];

test("the words of Philox are the published ones", () => {
  for (const [counter, key, answer] of KNOWN) {
    const found = new Uint32Array(4);
    philox4x32(words(counter), words(key), found);
    assert.deepEqual([...found], words(answer));
  }
});

test("the first values are those of the specification, bit for bit", () => {
  for (const [seed, stream, image, bits] of FIRST_VALUES) {
    const found = new Uint32Array(normal(seed, 4, image, stream).buffer);
    assert.deepEqual([...found], words(bits));
  }
});

test("streams have the hashes of the contract, a million values each", () => {
  const hash = (values: Float32Array) => createHash("sha256").update(new Uint8Array(values.buffer)).digest("hex");
  const hashes = [normal(7, 64), normal(7, 1_000_000), normal(2n ** 64n - 1n, 1_000_000, 2 ** 32 - 1, 3)].map(hash);
  assert.deepEqual(hashes, [
    "5dacb4d84779c7dc128789e49205f8ec807df3166fd65d4885cc3146956a2a3b",
    "342a1a10126ff254fcbbe025dbb95099dee21398909dd9384b51b6850c7224d1",
    "9246ac2c5f0b1983eb4268e6a04abc25e6d6ff155aebd2eeb0291d959015c120",
  ]);
});

test("a number and a BigInt are the same seed", () => {
  assert.deepEqual(normal(2 ** 40, 9), normal(2n ** 40n, 9));
});

test("a shorter image is the start of a longer one", () => {
  for (const count of [1, 2, 3, 5]) assert.deepEqual(normal(3, count), normal(3, 8).slice(0, count));
});

test("an image does not depend on the images drawn with it", () => {
  const many = samplerNoise(9, [1, 2, 3], 2, 3);
  const last = samplerNoise(9, [1, 2, 3], 2, 1, 2);
  assert.deepEqual(many.noise.values.slice(12), last.noise.values);
  assert.deepEqual(many.step_noise.values.slice(18 + 12), last.step_noise.values.slice(6));
  assert.deepEqual(many.step_noise.shape, [2, 3, 1, 2, 3]);
});

test("what is no seed is refused", () => {
  for (const seed of [-1, 0.5, 2 ** 60, NaN, -1n, 2n ** 64n]) assert.throws(() => normal(seed, 4), UsageError);
});
