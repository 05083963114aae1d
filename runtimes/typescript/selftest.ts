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
  /** The mean absolute error over all values of all images, and what it may be. */
  readonly mean: number;
  readonly meanLimit: number;
  /** What fails whatever the tolerance; else empty. */
  readonly fault: string;
  readonly passed: boolean;
  /** Median time of a batch. */
  readonly milliseconds: number;
}

/** Largest and mean error of images (N, ...), and what is wrong beyond: NaN, infinity, a constant image, the shape. */
export function compare(found: Tensor, expected: Tensor): { worst: number; mean: number; fault: string } {
  const shapes = [found, expected].map(({ dtype, shape }) => `${dtype} (${shape.join(", ")})`);
  if (shapes[0] !== shapes[1]) {
    return { worst: Infinity, mean: Infinity, fault: `shape ${shapes[0]}, expected ${shapes[1]}` };
  }
  const faults: string[] = [];
  const broken = [...found.values].filter((value) => !Number.isFinite(Number(value))).length;
  if (broken) faults.push(`${broken} NaN or infinite values`);
  const constant = constantImage(found);
  if (constant >= 0) faults.push(`image ${constant} is constant`);
  let worst = 0, sum = 0;
  for (let i = 0; i < found.values.length; i++) {
    const difference = Math.abs(Number(found.values[i]) - Number(expected.values[i]));
    const error = Number.isFinite(difference) ? difference : Infinity;
    worst = Math.max(worst, error);
    sum += error;
  }
  return { worst, mean: sum / found.values.length, fault: faults.join("; ") };
}

/** What a sample may be off in any value, and in all on average; in levels, of 2 / 255, where it has bytes. */
export function limits(atol: number, dtype: Tensor["dtype"]): { tolerance: number; meanLimit: number } {
  if (dtype !== "uint8") return { tolerance: atol, meanLimit: atol / 8 };
  const levels = 127.5 * atol;
  return { tolerance: Math.max(1, Math.ceil(levels)), meanLimit: Math.max(levels / 8, Math.min(levels, 0.25)) };
}

/** Images (N, ...) against the golden ones, within `atol` of the manifest. */
export function judge(
  found: Tensor, golden: Tensor, atol: number,
): Pick<SelfTest, "worst" | "tolerance" | "mean" | "meanLimit" | "fault" | "passed"> {
  const measured = { ...compare(found, golden), ...limits(atol, golden.dtype) };
  const { worst, tolerance, mean, meanLimit, fault } = measured;
  return { ...measured, passed: fault === "" && worst <= tolerance && mean <= meanLimit };
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

/** What failed where the largest error does not tell: a fault, or the mean error alone; else empty. */
function reason({ worst, tolerance, mean, meanLimit, fault, passed }: SelfTest): string {
  if (passed || fault || worst > tolerance) return fault;
  return `mean error ${short(mean)} (limit ${short(meanLimit)})`;
}

/** Three digits, without zeros at the end. */
const short = (value: number): string => String(Number(value.toPrecision(3)));

/** One line for people. */
export function report(test: SelfTest): string {
  const verdict = test.passed ? "passed" : `FAILED ${reason(test)}`.trimEnd();
  return (
    `self-test ${verdict}: ${test.bundle} in ${test.runtime}, ${test.images} images, largest error ` +
    `${test.worst.toPrecision(3)} (tolerance ${test.tolerance}), ${test.milliseconds.toFixed(2)} ms a batch`
  );
}
