/** Many images through a graph that takes few at once. */

import { UsageError } from "./errors.js";
import type { Batch, Manifest } from "./manifest.js";
import type { Tensor, Tensors } from "./tensors.js";
import { batchAxis, take } from "./tensors.js";

/** The batch to run next: the largest that `remaining` images fill, else the smallest. */
export function nextBatch({ sizes, range }: Batch, remaining: number): number {
  if (range) return Math.min(Math.max(remaining, range[0]), range[1]);
  const filled = (sizes ?? [1]).filter((length) => length <= remaining);
  return filled.at(-1) ?? (sizes ?? [1])[0];
}

/** The inputs of N images in batches that the graph takes, the last one padded with its last image. */
export function* batches(batch: Batch, inputs: Tensors): Generator<{ inputs: Tensors; real: number }> {
  const total = inputs.noise.shape[0];
  for (let start = 0; start < total; ) {
    const length = nextBatch(batch, total - start);
    const cut = ([name, tensor]: [string, Tensor]) => [name, take(tensor, batchAxis(name), start, length)] as const;
    yield { inputs: Object.fromEntries(Object.entries(inputs).map(cut)), real: Math.min(length, total - start) };
    start += length;
  }
}

/** UsageError unless the inputs are those of the manifest, for the same number of images. */
export function checkInputs({ name: bundle, inputs: specs }: Manifest, inputs: Tensors): void {
  const names = specs.map((spec) => spec.name);
  const unknown = Object.keys(inputs).find((name) => !names.includes(name));
  if (unknown) throw new UsageError(`bundle ${bundle}: input '${unknown}' is unknown, it takes ${names.join(", ")}`);
  const count = inputs.noise?.shape[0];
  for (const spec of specs) {
    const tensor = inputs[spec.name];
    if (!tensor) throw new UsageError(`bundle ${bundle}: input '${spec.name}' is missing; give it as a condition`);
    const shape = spec.shape.map((length, axis) => (axis === batchAxis(spec.name) ? count : length));
    const found = `${tensor.dtype} (${tensor.shape.join(", ")})`, says = `${spec.dtype} (${shape.join(", ")})`;
    if (found !== says) throw new UsageError(`bundle ${bundle}: input '${spec.name}' is ${found}, it takes ${says}`);
    const outside = firstOutside(tensor, spec.below);
    if (outside !== undefined) {
      const range = `0 to ${Number(spec.below) - 1}`;
      throw new UsageError(`bundle ${bundle}: input '${spec.name}' holds ${outside}, the manifest says ${range}`);
    }
  }
}

/** The first value of an int64 tensor that is not in 0 ... `below` - 1. */
function firstOutside({ values }: Tensor, below: number | null): bigint | undefined {
  if (below === null || !(values instanceof BigInt64Array)) return undefined;
  return values.find((value) => value < 0n || value >= BigInt(below));
}
