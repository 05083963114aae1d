/** `manifest.json`: the fields that an app reads, and the seal over all of them. */

import { sha256 } from "./digest.js";
import { BundleError } from "./errors.js";
import { Fields } from "./fields.js";
import { parseJson } from "./json.js";
import type { Dtype } from "./tensors.js";

export const MANIFEST = "manifest.json";
export const GOLDEN = "golden.safetensors";
export const AGAIN = "rebuild the bundle or copy it again";
const LARGEST = 64 * 2 ** 20;
const SEAL = '\n "manifest_sha256": ';

export interface TensorSpec {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly (number | "batch")[];
  /** int64 values are 0 ... below - 1; null where the manifest does not tell. */
  readonly below: number | null;
}

/** The batches that a graph takes: either a list, or all from a lowest to a highest. */
export interface Batch {
  readonly sizes: readonly number[] | null;
  readonly range: readonly [number, number] | null;
}

export interface FileEntry {
  readonly path: string;
  readonly size: number;
  readonly sha256: string;
}

/** One step of the plan: what the network is told, and the level (alpha, sigma) of the state that it is given. */
export interface PlanStep {
  readonly timestep: number;
  readonly alpha: number;
  readonly sigma: number;
}

export interface Manifest {
  readonly name: string;
  readonly format: string;
  readonly precision: string;
  readonly artefact: string;
  readonly inputs: readonly TensorSpec[];
  readonly outputs: readonly TensorSpec[];
  readonly batch: Batch;
  readonly atol: number;
  readonly files: readonly FileEntry[];
  readonly sha256: string;
  readonly steps: readonly PlanStep[];
  readonly form: "unrolled" | "loop";
  /** Whether the sample is a latent, which no picture can show. */
  readonly latents: boolean;
}

/** Read and check the bytes of `manifest.json`; `place` names the bundle in messages until its own name is known. */
export async function parseManifest(bytes: Uint8Array<ArrayBuffer>, place: string): Promise<Manifest> {
  const where = `bundle ${place}: ${MANIFEST}`;
  if (bytes.length > LARGEST) throw new BundleError(`${where} has ${bytes.length} bytes, at most ${LARGEST}; ${AGAIN}`);
  let value: unknown;
  try {
    value = parseJson(bytes);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new BundleError(`${where} is not readable JSON (${error.message}); ${AGAIN}`);
  }
  const version = (value as { schema_version?: unknown } | null)?.schema_version;
  if (version !== 1) {
    const found = version === undefined ? "none" : JSON.stringify(version);
    throw new BundleError(`${where} has schema version ${found}, this kit reads 1; embed the bundle again`);
  }
  const manifest = read(new Fields(value, where));
  const digest = await sha256(withoutSeal(bytes));
  if (digest !== manifest.sha256) {
    throw new BundleError(`${where} was changed: its hash is ${digest}, it says ${manifest.sha256}; ${AGAIN}`);
  }
  return manifest;
}

function read(fields: Fields): Manifest {
  const plan = fields.child("plan");
  const form = fields.child("graph").optionalText("form") ?? "unrolled";
  const manifest: Manifest = {
    name: fields.text("name"),
    format: fields.text("format"),
    precision: fields.text("precision"),
    artefact: plainPath(fields, "artefact"),
    inputs: fields.list("inputs", readSpec),
    outputs: fields.list("outputs", readSpec),
    batch: readBatch(fields.child("batch")),
    atol: fields.child("tolerance").number("atol", 0),
    files: fields.list("files", (entry) => ({
      path: plainPath(entry, "path"), size: entry.whole("size", 0), sha256: entry.hash("sha256"),
    })),
    sha256: fields.hash("manifest_sha256"),
    steps: plan.list("steps", (step) => ({
      timestep: step.number("timestep"), alpha: step.number("alpha"), sigma: step.number("sigma"),
    })),
    form: form === "loop" ? "loop" : "unrolled",
    latents: fields.isNull("decoder") && plan.isFalse("clamp_output"),
  };
  checkFiles(fields, manifest);
  checkSpecs(fields, manifest);
  return manifest;
}

