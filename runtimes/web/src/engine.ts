/** ONNX Runtime in the browser: on WebGPU where there is one, else on WebAssembly, and it says which and why. */

import type { Bundle } from "./core/bundle.js";
import { NotAvailableError, oneLine } from "./core/errors.js";
import type { Engine, Session } from "./core/onnx.js";
import { onnxEngine } from "./core/onnx.js";

export type Backend = "wasm" | "webgpu";

const NAMES: Readonly<Record<Backend, string>> = { wasm: "WebAssembly", webgpu: "WebGPU" };

/** Threads of WebAssembly: half the processors, at most 4, where the server isolates the page; else 1. */
export const THREADS = globalThis.crossOriginIsolated ? Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;

interface Adapter {
  readonly isFallbackAdapter?: boolean;
  readonly info?: { readonly isFallbackAdapter?: boolean };
}

export class BrowserEngine implements Engine {
  private constructor(private inner: Engine, readonly wanted: Backend | "auto", public backend: Backend, public note: string) {}

  /** `auto` takes WebGPU if the browser has it in hardware; a backend by name is taken, or NotAvailableError. */
  static async choose(wanted: Backend | "auto"): Promise<BrowserEngine> {
    const missing = wanted === "wasm" ? "asked for" : await webgpuMissing(wanted === "webgpu");
    if (wanted === "webgpu" && missing) throw new NotAvailableError(`WebGPU was asked for: ${missing}; use wasm`);
    const backend = missing ? "wasm" : "webgpu";
    return new BrowserEngine(await load(backend), wanted, backend, missing);
  }

  get runtime(): string {
    return this.inner.runtime;
  }

  /** A graph that WebGPU cannot take runs on WebAssembly, unless WebGPU was asked for. */
  async open(bundle: Bundle, further: readonly string[] = []): Promise<Session> {
    try {
      return await this.inner.open(bundle, further);
    } catch (error) {
      // A graph with further outputs only shows the chain of images that are drawn already: those stay where they are.
      if (this.backend === "wasm" || this.wanted === "webgpu" || further.length) throw error;
      this.note = `WebGPU could not load this graph (${oneLine(error)})`;
      this.backend = "wasm";
      this.inner = await load("wasm");
      return this.inner.open(bundle, further);
    }
  }
}

/** Why WebGPU is not used; empty if it can be. */
async function webgpuMissing(softwareToo: boolean): Promise<string> {
  const { gpu } = navigator as { gpu?: { requestAdapter(): Promise<Adapter | null> } };
  if (!gpu) return "this browser has no WebGPU here";
  const adapter = await gpu.requestAdapter().catch(() => null);
  if (!adapter) return "this browser offers no WebGPU adapter";
  const software = adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter ?? false;
  return software && !softwareToo ? "this browser has WebGPU in software only" : "";
}

async function load(backend: Backend): Promise<Engine> {
  // Two builds of ONNX Runtime, each a file of its own; only the one that is used is fetched.
  const ort = await (backend === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"));
  ort.env.wasm.numThreads = THREADS;
  ort.env.logLevel = "error";
  return onnxEngine(ort, `onnxruntime-web on ${NAMES[backend]}`, {
    executionProviders: [backend], executionMode: "sequential", logSeverityLevel: 3,
  });
}
