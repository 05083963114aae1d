/** ONNX Runtime in a browser or in Node: both packages have the interface of onnxruntime-common. */

import type { InferenceSession, Tensor as OrtTensor } from "onnxruntime-common";

import type { Bundle, Contents } from "./bundle.js";
import { whole } from "./bundle.js";
import { BundleError, KitError, NotAvailableError, oneLine } from "./errors.js";
import { withOutputs } from "./states.js";
import type { Dtype, Tensor, Tensors, Values } from "./tensors.js";

/** The part of onnxruntime-web and onnxruntime-node that is used. */
export interface OnnxRuntime {
  readonly InferenceSession: {
    create(model: Uint8Array, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
    create(path: string, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
  };
  readonly Tensor: new (dtype: Dtype, values: Values, shape: readonly number[]) => OrtTensor;
}

/** A loaded graph. */
export interface Session {
  run(inputs: Tensors): Promise<Tensors>;
  release(): Promise<void>;
}

/** Something that loads graphs. `runtime` is said in reports, such as "onnxruntime-node". */
export interface Engine {
  readonly runtime: string;
  /** The graph of the bundle, with values of it as `further` outputs. */
  open(bundle: Bundle, further?: readonly string[]): Promise<Session>;
}

/** The engine of one of ONNX Runtime's packages. */
export function onnxEngine(ort: OnnxRuntime, runtime: string, options: InferenceSession.SessionOptions): Engine {
  return {
    runtime,
    async open(bundle, further = []) {
      const { manifest } = bundle;
      try {
        return new OnnxSession(ort, bundle, await create(ort, bundle, further, options));
      } catch (error) {
        if (error instanceof KitError) throw error;
        throw new BundleError(
          `bundle ${manifest.name}: ${manifest.artefact} cannot be loaded in ${runtime}: ${oneLine(error)}`,
        );
      }
    },
  };
}

/** The session of a graph: from memory, or, where its weights are too large for that, from where it lies. */
function create(
  ort: OnnxRuntime, { manifest, files, place }: Bundle, further: readonly string[],
  options: InferenceSession.SessionOptions,
): Promise<InferenceSession> {
  const where = `bundle ${manifest.name}: ${manifest.artefact}`;
  const externalData: { path: string; data: Uint8Array<ArrayBuffer> }[] = [];
  for (const [path, data] of files) {
    if (path === manifest.artefact) continue;
    if (data instanceof Uint8Array) externalData.push({ path, data });
    else if (place && !further.length) return ort.InferenceSession.create(place(manifest.artefact), options);
    else throw new NotAvailableError(`${where} shows no states: '${path}' has ${data.size} bytes, too many to hold`);
  }
  const model = whole(files.get(manifest.artefact) as Contents, where);
  const shown = further.length ? withOutputs(model, further) : model;
  return ort.InferenceSession.create(shown, externalData.length ? { ...options, externalData } : options);
}

class OnnxSession implements Session {
  constructor(
    private readonly ort: OnnxRuntime, private readonly bundle: Bundle, private readonly session: InferenceSession,
  ) {
    const found = [...session.inputNames].sort().join(", ");
    const says = bundle.manifest.inputs.map((spec) => spec.name).sort().join(", ");
    if (found !== says) {
      const { name, artefact } = bundle.manifest;
      throw new BundleError(`bundle ${name}: ${artefact} takes ${found}, the manifest says ${says}; rebuild it`);
    }
  }

  async run(inputs: Tensors): Promise<Tensors> {
    const feeds = Object.entries(inputs).map(([name, { dtype, values, shape }]) => [
      name, new this.ort.Tensor(dtype, values, shape),
    ]);
    try {
      const results = await this.session.run(Object.fromEntries(feeds));
      return Object.fromEntries(Object.entries(results).map(([name, value]) => [name, fromOrt(value)]));
    } catch (error) {
      throw new KitError(`bundle ${this.bundle.manifest.name}: a run failed: ${oneLine(error)}`);
    }
  }

  release(): Promise<void> {
    return this.session.release();
  }
}

function fromOrt(value: OrtTensor): Tensor {
  return { dtype: value.type as Dtype, shape: [...value.dims], values: value.data as Values };
}
