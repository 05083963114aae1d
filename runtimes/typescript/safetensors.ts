/** Reading a safetensors file: 8 bytes of header length, a JSON header, then the data. Throws SyntaxError. */

import { parseJson } from "./json.js";
import type { Dtype, Tensor } from "./tensors.js";
import { BYTES, fromBytes, size } from "./tensors.js";

const DTYPES: Readonly<Record<string, Dtype>> = { F32: "float32", I64: "int64", U8: "uint8" };

interface Entry {
  dtype?: unknown;
  shape?: unknown;
  data_offsets?: unknown;
}

export function readSafetensors(bytes: Uint8Array): Record<string, Tensor> {
  if (bytes.length < 8) throw new SyntaxError(`it has ${bytes.length} bytes, its header alone needs 8`);
  const length = new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);
  if (length > BigInt(bytes.length - 8)) {
    throw new SyntaxError(`its header has ${length} bytes, the file ${bytes.length}`);
  }
  const header = parseJson(bytes.subarray(8, 8 + Number(length)));
  if (typeof header !== "object" || header === null) throw new SyntaxError("its header is no object");
  const data = bytes.subarray(8 + Number(length));
  const found = Object.entries(header).filter(([name]) => name !== "__metadata__");
  const tensors = Object.fromEntries(found.map(([name, entry]) => [name, readTensor(name, entry as Entry, data)]));
  requireWhole(found.map(([, entry]) => (entry as Entry).data_offsets as [number, number]), data.length);
  return tensors;
}

/** The tensors cover the data without holes or overlaps, as every reader of the format requires. */
function requireWhole(places: [number, number][], length: number): void {
  let at = 0;
  for (const [start, end] of places.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (start !== at) throw new SyntaxError(`its data has a hole or an overlap at ${at}`);
    at = end;
  }
  if (at !== length) throw new SyntaxError(`its tensors have ${at} bytes, its data ${length}`);
}

function readTensor(name: string, entry: Entry, data: Uint8Array): Tensor {
  const dtype = DTYPES[String(entry?.dtype)];
  if (!dtype) throw new SyntaxError(`'${name}' has dtype ${JSON.stringify(entry?.dtype)}, not F32, I64 or U8`);
  const shape = wholeNumbers(name, "shape", entry.shape);
  const [start, end, ...more] = wholeNumbers(name, "data_offsets", entry.data_offsets);
  if (more.length || !(start <= end && end <= data.length)) {
    throw new SyntaxError(`'${name}' lies at ${JSON.stringify(entry.data_offsets)} of ${data.length} bytes of data`);
  }
  if (end - start !== size(shape) * BYTES[dtype]) {
    throw new SyntaxError(`'${name}' has ${end - start} bytes, shape ${shape} needs ${size(shape) * BYTES[dtype]}`);
  }
  return fromBytes(dtype, shape, data.subarray(start, end));
}

function wholeNumbers(name: string, field: string, value: unknown): number[] {
  if (!Array.isArray(value) || !value.every((item) => Number.isSafeInteger(item) && item >= 0)) {
    throw new SyntaxError(`'${name}' has ${field} ${JSON.stringify(value)}`);
  }
  return value as number[];
}
