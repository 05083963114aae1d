/** What page and worker say to each other. */

import type { Manifest, OpenTimes, Sampler } from "./core/index.js";
import type { Backend } from "./engine.js";

/** What is known once a bundle is open. `note` says why WebGPU is not used, and is empty if it is; `threads` are those of WebAssembly. */
export interface Opened {
  readonly manifest: Manifest;
  readonly backend: Backend;
  readonly runtime: string;
  readonly note: string;
  readonly threads: number;
  readonly times: OpenTimes;
}

/** The methods that a worker offers: opening, then those of the sampler. */
export type Methods = { open(url: string, backend: Backend | "auto"): Promise<Opened> } &
  Pick<Sampler, "chain" | "close" | "sample" | "selfTest" | "stateErrors">;

export interface Request {
  readonly id: number;
  readonly method: keyof Methods;
  readonly arguments: unknown[];
}

export interface Reply {
  readonly id: number;
  readonly result?: unknown;
  readonly error?: { readonly name: string; readonly message: string };
}
