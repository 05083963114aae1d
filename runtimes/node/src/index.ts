/** Images from a bundle in Node: `const sampler = await open("bundle"); await sampler.sample(7, { count: 16 })`. */

import * as ort from "onnxruntime-node";

import type { Engine } from "./core/index.js";
import { onnxEngine, Sampler } from "./core/index.js";
import { folderSource } from "./folder.js";

export * from "./core/index.js";
export { folderSource } from "./folder.js";
export { png, savePng } from "./png.js";

export interface OpenOptions {
  /** CPU threads of a run; 0 is the library's choice. */
  readonly threads?: number;
}

/** ONNX Runtime on the CPU, nodes in order. */
export function cpuEngine({ threads = 0 }: OpenOptions = {}): Engine {
  return onnxEngine(ort, "onnxruntime-node", {
    executionProviders: ["cpu"], executionMode: "sequential", intraOpNumThreads: threads, interOpNumThreads: 1,
    logSeverityLevel: 3,
  });
}

/** Check every byte of the bundle in `folder` and load its graph. */
export function open(folder: string, options: OpenOptions = {}): Promise<Sampler> {
  return Sampler.open(folderSource(folder), cpuEngine(options));
}
