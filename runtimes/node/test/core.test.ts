/** The parts of the core that need no graph: JSON, batches, comparison, pictures. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { batches, nextBatch } from "../src/core/batches.js";
import { parseJson } from "../src/core/json.js";
import { limits } from "../src/core/selftest.js";
import { withOutputs } from "../src/core/states.js";
import { concat, take } from "../src/core/tensors.js";
import type { Tensor } from "../src/index.js";
import { compare, judge, picture, report, sheet } from "../src/index.js";

const tensor = (shape: number[], values: number[]): Tensor => (
  { dtype: "float32", shape, values: new Float32Array(values) }
);
const bytes = (values: number[]): Tensor => (
  { dtype: "uint8", shape: [2, 2, 2, 1], values: Uint8Array.from(values) }
);
/** What is said of images that are golden but for what `judge` finds. */
const told = (found: Tensor, golden: Tensor, atol: number): string => (
  report({ bundle: "b", runtime: "r", images: 2, milliseconds: 1, ...judge(found, golden, atol) })
);
const json = (text: string): unknown => parseJson(new TextEncoder().encode(text));

test("JSON is read as JSON.parse reads it", () => {
  const text = '{"a": [1, {"b": "x:y,{\\"}"}], "c": {"a": null}, "": -1.5e3}';
  assert.deepEqual(json(text), JSON.parse(text));
});

test("a key that stands twice is refused, however it is written", () => {
  assert.throws(() => json('{"a": 1, "b": {"c": 1, "\\u0063": 2}}'), /key 'c' stands twice/);
  assert.deepEqual(json('[{"a": 1}, {"a": 2}]'), [{ a: 1 }, { a: 2 }]);
});

test("JSON of more than 64 levels, NaN and other encodings are refused", () => {
  assert.equal(JSON.stringify(json("[".repeat(64) + "]".repeat(64))).length, 128);
  assert.throws(() => json("[".repeat(65) + "]".repeat(65)), /64 deep/);
  assert.throws(() => json('{"a": NaN}'), SyntaxError);
  assert.throws(() => parseJson(Uint8Array.of(0x22, 0xff, 0x22)), /not UTF-8/);
});

test("images go through in the largest batches that they fill", () => {
  const sizes = { sizes: [2, 4], range: null }, range = { sizes: null, range: [2, 5] as const };
  assert.deepEqual([1, 2, 3, 4, 9].map((n) => nextBatch(sizes, n)), [2, 2, 2, 4, 4]);
  assert.deepEqual([1, 2, 3, 9].map((n) => nextBatch(range, n)), [2, 2, 3, 5]);
});

test("the last batch is padded with its last image, on the axis of the images", () => {
  const inputs = { noise: tensor([3, 1], [1, 2, 3]), step_noise: tensor([2, 3, 1], [1, 2, 3, 11, 12, 13]) };
  const parts = [...batches({ sizes: [2], range: null }, inputs)];
  assert.deepEqual(parts.map(({ real }) => real), [2, 1]);
  assert.deepEqual([...parts[1].inputs.noise.values], [3, 3]);
  assert.deepEqual([...parts[0].inputs.step_noise.values], [1, 2, 11, 12]);
  assert.deepEqual([...parts[1].inputs.step_noise.values], [3, 3, 13, 13]);
});

test("what was cut can be joined again", () => {
  const whole = tensor([4, 2], [0, 1, 2, 3, 4, 5, 6, 7]);
  assert.deepEqual(concat([take(whole, 0, 0, 1), take(whole, 0, 1, 3)]), whole);
});

test("a comparison can fail", () => {
  const right = tensor([2, 2], [0, 1, 2, 3]);
  assert.deepEqual(compare(right, right), { worst: 0, mean: 0, fault: "" });
  assert.deepEqual(compare(tensor([2, 2], [0, 1, 2, 3.5]), right), { worst: 0.5, mean: 0.125, fault: "" });
  assert.equal(compare(tensor([2, 2], [0, NaN, 2, 3]), right).mean, Infinity);
  assert.match(compare(tensor([2, 2], [0, NaN, 2, 3]), right).fault, /1 NaN/);
  assert.match(compare(tensor([2, 2], [0, Infinity, 2, 3]), right).fault, /1 NaN or infinite/);
  assert.match(compare(tensor([2, 2], [0, 1, 2, 2]), right).fault, /image 1 is constant/);
  assert.match(compare(tensor([4], [0, 1, 2, 3]), right).fault, /shape/);
});

