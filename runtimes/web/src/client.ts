/** The sampler as a page sees it: it runs in a worker. */

import type { Chain, SampleOptions, Seed, SelfTest, Tensor } from "./core/index.js";
import { revived } from "./core/errors.js";
import type { Backend } from "./engine.js";
import type { Methods, Opened, Reply, Request } from "./protocol.js";

export interface OpenOptions {
  /** `auto`, the default: WebGPU if the browser has it in hardware, else WebAssembly. */
  readonly backend?: Backend | "auto";
}

export class BrowserSampler {
  constructor(private readonly remote: Remote, readonly about: Opened) {}

  /** Images of a seed: float32 (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C) if the bundle was built so. */
  sample(seed: Seed, options?: SampleOptions): Promise<Tensor> {
    return this.remote.call("sample", seed, options);
  }

  /** One image of a seed, with the state after every step. */
  chain(seed: Seed, options?: Omit<SampleOptions, "count">): Promise<Chain> {
    return this.remote.call("chain", seed, options);
  }

  /** The golden noise against the golden images, and the time of a batch. */
  selfTest(rounds?: number): Promise<SelfTest> {
    return this.remote.call("selfTest", rounds);
  }

  /** The largest error of each state of the golden noise. */
  stateErrors(): Promise<number[]> {
    return this.remote.call("stateErrors");
  }

  /** Give the memory back; the sampler is of no use afterwards. */
  close(): void {
    this.remote.end();
  }
}

/** Check every byte of the bundle at `url`, relative to the page, and load its graph, in a worker. */
export async function openBundle(url: string | URL, { backend = "auto" }: OpenOptions = {}): Promise<BrowserSampler> {
  const remote = new Remote();
  try {
    return new BrowserSampler(remote, await remote.call("open", new URL(url, document.baseURI).href, backend));
  } catch (error) {
    remote.end();
    throw error;
  }
}

interface Waiting {
  resolve(result: never): void;
  reject(error: Error): void;
}

/** The worker, its methods called by message. */
class Remote {
  private readonly worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
  private readonly waiting = new Map<number, Waiting>();
  private last = 0;

  constructor() {
    this.worker.onmessage = ({ data }: MessageEvent<Reply>) => this.settle(data);
    this.worker.onerror = (event) => this.fail(`the worker failed: ${event.message || "its script cannot be loaded"}`);
  }

  call<M extends keyof Methods>(method: M, ...given: Parameters<Methods[M]>): Promise<Awaited<ReturnType<Methods[M]>>> {
    const request: Request = { id: ++this.last, method, arguments: given };
    return new Promise((resolve, reject) => {
      this.waiting.set(request.id, { resolve, reject });
      this.worker.postMessage(request);
    });
  }

  end(): void {
    this.worker.terminate();
    this.fail("the sampler was closed");
  }

  private settle({ id, result, error }: Reply): void {
    const waiting = this.waiting.get(id);
    this.waiting.delete(id);
    if (error) waiting?.reject(revived(error.name, error.message));
    else waiting?.resolve(result as never);
  }

  private fail(message: string): void {
    for (const { reject } of this.waiting.values()) reject(new Error(message));
    this.waiting.clear();
  }
}