function readSpec(fields: Fields): TensorSpec {
  const dtype = fields.text("dtype");
  if (dtype !== "float32" && dtype !== "int64" && dtype !== "uint8") {
    throw fields.invalid("dtype", `is '${dtype}', not float32, int64 or uint8`);
  }
  const shape = fields.values("shape", (length) => length === "batch" || positive(length));
  const below = fields.isNull("below") ? null : fields.whole("below", 1);
  return { name: fields.text("name"), dtype, shape: shape as (number | "batch")[], below };
}

function readBatch(fields: Fields): Batch {
  const sizes = fields.isNull("sizes") ? null : (fields.values("sizes", positive) as number[]);
  const range = fields.isNull("range") ? null : (fields.values("range", positive) as number[]);
  if ((sizes === null) === (range === null)) throw fields.invalid("sizes", "and range are not one of the two");
  if (sizes && !ascending(sizes)) throw fields.invalid("sizes", `${sizes} are not ascending and distinct`);
  if (range && (range.length !== 2 || range[0] > range[1])) throw fields.invalid("range", `${range} is no range`);
  return { sizes, range: range as [number, number] | null };
}

function positive(length: number | string): boolean {
  return typeof length === "number" && Number.isInteger(length) && length >= 1;
}

function ascending(values: readonly number[]): boolean {
  return values.length > 0 && values.every((value, i) => i === 0 || values[i - 1] < value);
}

/** A relative POSIX path that stays inside its folder. */
function plainPath(fields: Fields, name: string): string {
  const path = fields.text(name);
  const climbs = path.split("/").some((part) => part === "" || part === "." || part === "..");
  if (climbs || /[\\:]/.test(path) || /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u.test(path) || path === MANIFEST) {
    throw fields.invalid(name, `'${path}' is not a plain relative path`);
  }
  return path;
}

function checkFiles(fields: Fields, { files, artefact }: Manifest): void {
  const paths = files.map((entry) => entry.path);
  const sorted = paths.every((path, i) => i === 0 || precedes(paths[i - 1], path));
  if (!sorted || new Set(paths.map((path) => path.toLowerCase())).size !== paths.length) {
    throw fields.invalid("files", "are not sorted and distinct");
  }
  const missing = [artefact, GOLDEN].find((name) => !paths.some((path) => path === name || path.startsWith(`${name}/`)));
  if (missing) throw fields.invalid("files", `do not list '${missing}'`);
}

/** Order by code points, which that of JavaScript's strings is not above U+FFFF. */
function precedes(a: string, b: string): boolean {
  const left = [...a], right = [...b];
  const at = left.findIndex((letter, i) => letter !== right[i]);
  if (at < 0) return left.length < right.length;
  return at < right.length && (left[at].codePointAt(0) ?? 0) < (right[at].codePointAt(0) ?? 0);
}

function checkSpecs(fields: Fields, { inputs, outputs }: Manifest): void {
  const names = [...inputs, ...outputs].map((spec) => spec.name);
  const named = inputs.some(({ name }) => name === "noise") && outputs.some(({ name }) => name === "sample");
  if (!named || new Set(names).size !== names.length) {
    throw fields.invalid("inputs", `and outputs ${names} are not distinct names with 'noise' and 'sample'`);
  }
}

/** The bytes of the manifest without the line that holds its own hash. */
function withoutSeal(bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  const text = new TextDecoder("latin1").decode(bytes);
  const start = text.indexOf(SEAL) + 1;
  const end = start === 0 ? 0 : text.indexOf("\n", start) + 1;
  const rest = new Uint8Array(bytes.length - (end - start));
  rest.set(bytes.subarray(0, start));
  rest.set(bytes.subarray(end), start);
  return rest;
}
