/** What apps use of the kit's core; the same in Node and in browsers. */

export type { Bundle, Golden, Source } from "./bundle.js";
export { openBundle } from "./bundle.js";
export { BundleError, KitError, NotAvailableError, oneLine, UsageError } from "./errors.js";
export type { Manifest } from "./manifest.js";
export type { Seed } from "./noise.js";
export { normal, philox4x32, samplerNoise } from "./noise.js";
export type { Engine, Session } from "./onnx.js";
export { onnxEngine } from "./onnx.js";
export type { Picture } from "./pictures.js";
export { picture, rgba, sheet } from "./pictures.js";
export type { Chain, OpenTimes, SampleOptions } from "./sampler.js";
export { classLabels, Sampler } from "./sampler.js";
export type { SelfTest } from "./selftest.js";
export { compare, judge, report } from "./selftest.js";
export type { Dtype, Tensor, Tensors } from "./tensors.js";
