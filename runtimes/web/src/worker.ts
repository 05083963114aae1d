/** The sampler in a thread of its own, so that the page stays live while it computes. */

import { Sampler, UsageError } from "./core/index.js";
import { BrowserEngine, THREADS } from "./engine.js";
import { fetchedSource } from "./fetched.js";
import type { Methods, Opened, Reply, Request } from "./protocol.js";

interface Scope {
  onmessage: ((event: MessageEvent<Request>) => void) | null;
  postMessage(reply: Reply): void;
}

let sampler: Sampler | null = null;

async function open(url: string, wanted: Parameters<Methods["open"]>[1]): Promise<Opened> {
  const choosing = BrowserEngine.choose(wanted);
  choosing.catch(() => undefined); // awaited below, after the bundle, whose errors come first
  sampler = await Sampler.open(fetchedSource(url), choosing);
  const { backend, note, runtime } = await choosing;
  return { manifest: sampler.manifest, backend, note, runtime, threads: THREADS, times: sampler.times };
}

function opened(): Sampler {
  if (!sampler) throw new UsageError("no bundle is open; call open first");
  return sampler;
}

const methods: Methods = {
  open,
  sample: (...given) => opened().sample(...given),
  chain: (...given) => opened().chain(...given),
  selfTest: (...given) => opened().selfTest(...given),
  stateErrors: () => opened().stateErrors(),
  close: () => opened().close(),
};

const scope = self as unknown as Scope;
let last: Promise<unknown> = Promise.resolve();

// One call after the other: a session of ONNX Runtime takes one run at a time.
scope.onmessage = ({ data }) => {
  last = last.then(() => answer(data)).then((reply) => scope.postMessage(reply));
};

async function answer(request: Request): Promise<Reply> {
  try {
    const method = methods[request.method] as (...given: unknown[]) => Promise<unknown>;
    return { id: request.id, result: await method(...request.arguments) };
  } catch (error) {
    const { name, message } = error instanceof Error ? error : new Error(String(error));
    return { id: request.id, error: { name, message } };
  }
}
