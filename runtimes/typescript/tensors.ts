/** Arrays with a shape, in C order. */

export type Dtype = "float32" | "int64" | "uint8";
export type Values = Float32Array<ArrayBuffer> | BigInt64Array<ArrayBuffer> | Uint8Array<ArrayBuffer>;

export interface Tensor {
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly values: Values;
}

export type Tensors = Readonly<Record<string, Tensor>>;

const KINDS = { float32: Float32Array, int64: BigInt64Array, uint8: Uint8Array } as const;
export const BYTES: Readonly<Record<Dtype, number>> = { float32: 4, int64: 8, uint8: 1 };

/** The number of values that a shape holds. */
export function size(shape: readonly number[]): number {
  return shape.reduce((product, length) => product * length, 1);
}

/** `step_noise` is (S, B, C, H, W), everything else has its batch first. */
export function batchAxis(name: string): number {
  return name === "step_noise" ? 1 : 0;
}

/** A tensor over a copy of little-endian bytes, wherever they start. */
export function fromBytes(dtype: Dtype, shape: readonly number[], bytes: Uint8Array): Tensor {
  return { dtype, shape, values: new KINDS[dtype](bytes.slice().buffer) };
}

/** Rows `start` ... `start + count - 1` along `axis`; rows behind the end repeat the last one. */
export function take(tensor: Tensor, axis: number, start: number, count: number): Tensor {
  const rows = tensor.shape[axis];
  const outer = size(tensor.shape.slice(0, axis));
  const inner = size(tensor.shape.slice(axis + 1));
  const values = new KINDS[tensor.dtype](outer * count * inner);
  for (let o = 0; o < outer; o++) {
    for (let row = 0; row < count; row++) {
      const from = (o * rows + Math.min(start + row, rows - 1)) * inner;
      values.set(tensor.values.subarray(from, from + inner) as never, (o * count + row) * inner);
    }
  }
  return { dtype: tensor.dtype, shape: tensor.shape.with(axis, count), values };
}

/** Tensors one after the other along the first axis. */
export function concat(parts: readonly Tensor[]): Tensor {
  const [first] = parts;
  const rows = parts.reduce((sum, part) => sum + part.shape[0], 0);
  const values = new KINDS[first.dtype](rows * size(first.shape.slice(1)));
  let at = 0;
  for (const part of parts) {
    values.set(part.values as never, at);
    at += part.values.length;
  }
  return { dtype: first.dtype, shape: [rows, ...first.shape.slice(1)], values };
}