test("bytes that are all a level too low fail, as where levels are truncated", () => {
  const golden = bytes([9, 20, 31, 42, 53, 64, 75, 86]);
  assert.ok(judge(golden, golden, 1e-4).passed);
  const low = bytes([8, 19, 30, 41, 52, 63, 74, 85]);
  assert.deepEqual(judge(low, golden, 1e-4), {
    worst: 1, tolerance: 1, mean: 1, meanLimit: 127.5 * 1e-4, fault: "", passed: false,
  });
  assert.equal(
    told(low, golden, 1e-4),
    "self-test FAILED mean error 1 (limit 0.0128): b in r, 2 images, largest error 1.00 (tolerance 1), 1.00 ms a batch",
  );
});

test("another picture fails within a wide tolerance, a value that is far off does not", () => {
  const golden = tensor([2, 4], [-1, 1, -0.5, 0.5, 1, -1, 0.5, -0.5]);
  const half = tensor([2, 4], [-0.5, 0.5, 0, 0, 0.5, -0.5, 0, -0.5]);
  assert.match(told(half, golden, 1.6), /^self-test FAILED mean error 0.438 \(limit 0.2\): b in r, /);
  const spread = tensor([2, 4], [0.5, 1, -0.5, 0.5, 1, -1, 0.5, -0.5]);
  assert.match(told(spread, golden, 1.6), /^self-test passed: b in r, .* largest error 1.50 \(tolerance 1.6\), /);
  assert.match(told(half, golden, 0.4), /^self-test FAILED: b in r, /);
});

test("a sample of bytes is held to levels", () => {
  assert.deepEqual(limits(1.6, "float32"), { tolerance: 1.6, meanLimit: 0.2 });
  for (const [atol, tolerance, meanLimit] of [[1e-4, 1, 0.01275], [0.01, 2, 0.25], [1.6, 204, 25.5]]) {
    const found = limits(atol, "uint8");
    assert.equal(found.tolerance, tolerance);
    assert.ok(Math.abs(found.meanLimit - meanLimit) < 1e-12, `${found.meanLimit}`);
  }
});

test("further outputs are one message of protobuf behind the model", () => {
  const found = withOutputs(Uint8Array.of(1, 2), ["ab"]);
  // graph (7) { output (12) { name (1) "ab", type (2) { tensor (1) { element (1) float } } } }
  assert.deepEqual([...found], [1, 2, 0x3a, 12, 0x62, 10, 0x0a, 2, 97, 98, 0x12, 4, 0x0a, 2, 0x08, 1]);
});

test("pixels are rounded as in Python, for both layouts", () => {
  const float = picture(tensor([1, 3, 1, 2], [-1, 0, 1, 0.2, 2, -3]), 0);
  assert.deepEqual([...float.pixels], [0, 255, 255, 128, 153, 0]);
  const bytes = picture({ dtype: "uint8", shape: [1, 1, 2, 3], values: Uint8Array.of(1, 2, 3, 4, 5, 6) }, 0);
  assert.deepEqual([bytes.width, bytes.height, ...bytes.pixels], [2, 1, 1, 2, 3, 4, 5, 6]);
  assert.throws(() => picture(tensor([1, 4, 1, 1], [0, 0, 0, 0]), 0), /no picture/);
});

test("a sheet is near-square, on white", () => {
  const grey = picture(tensor([1, 1, 8, 8], Array<number>(64).fill(0)), 0);
  const found = sheet([grey, grey, grey]);
  assert.deepEqual([found.width, found.height], [98, 98]);
  assert.deepEqual([found.pixels[0], found.pixels[48], found.pixels[98 * 60 + 60]], [128, 255, 255]);
});
