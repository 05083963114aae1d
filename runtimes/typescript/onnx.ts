/** ONNX Runtime in a browser or in Node: both packages have the interface of onnxruntime-common. */

import type { InferenceSession, Tensor as OrtTensor } from "onnxruntime-common";

import type { Bundle } from "./bundle.js";
import { BundleError, KitError, oneLine } from "./errors.js";
import { withOutputs } from "./states.js";
import type { Dtype, Tensor, Tensors, Values } from "./tensors.js";

/** The part of onnxruntime-web and onnxruntime-node that is used. */
export interface OnnxRuntime {
  readonly InferenceSession: {
    create(model: Uint8Array, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
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
      const { manifest, files } = bundle;
      const model = files.get(manifest.artefact) as Uint8Array<ArrayBuffer>;
      const beside = [...files].filter(([path]) => path !== manifest.artefact);
      const externalData = beside.map(([path, data]) => ({ path, data }));
      const whole = further.length ? withOutputs(model, further) : model;
      try {
        const session = await ort.InferenceSession.create(
          whole, externalData.length ? { ...options, externalData } : options,
        );
        return new OnnxSession(ort, bundle, session);
      } catch (error) {
        throw new BundleError(
          `bundle ${manifest.name}: ${manifest.artefact} cannot be loaded in ${runtime}: ${oneLine(error)}`,
        );
      }
    },
  };
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
