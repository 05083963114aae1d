/** A bundle whose every byte was checked when it was opened. */

import { sha256 } from "./digest.js";
import { BundleError, UsageError } from "./errors.js";
import type { FileEntry, Manifest, TensorSpec } from "./manifest.js";
import { AGAIN, GOLDEN, MANIFEST, parseManifest } from "./manifest.js";
import { readSafetensors } from "./safetensors.js";
import type { Tensor, Tensors } from "./tensors.js";
import { batchAxis } from "./tensors.js";

/** What is known of a file that is too large to hold. */
export interface LargeFile {
  readonly size: number;
  readonly sha256: string;
}

export type Contents = Uint8Array<ArrayBuffer> | LargeFile;

/** Where the files of a bundle come from. */
export interface Source {
  /** The last part of the folder's path, for messages. */
  readonly name: string;
  /** The bytes of a file; null if there is none of that relative POSIX path. */
  read(path: string): Promise<Contents | null>;
  /** Where a file lies, for a library that reads it by itself; absent where it cannot, as on a web server. */
  place?(path: string): string;
  /** All files; absent where a folder cannot be listed, as on a web server. */
  list?(): Promise<readonly { readonly path: string; readonly kind: "file" | "link" | "other" }[]>;
}

/** What the float64 reference gave: the graph's inputs and outputs, and `state.1` ... `state.K`, N images each. */
export interface Golden {
  readonly count: number;
  readonly inputs: Tensors;
  readonly sample: Tensor;
  readonly states: readonly Tensor[];
}

export interface Bundle {
  readonly manifest: Manifest;
  readonly golden: Golden;
  /** The files of the artefact by path: the artefact itself and its weights, if they lie beside it. */
  readonly files: ReadonlyMap<string, Contents>;
  /** As that of its source. */
  readonly place?: (path: string) => string;
}

/** Check manifest, files, hashes and golden tensors; UsageError if it is no bundle, else BundleError. */
export async function openBundle(source: Source): Promise<Bundle> {
  const listed = await source.list?.();
  const bytes = await source.read(MANIFEST);
  if (bytes === null) {
    throw new UsageError(`${source.name} is not a bundle: it has no ${MANIFEST}; make one with mmd-export build --out`);
  }
  const manifest = await parseManifest(whole(bytes, `bundle ${source.name}: ${MANIFEST}`), source.name);
  if (listed) checkListing(manifest, listed);
  const contents = await Promise.all(manifest.files.map((entry) => readChecked(source, manifest, entry)));
  const files = new Map(manifest.files.map((entry, i) => [entry.path, contents[i]]));
  const golden = readGolden(manifest, whole(files.get(GOLDEN) as Contents, `bundle ${manifest.name}: ${GOLDEN}`));
  const stem = manifest.artefact.split(".")[0];
  const artefact = [...files].filter(([path]) => path.split("/")[0].split(".")[0] === stem);
  return { manifest, golden, files: new Map(artefact), place: source.place?.bind(source) };
}

/** The bytes of a file that is never large in a bundle that is whole. */
export function whole(contents: Contents, where: string): Uint8Array<ArrayBuffer> {
  if (contents instanceof Uint8Array) return contents;
  throw new BundleError(`${where} has ${contents.size} bytes, more than can be held; ${AGAIN}`);
}

function checkListing(manifest: Manifest, listed: readonly { path: string; kind: string }[]): void {
  const known = new Set([MANIFEST, ...manifest.files.map((entry) => entry.path)]);
  for (const { path, kind } of listed) {
    const where = `bundle ${manifest.name}: '${path}'`;
    if (kind !== "file") throw new BundleError(`${where} is ${kind === "link" ? "a symbolic link" : "no plain file"}; ${AGAIN}`);
    if (!known.has(path)) throw new BundleError(`${where} is not in its manifest; delete that file or ${AGAIN}`);
  }
}

async function readChecked(source: Source, manifest: Manifest, entry: FileEntry): Promise<Contents> {
  const where = `bundle ${manifest.name}: '${entry.path}'`;
  const contents = await source.read(entry.path);
  if (contents === null) throw new BundleError(`${where} is missing; ${AGAIN}`);
  const size = contents instanceof Uint8Array ? contents.length : contents.size;
  if (size !== entry.size) {
    throw new BundleError(`${where} has ${size} bytes, the manifest says ${entry.size}; ${AGAIN}`);
  }
  const digest = contents instanceof Uint8Array ? await sha256(contents) : contents.sha256;
  if (digest !== entry.sha256) {
    throw new BundleError(`${where} has SHA-256 ${digest}, the manifest says ${entry.sha256}; ${AGAIN}`);
  }
  return contents;
}

function readGolden(manifest: Manifest, bytes: Uint8Array): Golden {
  const where = `bundle ${manifest.name}: ${GOLDEN}`;
  let tensors: Record<string, Tensor>;
  try {
    tensors = readSafetensors(bytes);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new BundleError(`${where} cannot be read: ${error.message}; ${AGAIN}`);
  }
  const noise = manifest.inputs.find(({ name }) => name === "noise") as TensorSpec;
  const states = manifest.steps.map((_, k) => ({ ...noise, name: `state.${k + 1}` }));
  const specs = [...manifest.inputs, ...manifest.outputs, ...states];
  const found = Object.keys(tensors).sort().join(", "), says = specs.map(({ name }) => name).sort().join(", ");
  if (found !== says) throw new BundleError(`${where} holds ${found}, the manifest says ${says}; ${AGAIN}`);
  const count = tensors.noise.shape[0] ?? 0;
  const smallest = manifest.batch.sizes?.[0] ?? manifest.batch.range?.[0] ?? 1;
  const padded = manifest.batch.sizes?.length === 1 && count % smallest !== 0;
  if (count < smallest || padded) {
    throw new BundleError(`${where} holds ${count} images, batches of ${smallest} cannot run them unpadded; ${AGAIN}`);
  }
  for (const spec of specs) checkGolden(where, tensors[spec.name], spec, count);
  return {
    count,
    inputs: Object.fromEntries(manifest.inputs.map(({ name }) => [name, tensors[name]])),
    sample: tensors.sample,
    states: states.map(({ name }) => tensors[name]),
  };
}

function checkGolden(where: string, tensor: Tensor, spec: TensorSpec, count: number): void {
  const shape = spec.shape.map((length, axis) => (axis === batchAxis(spec.name) ? count : length));
  const found = `${tensor.dtype} (${tensor.shape.join(", ")})`, says = `${spec.dtype} (${shape.join(", ")})`;
  if (found !== says) throw new BundleError(`${where}: '${spec.name}' is ${found}, the manifest says ${says}; ${AGAIN}`);
  if (tensor.values instanceof Float32Array && !tensor.values.every(Number.isFinite)) {
    throw new BundleError(`${where}: '${spec.name}' holds NaN or infinite values; ${AGAIN}`);
  }
}
