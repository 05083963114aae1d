/** The comparison with the golden file, and what is said about it. */

import type { Tensor } from "./tensors.js";
import { size } from "./tensors.js";

export interface SelfTest {
  readonly bundle: string;
  readonly runtime: string;
  readonly images: number;
  /** The largest absolute error, on the scale of the output. */
  readonly worst: number;
  readonly tolerance: number;
  /** What fails whatever the tolerance; else empty. */
  readonly fault: string;
  readonly passed: boolean;
  /** Median time of a batch. */
  readonly milliseconds: number;
}

/** The largest error of images (N, ...), and what is wrong beyond it: NaN, infinity, a constant image, the shape. */
export function compare(found: Tensor, expected: Tensor): { worst: number; fault: string } {
  const shapes = [found, expected].map(({ dtype, shape }) => `${dtype} (${shape.join(", ")})`);
  if (shapes[0] !== shapes[1]) return { worst: Infinity, fault: `shape ${shapes[0]}, expected ${shapes[1]}` };
  const faults: string[] = [];
  const broken = [...found.values].filter((value) => !Number.isFinite(Number(value))).length;
  if (broken) faults.push(`${broken} NaN or infinite values`);
  const constant = constantImage(found);
  if (constant >= 0) faults.push(`image ${constant} is constant`);
  let worst = 0;
  for (let i = 0; i < found.values.length; i++) {
    const error = Math.abs(Number(found.values[i]) - Number(expected.values[i]));
    worst = Math.max(worst, Number.isFinite(error) ? error : Infinity);
  }
  return { worst, fault: faults.join("; ") };
}

/** The index of the first image of equal values, or -1. */
function constantImage({ shape, values }: Tensor): number {
  const inner = size(shape.slice(1));
  for (let image = 0; image < shape[0]; image++) {
    const first = values[image * inner];
    let i = 1;
    while (i < inner && values[image * inner + i] === first) i++;
    if (i === inner) return image;
  }
  return -1;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

/** One line for people. */
export function report(test: SelfTest): string {
  const verdict = test.passed ? "passed" : `FAILED ${test.fault}`.trimEnd();
  return (
    `self-test ${verdict}: ${test.bundle} in ${test.runtime}, ${test.images} images, largest error ` +
    `${test.worst.toPrecision(3)} (tolerance ${test.tolerance}), ${test.milliseconds.toFixed(2)} ms a batch`
  );
}
