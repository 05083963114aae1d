/** A bundle, opened and ready to draw. */

import { batches, checkInputs } from "./batches.js";
import type { Bundle, Source } from "./bundle.js";
import { openBundle } from "./bundle.js";
import { UsageError } from "./errors.js";
import type { Manifest } from "./manifest.js";
import type { Seed } from "./noise.js";
import { samplerNoise } from "./noise.js";
import type { Engine, Session } from "./onnx.js";
import type { SelfTest } from "./selftest.js";
import { compare, judge, median } from "./selftest.js";
import { stateNames, statesOf } from "./states.js";
import type { Tensor, Tensors } from "./tensors.js";
import { concat, take } from "./tensors.js";

export interface SampleOptions {
  /** How many images; 1 by default. */
  readonly count?: number;
  /** The index of the first one under its seed; image i of a seed is the same whatever else is drawn. */
  readonly first?: number;
  /** What the graph takes besides noise, N rows each, such as `class_labels` int64 (N). */
  readonly conditions?: Tensors;
}

/** One image from noise to sample: `noise`, then `states` 1 ... K, each (1, C, H, W). */
export interface Chain {
  readonly noise: Tensor;
  readonly states: readonly Tensor[];
  readonly sample: Tensor;
}

/** Milliseconds: reading and checking the bundle, and loading its graph. */
export interface OpenTimes {
  readonly bundle: number;
  readonly graph: number;
}

export class Sampler {
  private stateSession: Promise<Session> | null = null;

  private constructor(
    readonly bundle: Bundle, readonly engine: Engine, private readonly session: Session, readonly times: OpenTimes,
  ) {}

  /** Check every byte of a bundle and load its graph. Both start at once; the graph waits for the check. */
  static async open(source: Source, engine: Engine | Promise<Engine>): Promise<Sampler> {
    const start = performance.now();
    const bundle = await openBundle(source);
    const checked = performance.now();
    const ready = await engine;
    const session = await ready.open(bundle);
    return new Sampler(bundle, ready, session, { bundle: checked - start, graph: performance.now() - checked });
  }

  get manifest(): Manifest {
    return this.bundle.manifest;
  }

  /** Images of a seed: float32 (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C) if the bundle was built so. */
  async sample(seed: Seed, { count = 1, first = 0, conditions = {} }: SampleOptions = {}): Promise<Tensor> {
    if (count < 1) throw new UsageError(`count is ${count}; ask for at least 1 image`);
    const inputs = { ...this.noise(seed, count, first), ...conditions };
    checkInputs(this.manifest, inputs);
    return this.run(inputs);
  }

  /** Image `first` of a seed, with the state after every step. The first call loads the graph once more. */
  async chain(seed: Seed, { first = 0, conditions = {} }: Omit<SampleOptions, "count"> = {}): Promise<Chain> {
    const inputs = { ...this.noise(seed, 1, first), ...conditions };
    checkInputs(this.manifest, inputs);
    const [{ states, sample }] = await this.chains(inputs);
    return { noise: inputs.noise, states, sample };
  }

  /** The states and samples of every batch of `inputs`. */
  private async chains(inputs: Tensors): Promise<{ states: Tensor[]; sample: Tensor }[]> {
    this.stateSession ??= this.engine.open(this.bundle, stateNames(this.bundle));
    const session = await this.stateSession;
    const found = [];
    for (const part of batches(this.manifest.batch, inputs)) {
      const results = await session.run(part.inputs);
      const real = (tensor: Tensor) => take(tensor, 0, 0, part.real);
      found.push({ states: statesOf(this.bundle, results).map(real), sample: real(results.sample) });
    }
    return found;
  }

  /** Run the golden noise, compare with the float64 reference, and time `rounds` passes of the first batch. */
  async selfTest(rounds = 5): Promise<SelfTest> {
    const { golden, manifest } = this.bundle;
    const [first] = batches(manifest.batch, golden.inputs);
    const result = judge(await this.run(golden.inputs), golden.sample, manifest.atol);
    const times: number[] = [];
    for (let round = 0; round < Math.max(1, rounds); round++) {
      const start = performance.now();
      await this.session.run(first.inputs);
      times.push(performance.now() - start);
    }
    return {
      bundle: manifest.name, runtime: this.engine.runtime, images: golden.count, ...result,
      milliseconds: median(times),
    };
  }

  /** The largest error of each state of the golden noise, in the graph that has them as outputs. */
  async stateErrors(): Promise<number[]> {
    const { golden } = this.bundle;
    const parts = await this.chains(golden.inputs);
    return golden.states.map((expected, k) => compare(concat(parts.map(({ states }) => states[k])), expected).worst);
  }

  /** Give the memory back. */
  async close(): Promise<void> {
    await this.session.release();
    await (await this.stateSession)?.release();
  }

  private noise(seed: Seed, count: number, first: number): Tensors {
    const shape = (name: string) => this.manifest.inputs.find((spec) => spec.name === name)?.shape;
    const image = (shape("noise") ?? []).slice(1).map(Number);
    return samplerNoise(seed, image, Number(shape("step_noise")?.[0] ?? 0), count, first);
  }

  private async run(inputs: Tensors): Promise<Tensor> {
    const parts: Tensor[] = [];
    for (const part of batches(this.manifest.batch, inputs)) {
      const { sample } = await this.session.run(part.inputs);
      parts.push(take(sample, 0, 0, part.real));
    }
    return concat(parts);
  }
}

/** Class labels for `count` images of one class. */
export function classLabels(label: number, count: number): Tensor {
  return { dtype: "int64", shape: [count], values: new BigInt64Array(count).fill(BigInt(label)) };
}

